"""The command line under torchrun: one voice, one answer, and no verb done twice side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.runs import Bench, Done


def launched(bench: Bench, verb: str, ranks: int, *overrides: str) -> Done:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "distft", verb, str(bench.file), *overrides, "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def test_torchrun_trains_and_one_rank_speaks(bench: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")
    done = launched(bench, "train", 2)
    assert done.status == 0, done.err
    assert done.json["steps"] == 12
    assert done.err.count("train first: 12 of 12 steps") == 1
    owner = json.loads((bench.store / "runs" / "first" / "checkpoints" / "OWNER.json").read_text())
    assert owner.keys() == {"claim", "host", "process", "started"}
    bench.run("export")


def test_other_verbs_are_refused_in_a_launched_group(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    bench.refused("tokenize", status=2, says="2 ranks were launched")
    monkeypatch.setenv("RANK", "1")
    done = bench.run("run", status=2)
    assert done.out == "", "a rank that does not lead answers nothing"
    assert done.err.startswith("[rank 1] error:")


def test_half_a_launch_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run("tokenize")
    bench.run("score")
    monkeypatch.setenv("WORLD_SIZE", "2")
    bench.refused("train", status=2, says="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    assert "RANK=2 of WORLD_SIZE=2 is no rank" in bench.run("train", status=2).err
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "two")
    bench.refused("train", status=2, says="WORLD_SIZE='two' is no number")
