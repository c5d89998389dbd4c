"""Where a training group and its driver talk, whatever machines they are on: an actor beside the driver.

What ranks tell is kept in order until the driver hears it. The group is started from here, so Ray ends all of it with this actor: when
the driver is killed, and when it has heard enough.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

from distft.errors import DistftError
from distft.progress import Figures, Meter

START_SECONDS = 20
"""In a group whose size may change: how long room that was there is waited for, before it is counted again."""
ADVANCE_SECONDS = 0.2
"""Steps of a progress bar are told no more often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What is to be done, by how many, and what each needs around it."""

    work: Callable[[], dict[str, Any]]
    least: int
    most: int
    """With how few and how many ranks; they change while the group lasts where these differ."""
    looks: float
    """Seconds between two looks at whether there is room for more."""
    gpu: bool
    threads: int
    restarts: int
    folder: str
    """The driver's working directory: paths in a run file are seen from there."""
    environment: dict[str, str] = field(repr=False)
    scratch: str
    """Where Ray Train keeps its own accounts. Nothing of the run is there."""
    loopback: bool
    """Whether Ray keeps to this machine alone, so that ranks can, too."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Hello of a rank that has started."""

    rank: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True, slots=True)
class Said:
    text: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A progress bar."""

    meter: int
    label: str
    total: float | None
    unit: str
    done: float


@dataclass(frozen=True, slots=True)
class Advanced:
    meter: int
    amount: float
    note: str
    figures: Figures | None = None
    """The last that were told of some steps."""


@dataclass(frozen=True, slots=True)
class Closed:
    meter: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank raised: an error for a user, or a bug, of which text and traceback remain."""

    rank: Rank
    error: DistftError | str
    final: bool = False
    """Whether another start would end in the same way: with the same bad input, artifact or numbers."""
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The group has failed: `deaths` says of ranks that died how."""

    deaths: dict[int, str]


@dataclass(frozen=True, slots=True)
class Resized:
    """All ranks have kept what they had and wait for their end: another number of them starts."""


@dataclass(frozen=True, slots=True)
class Idle:
    """A rank that was told to stop had not begun to train."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """A rank stopped where it was told to, and what it says of that."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    result: dict[str, Any]


