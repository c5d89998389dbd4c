"""Units of work over Ray actors: each actor builds its worker once and keeps it, units go to whoever is free, results come back as
they are done.

A worker is a callable from a unit to a generator that yields amounts of work as they are done, and returns the result. The same
callable serves in process, where a caller just runs the generator. What an actor does is told in a stream per unit, in order: amounts,
then the result or a DistftError.

An actor that dies (killed, out of memory, its machine gone) gives its units back and another takes its place; the unit that it was
at may be tried so often, and no more. A unit may therefore be worked on twice, even at once: its effect must be the same as of once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from distft.cluster.session import ray_session
from distft.errors import DistftError
from distft.progress import say

ATTEMPTS = 3
"""How many actors may die over one unit before it is given up."""
IN_FLIGHT = 2
"""Units that an actor has: one that it is at, and one that it goes on with at once."""
QUIET_SECONDS = 30.0
"""After so long without a sign of any actor, a person is told what is being waited for."""


class Named(Protocol):
    """A unit of work: picklable, and with a name that tells it from the others."""

    @property
    def name(self) -> str: ...


Unit = TypeVar("Unit", bound=Named)
Result = TypeVar("Result")
Worker = Callable[[Unit], Generator[float, None, Result]]
Report = Callable[[float, str], object]
"""Is told amounts as they are done, and a note for a person. An amount is negative when work was lost."""


class _Actor(Generic[Unit, Result]):
    """Runs in its own process. The worker is built with the first unit, so that what goes wrong then is told like all else."""

    def __init__(self, make_worker: Callable[[], Worker[Unit, Result]]) -> None:
        self.make_worker = make_worker
        self.worker: Worker[Unit, Result] | None = None

    def work(self, unit: Unit) -> Iterator[tuple[str, Any]]:
        yield "amount", 0.0  # it lives
        try:
            if self.worker is None:
                self.worker = self.make_worker()
            yield "ready", 0.0
            steps = self.worker(unit)
            while True:
                try:
                    yield "amount", next(steps)
                except StopIteration as ended:
                    yield "result", ended.value
                    return
        except DistftError as error:
            yield "error", error


@dataclass(eq=False)
class _Hand:
    """An actor as its driver sees it."""

    actor: Any
    attempts: list[_Attempt] = field(default_factory=list)
    """Its units, in the order in which it does them."""
    amount: float = 0.0
    since: float | None = None
    """When it was first ready to work."""
    lives: bool = False
    dead: bool = False
    blamed: bool = False
    """Whether the unit that it died over is found."""

    @property
    def rate(self) -> float:
        return 0.0 if self.since is None else self.amount / max(time.monotonic() - self.since, 1e-9)


@dataclass(eq=False)
class _Attempt:
    """A unit in the hands of an actor."""

    unit: Any
    hand: _Hand
    stream: Any
    begun: bool = False
    amount: float = 0.0


class Pool(Generic[Unit, Result]):
    """Actors, for as long as their block lasts."""

    def __init__(self, ray: Any, make_worker: Callable[[], Worker[Unit, Result]], *, workers: int, gpus_per_worker: int) -> None:
        self.ray, self.workers, self.gpus = ray, workers, gpus_per_worker
        # Restarts are ours to do: Ray's would not count them by unit.
        self.remote = ray.remote(_Actor).options(
            num_cpus=1, num_gpus=gpus_per_worker, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self.make_worker = make_worker
        self.hands = [self._start() for _ in range(workers)]
        self.mourned: list[_Hand] = []
        self.deaths: dict[str, int] = {}
        self.waiting: deque[Unit] = deque()

    def map(self, units: Iterable[Unit], report: Report = lambda amount, note: None) -> Iterator[Result]:
        """The result of each unit once, as they are done. The first DistftError of a worker comes out as it is, anything else that
        a worker raises with its traceback; either ends the whole."""
        self.waiting = deque(units)
        self._hand_out()
        told = False
        while attempts := [attempt for hand in self._all_hands() for attempt in hand.attempts]:
            ready, _ = self.ray.wait([attempt.stream for attempt in attempts], timeout=QUIET_SECONDS)
            if not ready and not told and not any(hand.lives for hand in self.hands):
                told = True
                self._say_what_is_awaited()
            for stream in ready:
                attempt = next(attempt for attempt in attempts if attempt.stream is stream)
                kind, value = self._next_event(attempt)
                if kind == "result":
                    attempt.hand.attempts.remove(attempt)
                    self._hand_out()
                    yield value
                elif kind == "error":
                    raise value
                elif kind == "death":
                    self._bury(attempt, str(value), report)
                else:
                    attempt.begun = attempt.hand.lives = True
                    if kind == "ready" and attempt.hand.since is None:
                        attempt.hand.since = time.monotonic()
                    attempt.amount += value
                    attempt.hand.amount += value
                    report(value, self._note())

    def close(self) -> None:
        for hand in self.hands:
            self.ray.kill(hand.actor, no_restart=True)

    def _start(self) -> _Hand:
        return _Hand(self.remote.remote(self.make_worker))

    def _all_hands(self) -> list[_Hand]:
        """The dead too, while something of theirs is unread."""
        self.mourned = [hand for hand in self.mourned if hand.attempts]
        return [*self.hands, *self.mourned]

    def _hand_out(self) -> None:
        """To those with the least first. A second unit is given only while there are enough for all, so that none waits behind a
        busy actor when another has nothing to do."""
        while self.waiting:
            hand = min(self.hands, key=lambda hand: len(hand.attempts))
            held = len(hand.attempts)
            if held >= IN_FLIGHT or (held > 0 and len(self.waiting) <= self.workers):
                return
            unit = self.waiting.popleft()
            stream = hand.actor.work.options(num_returns="streaming").remote(unit)
            hand.attempts.append(_Attempt(unit, hand, stream))

    def _next_event(self, attempt: _Attempt) -> tuple[str, Any]:
        errors = self.ray.exceptions
        try:
            return self.ray.get(next(attempt.stream))
        except errors.RayTaskError:
            raise  # a bug, with the traceback of the other side
        except errors.RayError as error:
            return "death", error
        except StopIteration:
            return "death", "its stream ended before its result"

    def _bury(self, attempt: _Attempt, cause: str, report: Report) -> None:
        """Puts another in the actor's place and the unit back to the front. Guilty is the unit that the actor was at."""
        hand, name = attempt.hand, attempt.unit.name
        guilty = not hand.blamed and (attempt.begun or hand.attempts[0] is attempt)
        hand.blamed = hand.blamed or guilty
        hand.attempts.remove(attempt)
        if not hand.dead:
            hand.dead = True
            self.mourned.append(hand)
            self.ray.kill(hand.actor, no_restart=True)  # one that is only out of reach would go on
            self.hands[self.hands.index(hand)] = self._start()
        if guilty:
            self.deaths[name] = self.deaths.get(name, 0) + 1
            if self.deaths[name] >= ATTEMPTS:
                raise DistftError(
                    f"Unit {name} was given up: {ATTEMPTS} workers died over it. The last one: {_short(cause)}", where=f"unit {name}",
                    help="Most often memory runs out: take smaller batches, or fewer workers. What was done so far is kept.",
                )  # fmt: skip
            say(f"a worker died over unit {name}, which another takes up: {_short(cause)}")
        self.waiting.appendleft(attempt.unit)
        report(-attempt.amount, self._note())
        self._hand_out()

    def _note(self) -> str:
        rates = sorted(hand.rate for hand in self.hands if hand.amount > 0)
        if len(rates) < 2:
            return f"{len(rates)} of {self.workers} workers"
        return f"{len(rates)} of {self.workers} workers, {rates[0]:,.0f} to {rates[-1]:,.0f}/s each"

    def _say_what_is_awaited(self) -> None:
        wanted = f"{self.workers} workers with a CPU" + (f" and {self.gpus} GPU" if self.gpus else "") + " each"
        free = {key: value for key, value in self.ray.available_resources().items() if key in ("CPU", "GPU")}
        say(f"waiting for the cluster to start {wanted}; free are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs")


