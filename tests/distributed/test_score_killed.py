"""`distft score` with two actors on an embedded Ray, shot at random: the same command finishes, and the cache is the same."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Literal

import pytest

from distft.store.location import Location, open_location
from tests.helpers.actors import actors_of, await_end, descendants, shoot, title
from tests.helpers.caches import only_cache
from tests.helpers.cluster import Cluster
from tests.helpers.contents import Contents, contents, nothing_left_over
from tests.helpers.runs import Bench, Running

Target = Literal["one actor", "the driver", "the driver and its Ray"]
TARGETS: tuple[Target, ...] = ("one actor", "the driver", "the driver and its Ray")
ROWS = 500
SLOWLY = "score.tokens_per_batch=64"
TWO = "score.workers=2"


@pytest.fixture
def work(bench: Bench) -> Bench:
    """A bench whose scoring takes seconds, with a corpus."""
    said = [(f"Count from {n} to {n + 3}.", f"It is {n}, {n + 1}, {n + 2}, {n + 3}, and that is all of it.") for n in range(ROWS)]
    roles = "user", "assistant"
    bench.write_rows([{"messages": [{"role": r, "content": c} for r, c in zip(roles, turn, strict=True)]} for turn in said])
    bench.run("tokenize")
    return bench


@pytest.fixture
def expected(work: Bench) -> Contents:
    """What one process makes of it."""
    elsewhere = f"store={work.folder / 'undisturbed'}"
    work.run("tokenize", elsewhere)
    assert work.run("score", elsewhere, SLOWLY).json["documents_scored"] > ROWS
    return read(work, work.folder / "undisturbed")


def read(bench: Bench, store: Path) -> Contents:
    return contents(only_cache(open_location(str(store))), bench.folder / "read")


def parts(bench: Bench) -> int:
    return len(list(bench.store.glob("teacher/*/parts/*.json")))


def pid_of(process: Running) -> int:
    assert process.process.pid is not None
    return process.process.pid


AGENTS = b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"
"""Processes of a Ray that wait for its restart for a while after all others have ended. They hold no work."""


def fire(process: Running, target: Target, source: random.Random) -> bool:
    """Whether there was something to shoot at. What a shot driver leaves of its Ray ends by itself, and at once."""
    driver = pid_of(process)
    if target == "one actor":
        actors = actors_of(driver)
        shoot({source.choice(actors)} if actors else set())
        return bool(actors)
    below = descendants(driver)
    agents = {pid for pid in below if title(pid).startswith(AGENTS)}
    shoot({driver} | (below if target == "the driver and its Ray" else set()))
    left = await_end(below - agents, 20)
    shoot(left | agents)
    assert not left, "an embedded Ray outlived its driver"
    return True


def await_parts(process: Running, bench: Bench, count: int) -> None:
    until = time.monotonic() + 120
    while parts(bench) < count:
        assert process.process.exitcode is None, process.err.read_text()
        assert time.monotonic() < until, process.err.read_text()
        time.sleep(0.01)


def check(bench: Bench, expected: Contents) -> None:
    """All documents, each once, with what the teacher thinks of them."""
    found = read(bench, bench.store)
    assert found == expected
    assert set(found.documents.values()) == {1}
    cache: Location = only_cache(open_location(str(bench.store)))
    assert nothing_left_over(cache)


def test_killed_while_it_scores(work: Bench, expected: Contents) -> None:
    """One build, shot three times; the last time an actor, which stops nothing."""
    source = random.Random(0)
    for target in reversed(TARGETS):
        process = work.start("score", TWO, SLOWLY)
        await_parts(process, work, parts(work) + source.randint(1, 3))
        time.sleep(source.uniform(0, 0.2))
        assert fire(process, target, source)
        done = process.wait()
        assert done.status == (0 if target == "one actor" else -signal.SIGKILL), done.err
        assert ("a worker died over unit" in done.err) == (target == "one actor")
    check(work, expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_times(cluster: Cluster, work: Bench, expected: Contents) -> None:
    """From before Ray starts until after the end; each time the same command, which finishes, and a fresh cache for the next."""
    source, hits = random.Random(1), 0
    began = time.monotonic()
    assert work.start("score", TWO, SLOWLY).wait().status == 0
    whole = time.monotonic() - began
    check(work, expected)
    for shot in range(20):
        work.store.joinpath("teacher").rename(work.folder / f"teacher-{shot}")
        target = source.choice(TARGETS)
        process = work.start("score", TWO, SLOWLY)
        time.sleep(source.uniform(0, 1.1 * whole))
        hits += process.process.exitcode is None and fire(process, target, source)
        done = process.wait()
        assert done.status in ((0,) if target == "one actor" else (0, -signal.SIGKILL)), done.err
        work.run("score", TWO, SLOWLY)
        check(work, expected)
    assert hits > 5