@dataclass(slots=True)
class Start:
    """What is asked of the ranks of one start of the group, and what is known of them."""

    halt: asyncio.Event = field(default_factory=asyncio.Event)
    """They are to stop, for whichever reason."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """They are to stop since the driver wants it."""
    done: dict[Rank, bool] = field(default_factory=dict)
    """Whether each that has said hello has nothing more to do."""
    failed: bool = False
    replaced: bool = False
    """Others have started in their places."""


class Desk:
    """The actor. Its methods run in one event loop; the group's own driver is in a thread beside it."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.over, self.stopping = False, False
        self.ranks: dict[int, Rank] = {}
        """Who had each place last, in this start or an earlier one."""
        self.start, self.news = Start(), asyncio.Event()
        self.early: dict[str, dict[int, tuple[Any, ...]]] = {}
        """Of each line, what came before what was told before it, by number."""
        self.next: Counter[str] = Counter()
        """The number of each line that is to be taken next."""

    async def run(self, group: Group, desk: Any) -> str:
        """Until all ranks are done: "", or why Ray gave the group up. `desk` is this actor as others see it."""
        # Read by Ray Train where it is called. Its own notes on time spent go nowhere, so none are taken.
        os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_METRICS_ENABLED": "0"}
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        if group.least < group.most:  # when a machine is lost, Ray counts on it for a while: fewer ranks should not wait for it
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
        from distft.cluster.rank import fit

        return await asyncio.to_thread(fit, group, desk)

    async def tell(self, *events: Any) -> bool:
        """Whether the group is not to be started again."""
        self.over = self.over or any(isinstance(event, Failed) and event.final for event in events)
        self.told += events
        self.news.set()
        return self.over

    async def tell_in_order(self, line: str, number: int, *events: Any) -> None:
        """`tell`, for one of a line's calls: Ray may run them in another order than they were made in."""
        early = self.early.setdefault(line, {})
        early[number] = events
        while self.next[line] in early:
            await self.tell(*early.pop(self.next[line]))
            self.next[line] += 1

    async def hello(self, rank: Rank) -> Rank | None:
        """Who had this rank's place before."""
        before = self.ranks.get(rank.rank)
        self.ranks[rank.rank] = rank
        self.start.done[rank] = False
        await self.tell(rank)
        return before

    async def ended(self, deaths: dict[int, str]) -> bool:
        """The group has failed; answers as `tell` does. Ray may say so at every look while others still work: it is told once."""
        if not self.start.failed:
            self.start.failed = True
            await self.tell(Ended(deaths))
        return self.over

    async def hear(self, seconds: float) -> list[Any]:
        """What was told since the last time; waits so long for something."""
        if not self.told:
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), seconds)
            except TimeoutError:
                return []
        told, self.told = self.told, []
        return told

    async def stop(self) -> None:
        """For good: the driver wants it."""
        self.stopping = True
        self.start.halt.set()
        self.start.stop.set()

    async def pause(self) -> None:
        """Has the ranks that there are stop, for others to go on."""
        self.start.halt.set()

    async def halt_asked(self) -> bool:
        """Returns when the ranks are to stop, for whichever reason; False where others have taken their places."""
        asked = self.start
        await asked.halt.wait()
        return not asked.replaced

    async def stop_asked(self) -> bool:
        """Returns when the driver wants the ranks to stop; False where others have taken their places."""
        asked = self.start
        await asked.stop.wait()
        return not asked.replaced

    async def leave(self, rank: Rank) -> None:
        """The rank has nothing more to do: it has kept what it had where it was to stop, or training is over."""
        if rank in self.start.done:  # else it comes late, from an earlier start
            self.start.done[rank] = True

    async def left(self) -> int:
        """How many of the ranks that there are have nothing more to do."""
        return sum(self.start.done.values())

    async def start_over(self) -> None:
        """Others take the places of all ranks that there were: what those were asked is none of their business. What those still
        ask is answered, dead though they are: it would wait here until the actor can take no more calls."""
        old, self.start = self.start, Start()
        old.replaced = True
        old.halt.set()
        old.stop.set()
        if self.stopping:
            await self.stop()


class Line:
    """A rank's line to the desk, and its `progress.Voice`."""

    def __init__(self, ray: Any, desk: Any) -> None:
        self.ray, self.desk = ray, desk
        self.name, self.numbers, self.calls = uuid4().hex, count(), count()
        self.lock = threading.Lock()

    def say(self, text: str) -> None:
        self.tell(Said(text))

    @contextmanager
    def track(self, label: str, total: float | None, unit: str, done: float) -> Iterator[Meter]:
        meter = _ToldMeter(self, next(self.numbers))
        self.tell(Opened(meter.number, label, total, unit, done))
        yield meter
        meter.flush()
        self.tell(Closed(meter.number))

    def tell(self, *events: Any) -> None:
        """Returns at once. All that a line tells is heard in order."""
        self._call(events)

    def tell_surely(self, *events: Any) -> None:
        """Returns when it has arrived: what comes next may be the end of this process."""
        self.ray.get(self._call(events))

    def _call(self, events: tuple[Any, ...]) -> Any:
        with self.lock:  # meters tell from the thread that trains, others from theirs
            return self.desk.tell_in_order.remote(self.name, next(self.calls), *events)

    def ask(self, method: Any, *given: Any) -> Any:
        """What a method of the desk answers."""
        return self.ray.get(method.remote(*given))


class _ToldMeter:
    def __init__(self, line: Line, number: int) -> None:
        self.line, self.number = line, number
        self.amount, self.note = 0.0, ""
        self.figures: Figures | None = None
        self.last = time.monotonic()
        self.lock = threading.Lock()

    def advance(self, amount: float = 1.0, note: str = "", figures: Figures | None = None) -> None:
        with self.lock:
            self.amount += amount
            self.note = note or self.note
            if figures is not None:
                self.figures = figures
            due = time.monotonic() - self.last >= ADVANCE_SECONDS
        if due:
            self.flush()

    def flush(self) -> None:
        with self.lock:
            self.last = time.monotonic()
            amount, self.amount = self.amount, 0.0
            if amount:
                self.line.tell(Advanced(self.number, amount, self.note, self.figures))
