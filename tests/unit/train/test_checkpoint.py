"""One process writes a run's checkpoints."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.engine import choose
from distft.engine.local import LocalEngine
from distft.errors import ConfigError, StaleArtifactError
from distft.train import owner
from distft.train.checkpoint import Checkpoints
from distft.train.loop import _step_seed
from distft.train.record import read_metrics
from tests.helpers.stores import Lab, lab, random_documents


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    return lab(tmp_path, documents=random_documents(20), objective={"kind": "sft"})


def facts(step: int) -> dict[str, object]:
    return {"loss": 1.0, "drift": None, "total_steps": step}


def keep(checkpoints: Checkpoints, step: int, engine: LocalEngine) -> None:
    checkpoints.save(step, engine, facts(step))
    checkpoints.finish()


def test_who_is_thought_dead_stops_at_its_next_save(made: Lab) -> None:
    engine, first, second = made.engine(), made.checkpoints(), made.checkpoints()
    first.owner.claim()
    keep(first, 1, engine)
    second.owner.claim()
    with pytest.raises(StaleArtifactError, match=r"Process [0-9]+ on .* has taken this run over"):
        keep(first, 2, engine)
    assert first.steps() == [1]
    keep(second, 2, engine)
    assert second.steps() == [1, 2]


def test_without_a_claim_a_step_is_committed_once(made: Lab) -> None:
    engine, first, second = made.engine(), made.checkpoints(), made.checkpoints()
    keep(first, 1, engine)
    folder = first.folder.child("step-00000001")
    before = folder.names(recursive=True)
    with pytest.raises(StaleArtifactError, match="Step 1 was committed by another process"):
        keep(second, 1, engine)
    assert folder.names(recursive=True) == before


def test_a_takeover_while_a_checkpoint_is_written(made: Lab) -> None:
    """The former owner commits what it was writing, removes nothing (the newcomer may be reading it) and stops. The newcomer
    finds its own step committed already, by the same bytes, and goes on."""
    engine, first, second = made.engine(), made.checkpoints(), made.checkpoints()
    first.keep = 1
    first.owner.claim()
    keep(first, 1, engine)
    plain = engine.slices

    def slices() -> Any:
        yield from plain()
        second.owner.claim()

    engine.slices = slices
    with pytest.raises(StaleArtifactError, match="taken this run over"):
        keep(first, 2, engine)
    engine.slices = plain
    assert first.steps() == [1, 2]
    names = first.folder.child("step-00000002").names(recursive=True)
    keep(second, 2, engine)
    assert second.folder.child("step-00000002").names(recursive=True) == names


def test_the_log_of_a_former_owner_does_not_replace_the_new_ones(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the run over in the middle, finishes it, and only then does the first come to its checkpoint."""
    made = made.changed(train={"checkpoint": {"every_steps": 2, "keep": 9}})
    plain, taken = LocalEngine.train_step, []

    def train_step(self: LocalEngine, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == 4:
            made.train()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LocalEngine, "train_step", train_step)
    with pytest.raises(StaleArtifactError, match="taken this run over"):
        made.train()
    lines = [line["step"] for line in read_metrics(made.run_folder)]
    assert lines[: made.checkpoints().steps()[-1]] == list(range(1, made.checkpoints().steps()[-1] + 1))


def test_a_process_that_cannot_start_stops_nobody(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, first = made.engine(), made.checkpoints()
    first.owner.claim()

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(choose, "load_model", full)
    with pytest.raises(torch.OutOfMemoryError):
        made.train()
    keep(first, 1, engine)


def test_a_run_that_is_being_trained_here_is_not_taken_over(made: Lab) -> None:
    """The same command typed twice. A number that another process has by now is not the owner, nor is one of another machine."""
    folder = made.checkpoints().folder
    alive = {"claim": "x", "host": socket.gethostname(), "process": os.getppid(), "started": owner._started(os.getppid())}
    folder.replace("OWNER.json", json.dumps(alive).encode())
    with pytest.raises(StaleArtifactError, match=f"Process {os.getppid()} on this machine is training this run"):
        made.train()
    for other in ({**alive, "started": "earlier"}, {**alive, "host": "elsewhere"}, {}, []):
        folder.replace("OWNER.json", json.dumps(other).encode())
        made.checkpoints().owner.claim()
    folder.replace("OWNER.json", b"nonsense")
    made.checkpoints().owner.claim()


def test_training_claims_its_run(made: Lab) -> None:
    made.train()
    told = json.loads(made.run_folder.child("checkpoints").read("OWNER.json"))
    assert told.keys() == {"claim", "host", "process", "started"}


def test_a_warmup_longer_than_the_run_is_refused(made: Lab) -> None:
    with pytest.raises(ConfigError, match=r"train.warmup_steps=99, and the run has \d+ steps"):
        made.changed(train={"warmup_steps": 99}).train()
    assert not made.run_folder.names(recursive=True), "a config that was refused stands beside no run"


def test_seeds_of_steps() -> None:
    seeds = {_step_seed(seed, step, rank) for seed in (0, 1, 2**32 - 1) for step in (1, 2, 10**9) for rank in (0, 1, 4095)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)
