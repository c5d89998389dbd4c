"""Units of work over Ray actors: each actor builds its worker once and keeps it, units go to whoever is free, results come back as
they are done.

A worker is a callable from a unit to a generator that yields amounts of work as they are done, and returns the result. The same
callable serves in process, where a caller just runs the generator. What an actor does is told in a stream per unit, in order: amounts,
then the result or a DistftError.

A hand is one actor, or a group of them on one machine that do each unit together, as ranks of a process group: all run the same
worker on the same unit, and what the leading one tells counts.

A hand that dies (an actor of it killed, out of memory, its machine gone) gives its units back and another takes its place; the unit
that it was at may be tried so often, and no more. A unit may therefore be worked on twice, even at once: its effect must be the same
as of once.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar
from uuid import uuid4

from distft.cluster.session import ray_session
from distft.errors import DistftError, UserInputError
from distft.progress import say

ATTEMPTS = 3
"""How many actors may die over one unit before it is given up."""
IN_FLIGHT = 2
"""Units that an actor has: one that it is at, and one that it goes on with at once."""
ECHO_SECONDS = 10.0
"""How long it may take until Ray knows of a death that another actor of the group has noticed."""
QUIET_SECONDS = 30.0
"""After so long without an event while some actors have not started, a person is told what is being waited for."""


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

    def __init__(self, make_worker: Callable[[], Worker[Unit, Result]], environment: dict[str, str]) -> None:
        os.environ.update(environment)
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
    """An actor, or a group of them, as its driver sees it."""

    actors: list[Any]
    """By rank."""
    place: Any
    """What Ray keeps free for a group on one machine; None for a single actor."""
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
    """A unit in a hand."""

    unit: Any
    hand: _Hand
    streams: list[Any]
    """What each actor tells, the leading one first."""
    begun: bool = False
    amount: float = 0.0


class Pool(Generic[Unit, Result]):
    """Actors, for as long as their block lasts."""

    def __init__(
        self, ray: Any, make_worker: Callable[[], Worker[Unit, Result]], *, workers: int, gpus_per_actor: int, group: int = 1
    ) -> None:
        self.ray, self.workers, self.gpus, self.group = ray, workers, gpus_per_actor, group
        # Restarts are ours to do: Ray's would not count them by unit.
        self.remote = ray.remote(num_cpus=1, num_gpus=gpus_per_actor, max_restarts=0, max_task_retries=0)(_Actor)
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
            ready, _ = self.ray.wait([stream for one in attempts for stream in one.streams], timeout=QUIET_SECONDS)
            if not ready and not told and not all(hand.lives for hand in self.hands):
                told = True
                self._say_what_is_awaited()
            for stream in ready:
                attempt = next(one for one in attempts if any(stream is each for each in one.streams))
                leads = stream is attempt.streams[0]
                kind, value = self._next_event(stream, attempt.hand)
                if kind == "result" and not leads:
                    attempt.streams = [each for each in attempt.streams if each is not stream]
                elif kind == "result":
                    attempt.hand.attempts.remove(attempt)
                    self._hand_out()
                    self._relieve()
                    yield value
                elif kind == "error":
                    raise value
                elif kind == "death":
                    self._bury(attempt, str(value), report)
                elif leads:
                    attempt.begun = attempt.hand.lives = True
                    if kind == "ready" and attempt.hand.since is None:
                        attempt.hand.since = time.monotonic()
                    attempt.amount += value
                    attempt.hand.amount += value
                    report(value, self._note())

    def close(self) -> None:
        for hand in self.hands:
            self._end(hand)

    def _start(self) -> _Hand:
        if self.group == 1:
            spread = self.remote.options(scheduling_strategy="SPREAD")
            return _Hand([spread.remote(self.make_worker, {})], None)
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": 1, **({"GPU": self.gpus} if self.gpus else {})}
        place = self.ray.util.placement_group([bundle] * self.group, strategy="STRICT_PACK")
        meeting = f"/tmp/distft-group-{uuid4().hex}"  # one machine, so one file system
        actors = []
        for rank in range(self.group):
            strategy = PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank)
            # Ray shows each actor its own GPU alone, which is number 0 there.
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(self.group), "LOCAL_RANK": "0", "DISTFT_MEETING": meeting,
                "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",  # they share a machine, and nobody else need reach them
            }  # fmt: skip
            actors.append(self.remote.options(scheduling_strategy=strategy).remote(self.make_worker, environment))
        return _Hand(actors, place)

    def _end(self, hand: _Hand) -> None:
        for actor in hand.actors:
            self.ray.kill(actor, no_restart=True)
        if hand.place is not None:
            self.ray.util.remove_placement_group(hand.place)

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
            streams = [actor.work.options(num_returns="streaming").remote(unit) for actor in hand.actors]
            hand.attempts.append(_Attempt(unit, hand, streams))

    def _relieve(self) -> None:
        """A hand with nothing left to do takes the place of one that has not started: its machine may come in an hour, or never,
        when another job on the cluster waits in the same way."""
        if self.waiting or not any(hand.lives and not hand.attempts for hand in self.hands):
            return
        late = next((hand for hand in self.hands if not hand.lives and hand.attempts), None)
        if late is None:
            return
        self.waiting.extend(attempt.unit for attempt in late.attempts)
        late.attempts.clear()
        self._end(late)
        self.hands.remove(late)
        self._hand_out()

    def _next_event(self, stream: Any, hand: _Hand) -> tuple[str, Any]:
        errors = self.ray.exceptions
        try:
            return self.ray.get(next(stream))
        except errors.RayTaskError:
            death = self._death_in(hand)
            if death is None:
                raise  # a bug, with the traceback of the other side
            return "death", death
        except errors.RayError as error:
            return "death", error
        except StopIteration:
            return "death", "its stream ended before its result"

    def _death_in(self, hand: _Hand) -> Exception | None:
        """Whether one of a group has died, and with it what another of them was waiting for: that one may be heard first."""
        if len(hand.actors) == 1:
            return None
        answers = [actor.__ray_ready__.remote() for actor in hand.actors]
        for answer in self.ray.wait(answers, num_returns=len(answers), timeout=ECHO_SECONDS)[0]:
            try:
                self.ray.get(answer)
            except self.ray.exceptions.RayError as error:
                return error
        return None

    def _bury(self, attempt: _Attempt, cause: str, report: Report) -> None:
        """Puts another in the actor's place and the unit back to the front. Guilty is the unit that the actor was at."""
        hand, name = attempt.hand, attempt.unit.name
        guilty = not hand.blamed and (attempt.begun or hand.attempts[0] is attempt)
        hand.blamed = hand.blamed or guilty
        hand.attempts.remove(attempt)
        if not hand.dead:
            hand.dead = True
            self.mourned.append(hand)
            self._end(hand)  # an actor that is only out of reach, or waits for another of its group, would go on
            self.hands[self.hands.index(hand)] = self._start()
        if guilty:
            self.deaths[name] = self.deaths.get(name, 0) + 1
            if self.deaths[name] >= ATTEMPTS:
                raise DistftError(
                    f"Unit {name} was given up: {ATTEMPTS} workers died over it. The last one: {short(cause)}", where=f"unit {name}",
                    help="Most often memory runs out: take smaller batches, or fewer workers. What was done so far is kept.",
                )  # fmt: skip
            say(f"a worker died over unit {name}, which another takes up: {short(cause)}")
        self.waiting.appendleft(attempt.unit)
        report(-attempt.amount, self._note())
        self._hand_out()

    def _note(self) -> str:
        rates = sorted(hand.rate for hand in self.hands if hand.amount > 0)
        if len(rates) < 2:
            return f"{len(rates)} of {self.workers} workers"
        return f"{len(rates)} of {self.workers} workers, {rates[0]:,.0f} to {rates[-1]:,.0f}/s each"

    def _say_what_is_awaited(self) -> None:
        each = f"{self.group} CPUs" + (f" and {self.group} GPUs" if self.gpus else "") + " of one machine"
        if self.group == 1:
            each = "a CPU" + (f" and {self.gpus} GPU" if self.gpus else "")
        wanted = f"{self.workers} workers with {each} each"
        free = {key: value for key, value in self.ray.available_resources().items() if key in ("CPU", "GPU")}
        say(f"waiting for the cluster to start {wanted}; free are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs")


