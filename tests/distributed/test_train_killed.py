"""`distft train`, shot two hundred times at random: whoever dies and whenever, the same command ends with the same bytes.

./launch/test.sh -m slow tests/distributed/test_train_killed.py
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from distft.store.location import open_location
from distft.store.manifest import read_manifest, verify_files
from tests.helpers.actors import await_end, descendants, shoot, title
from tests.helpers.launched import end, plain, torchrun
from tests.helpers.runs import Bench

OFTEN = ("train.epochs=8", "train.checkpoint.every_steps=2", "train.checkpoint.keep=2", "train.drift_every_steps=null")
LAST = 48
AGENTS = b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"
"""Of a Ray whose driver was shot: they hold nothing, and wait a minute for its return."""


@dataclass(frozen=True)
class Way:
    """How training is started, who can be shot, and how often that is done."""

    start: Callable[..., Any]
    settings: tuple[str, ...]
    ranks: Callable[[int], list[int]]
    """The ranks below a process."""
    shots: int
    targets: tuple[str, ...] = ("a rank", "the driver", "all")


def launched(pid: int) -> list[int]:
    return [child for child in sorted(descendants(pid)) if b"distft" in title(child)]


def by_ray(pid: int) -> list[int]:
    return [child for child in sorted(descendants(pid)) if b"TrainWorker" in title(child)]


def two(bench: Bench, *overrides: str) -> Any:
    return torchrun(bench, 2, *overrides)


WAYS = {
    "alone": Way(plain, ("train.engine=local",), launched, shots=120, targets=("the driver",)),
    "torchrun": Way(two, ("train.engine=zero3",), launched, shots=50),
    "Ray": Way(plain, ("train.engine=local", "train.workers=2", "train.restarts=9"), by_ray, shots=30),
}


@dataclass
class Score:
    shots: int = 0
    finished: int = 0
    by_target: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def scored(bench: Bench) -> Bench:
    bench.run("tokenize")
    bench.run("score")
    return bench


def outcome(bench: Bench, name: str) -> tuple[list[str], list[float]]:
    """Digests of the last checkpoint's files, which are looked through, and all losses."""
    run = bench.store / "runs" / name
    where = open_location(str(run / f"checkpoints/step-{LAST:08d}"))
    manifest = read_manifest(where)
    assert manifest is not None
    verify_files(where, manifest)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [file.sha256 for file in manifest.files], losses


def kept(bench: Bench, name: str) -> int:
    """The newest step with a checkpoint."""
    steps = (bench.store / "runs" / name).glob("checkpoints/step-*/MANIFEST.json")
    return max((int(path.parent.name[5:]) for path in steps), default=0)


def fire(way: Way, target: str, pid: int, source: random.Random) -> bool:
    """Whether there was somebody to shoot at. What a shot driver leaves behind ends by itself."""
    below, ranks = descendants(pid), way.ranks(pid)
    if target == "a rank":
        if ranks:
            shoot({source.choice(ranks)})
        return bool(ranks)
    shoot({pid} | (below if target == "all" else set()))
    agents = {one for one in below if title(one).startswith(AGENTS)}
    left = await_end(below - agents, 60)
    shoot(left | agents)
    assert not left, "what a shot driver had started outlived it"
    return True


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", WAYS)
def test_shot_at_random_times(scored: Bench, name: str) -> None:
    way, source, score = WAYS[name], random.Random(name), Score()
    began = time.monotonic()
    done = end(way.start(scored, *OFTEN, *way.settings, "name=whole"), 600)
    whole = time.monotonic() - began
    assert done.status == 0, done.err
    expected = outcome(scored, "whole")
    while score.shots < way.shots:
        run = f"shot-{score.finished}"
        process = way.start(scored, *OFTEN, *way.settings, f"name={run}")
        # Half of the shots fall where checkpoints are written, the others anywhere, from before the start until after the end.
        if source.random() < 0.5:
            before, until = kept(scored, run), time.monotonic() + whole
            while kept(scored, run) <= before and process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(source.uniform(0, 0.3))
        else:
            time.sleep(source.uniform(0, 1.05 * whole))
        target = source.choice(way.targets)
        if process.poll() is None and fire(way, target, process.pid, source):
            score.shots += 1
            score.by_target[target] = score.by_target.get(target, 0) + 1
        done = end(process, 600)
        assert done.status in (0, 1, -signal.SIGKILL), done.err
        assert "Traceback" not in done.out
        if done.status == 0:
            assert outcome(scored, run) == expected
            score.finished += 1
    done = end(way.start(scored, *OFTEN, *way.settings, f"name=shot-{score.finished}"), 600)
    assert done.status == 0, done.err
    assert outcome(scored, f"shot-{score.finished}") == expected
    assert set(score.by_target) == set(way.targets)
    sys.stdout.write(f"{name}: {score.by_target} shots; {score.finished + 1} runs came to their end, all with the same bytes\n")
