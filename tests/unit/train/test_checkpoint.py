"""One process writes a run's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.errors import ConfigError, StaleArtifactError
from distft.train.loop import _step_seed
from tests.helpers.stores import Lab, lab, random_documents


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    return lab(tmp_path, documents=random_documents(20), objective={"kind": "sft"})


def facts(step: int) -> dict[str, object]:
    return {"loss": 1.0, "drift": None, "total_steps": step}


def test_who_is_thought_dead_stops_at_its_next_save(made: Lab) -> None:
    engine, first, second = made.engine(), made.checkpoints(), made.checkpoints()
    first.claim()
    first.save(1, engine, facts(1))
    second.claim()
    with pytest.raises(StaleArtifactError, match=r"process [0-9]+ on .* has taken it over"):
        first.save(2, engine, facts(2))
    assert first.steps() == [1]
    second.save(2, engine, facts(2))
    assert second.steps() == [1, 2]


def test_of_two_that_commit_one_step_the_second_stops_and_leaves_nothing(made: Lab) -> None:
    engine, first, second = made.engine(), made.checkpoints(), made.checkpoints()
    first.save(1, engine, facts(1))
    folder = first.folder.child("step-00000001")
    before = folder.names(recursive=True)
    with pytest.raises(StaleArtifactError, match="step 1 was committed by another process"):
        second.save(1, engine, facts(1))
    assert folder.names(recursive=True) == before


def test_a_takeover_while_a_checkpoint_is_written_removes_nothing(made: Lab) -> None:
    """The newcomer may be reading the older ones at that moment."""
    engine, first, second = made.engine(), made.checkpoints(), made.checkpoints()
    first.keep = 1
    first.claim()
    first.save(1, engine, facts(1))
    plain = engine.tensors

    def tensors() -> Any:
        yield from plain()
        second.claim()

    engine.tensors = tensors
    with pytest.raises(StaleArtifactError, match="taken it over"):
        first.save(2, engine, facts(2))
    assert first.steps() == [1, 2]


def test_training_claims_its_run(made: Lab) -> None:
    made.train()
    owner = json.loads(made.run_folder.child("checkpoints").read("OWNER.json"))
    assert owner.keys() == {"claim", "host", "process"}


def test_a_warmup_longer_than_the_run_is_refused(made: Lab) -> None:
    with pytest.raises(ConfigError, match=r"train.warmup_steps=99, and the run has \d+ steps"):
        made.changed(train={"warmup_steps": 99}).train()
    assert not made.run_folder.child("checkpoints").names()


def test_seeds_of_steps() -> None:
    seeds = {_step_seed(seed, step, rank) for seed in (0, 1, 2**32 - 1) for step in (1, 2, 10**9) for rank in (0, 1, 4095)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)
