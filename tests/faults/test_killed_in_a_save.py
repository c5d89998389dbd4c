"""Killed at every boundary of a checkpoint's saving: what is committed is whole, and the same command ends with the same weights."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distft.store.location import open_location
from distft.store.manifest import read_manifest, verify_files
from tests.helpers.runs import Bench

OFTEN = ("train.epochs=3", "train.checkpoint.every_steps=2", "train.checkpoint.keep=2", "train.drift_every_steps=null")
LAST = 18


class Boundary(NamedTuple):
    """A function of the save, where it is looked up, and on which side of its nth call the process ends."""

    home: str
    name: str
    side: Literal["before", "behind"]
    nth: int = 1
    keeps: bool = False
    """Whether a checkpoint was committed in the same start."""


BOUNDARIES = {
    "the copy is made": Boundary("distft.train.rank_files:Memory", "copy", "behind"),
    "half of the file is written": Boundary("distft.train.rank_files", "_write", "behind"),
    "the file is there": Boundary("distft.train.checkpoint", "put_rank_file", "behind"),
    "all but the manifest is there": Boundary("distft.train.checkpoint", "commit", "before"),
    "the manifest is there": Boundary("distft.train.checkpoint", "commit", "behind", keeps=True),
    "an old one is to go": Boundary("distft.train.checkpoint", "_remove", "before", keeps=True),
    "an old one is gone": Boundary("distft.train.checkpoint", "_remove", "behind", keeps=True),
    "the next is begun": Boundary("distft.train.rank_files:Memory", "copy", "behind", nth=2, keeps=True),
}


def die_at(which: str) -> None:
    """Ends this process there, with no word to anybody."""
    found = BOUNDARIES[which]
    module, _, owner = found.home.partition(":")
    home: Any = importlib.import_module(module)
    home = getattr(home, owner) if owner else home
    real: Callable[..., Any] = getattr(home, found.name)
    calls = 0

    @wraps(real)
    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == found.nth and found.side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == found.nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(home, found.name, dying)


def committed(folder: Path) -> list[int]:
    """Steps of checkpoints, each of which is looked through, byte by byte."""
    steps = []
    for path in sorted(folder.glob("step-*/MANIFEST.json")):
        where = open_location(str(path.parent))
        manifest = read_manifest(where)
        assert manifest is not None
        verify_files(where, manifest)
        steps.append(manifest.identity["step"])
    return steps


def outcome(bench: Bench, name: str) -> tuple[list[str], list[float]]:
    """Digests of the last checkpoint's files, and all losses."""
    run = bench.store / "runs" / name
    manifest = json.loads((run / f"checkpoints/step-{LAST:08d}/MANIFEST.json").read_text())
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [file["sha256"] for file in manifest["files"]], losses


def test_killed_at_every_boundary_of_a_save(bench: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")
    bench.run("train", *OFTEN, "name=whole")
    folder = bench.store / "runs" / "killed" / "checkpoints"
    for which, boundary in BOUNDARIES.items():
        before = committed(folder)
        done = bench.start("train", *OFTEN, "name=killed", hook=die_at, given=(which,)).wait()
        assert done.status == -signal.SIGKILL, f"{which}: {done.err}"
        after = committed(folder)
        newest = [max(steps, default=0) for steps in (before, after)]
        assert newest[1] > newest[0] if boundary.keeps else newest[1] == newest[0], which
    last = committed(folder)[-1]
    assert 0 < last < LAST
    assert bench.run("train", *OFTEN, "name=killed").json["resumed_from"] == last
    assert outcome(bench, "killed") == outcome(bench, "whole")
    left = [path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("OWNER")]
    assert len([name for name in left if name == "MANIFEST.json"]) == 2