def short(cause: str) -> str:
    """The first and the telling line of what Ray says of a death."""
    lines = [line.strip() for line in cause.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("The actor is dead", "The actor died because"))]
    return (telling or lines or ["unknown"])[0].partition(" Some common causes")[0][:300]


@contextmanager
def open_pool(
    make_worker: Callable[[], Worker[Unit, Result]], *, address: str = "local", workers: int | None, gpus: int = 0, group: int = 1
) -> Iterator[Pool[Unit, Result]]:
    """Workers on an embedded Ray with `gpus` GPUs (`local`), or on the cluster at an address. A worker is a group of actors, each
    with a CPU, and with a GPU where the cluster has any; `workers` None is as many as the GPUs suffice for. At the end of the block,
    however it is left, no actor stays.

    In a group, RANK and WORLD_SIZE tell each actor its place, and DISTFT_MEETING a file at which the ranks can meet."""
    with ray_session(address, cpus=(workers or 1) * group, gpus=gpus) as ray:
        found = int(ray.cluster_resources().get("GPU", 0))
        if not found and address != "local" and workers is None:
            raise UserInputError(
                "The cluster has no GPU, or none yet.", where=f"cluster.address={address}",
                help="Give score.workers a number to score on its CPUs; else start nodes with GPUs, and run the command again.",
            )  # fmt: skip
        if not found and address != "local":
            say("the cluster has no GPU: its CPUs do the work")
        largest = max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
        if found and largest < group:
            say(f"a teacher over {group} GPUs needs them in one machine, and none of the cluster has more than {largest} so far")
        pool = Pool(ray, make_worker, workers=workers or max(1, found // group), gpus_per_actor=min(1, found), group=group)
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
    group: int = 1,
) -> Generator[Result, None, None]:
    """`Pool.map` with a pool of its own."""
    with open_pool(make_worker, address=address, workers=workers, gpus=gpus, group=group) as pool:
        yield from pool.map(units, report)
