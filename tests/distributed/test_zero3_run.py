"""`distft train` under torchrun with ZeRO-3: killed in the middle, the same command ends with the weights of a run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.helpers.runs import Bench, Done

SETTINGS = ("train.engine=zero3", "train.epochs=6", "train.checkpoint.every_steps=4", "train.drift_every_steps=null")


def start(bench: Bench, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "distft", "train", str(bench.file), *SETTINGS, *overrides, "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> Done:
    try:
        out, err = process.communicate(timeout=200)
    finally:
        kill(process)
    assert process.returncode == 0, err
    return Done(process.returncode, out, err)


def kill(process: subprocess.Popen[str]) -> None:
    """With all of its ranks: each is in a session of the launcher's own, or dies when that is gone."""
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:
            continue  # it has ended
    return [*found, *(grandchild for child in found for grandchild in children(child))]


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
    killed = start(bench, 2, "name=killed")
    until = time.monotonic() + 120
    while not checkpoints(bench, "killed"):
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.005)
    kill(killed)
    whole = finish(start(bench, 2, "name=whole"))
    again = finish(start(bench, 2, "name=killed"))
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
