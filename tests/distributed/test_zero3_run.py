"""`distft train` under torchrun with ZeRO-3: killed in the middle, the same command ends with the weights of a run that was not."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.helpers.launched import finish, kill, torchrun
from tests.helpers.runs import Bench

SETTINGS = ("train.engine=zero3", "train.epochs=6", "train.checkpoint.every_steps=4", "train.drift_every_steps=null")


def checkpoints(bench: Bench, name: str) -> list[dict[str, Any]]:
    folder = bench.store / "runs" / name / "checkpoints"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("step-*/MANIFEST.json"))]


def last_bytes(bench: Bench, name: str) -> tuple[int, dict[int, str]]:
    """Step and digests of the newest checkpoint."""
    newest = checkpoints(bench, name)[-1]
    return newest["identity"]["step"], {file["facts"]["rank"]: file["sha256"] for file in newest["files"]}


def test_killed_and_run_again_it_ends_with_the_same_weights(bench: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")
    killed = torchrun(bench, 2, *SETTINGS, "name=killed")
    until = time.monotonic() + 120
    while not checkpoints(bench, "killed"):
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.005)
    kill(killed)
    whole = finish(torchrun(bench, 2, *SETTINGS, "name=whole"))
    again = finish(torchrun(bench, 2, *SETTINGS, "name=killed"))
    assert whole.json["resumed_from"] is None
    assert 4 <= again.json["resumed_from"] < whole.json["steps"] == again.json["steps"]
    assert last_bytes(bench, "killed") == last_bytes(bench, "whole")
    assert again.json["loss"] == whole.json["loss"]
    assert again.json["drift"] == whole.json["drift"]
    assert again.err.count("train killed: 36 of 36 steps") == 1
    assert "deepspeed" not in again.err.lower(), "its chatter reaches nobody"
    bench.run("export", *SETTINGS, "name=killed")

    # Two ranks' checkpoint is one rank's, and plain torch's: the same command goes on from it.
    (bench.store / "runs" / "killed" / "checkpoints" / "step-00000036" / "MANIFEST.json").unlink()
    alone = bench.run("train", *SETTINGS, "name=killed", "train.engine=local").json
    assert alone["resumed_from"] == 32
    assert abs(alone["loss"] / whole.json["loss"] - 1) < 1e-5