def _short(cause: str) -> str:
    """The first and the telling line of what Ray says of a death."""
    lines = [line.strip() for line in cause.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("The actor is dead", "The actor died because"))]
    return (telling or lines or ["unknown"])[0].partition(" Some common causes")[0][:300]


@contextmanager
def open_pool(
    make_worker: Callable[[], Worker[Unit, Result]], *, address: str = "local", workers: int | None, gpus: int = 0
) -> Iterator[Pool[Unit, Result]]:
    """Actors on an embedded Ray with `gpus` GPUs (`local`), or on the cluster at an address. Each has a CPU, and a GPU where the
    cluster has any; `workers` None is one per GPU. At the end of the block, however it is left, no actor stays."""
    with ray_session(address, cpus=workers or 1, gpus=gpus) as ray:
        found = int(ray.cluster_resources().get("GPU", 0))
        if not found and address != "local":
            say("the cluster has no GPU: its CPUs do the work")
        pool = Pool(ray, make_worker, workers=workers or max(1, found), gpus_per_worker=min(1, found))
        try:
            yield pool
        finally:
            pool.close()


def map_units(
    make_worker: Callable[[], Worker[Unit, Result]],
    units: Iterable[Unit],
    report: Report,
    *,
    address: str = "local",
    workers: int | None,
    gpus: int = 0,
) -> Generator[Result, None, None]:
    """`Pool.map` with a pool of its own."""
    with open_pool(make_worker, address=address, workers=workers, gpus=gpus) as pool:
        yield from pool.map(units, report)
