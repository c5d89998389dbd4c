"""What a scorer says when it fails, and what a measurement of it says of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distft.engine.world import World
from distft.errors import ConfigError, DistftError
from distft.teacher import calibrate as calibration
from distft.teacher.calibrate import calibrate, scorers
from distft.teacher.identity import teacher_folder
from distft.teacher.scorer import Scorer
from tests.helpers.stores import Lab, lab, random_documents


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    return lab(tmp_path, documents=random_documents(4, seed=97))


def scorer_of(made: Lab) -> Scorer:
    return Scorer(made.run, made.corpus, made.model, teacher_folder(made.store, made.identity()))


def test_weights_that_do_not_fit_are_no_matter_of_the_batch(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("distft.teacher.scorer.load_model", load)
    with pytest.raises(DistftError, match="Tried to allocate 2 GiB") as told:
        made.score()
    assert "tokens_per_batch" not in told.value.help
    for cure in ("score.tensor_parallel", "teacher.dtype", "GPU with more memory"):
        assert cure in told.value.help


@pytest.mark.parametrize(
    ("error", "helps", "not_helps"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "score.tokens_per_batch", "message"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "score.tokens_per_batch", "message"),
        (RuntimeError("NCCL error: unhandled system error"), "score.tensor_parallel=1", "tokens_per_batch"),
    ],
)
def test_a_rank_says_lower_the_batch_where_memory_ran_out_alone(made: Lab, error: Exception, helps: str, not_helps: str) -> None:
    scorer = scorer_of(made)
    scorer.group = World(rank=1, size=2)
    failed = "Rank 1 of 2 that hold the teacher together failed: "
    with pytest.raises(DistftError, match=failed) as told, scorer._no_rank_goes_on_alone():
        raise error
    assert helps in told.value.help
    assert not_helps not in told.value.help
    assert told.value.__cause__ is None, "a rank that took it for its own trouble would read the documents one by one"
    scorer.group = World()
    with pytest.raises(type(error)), scorer._no_rank_goes_on_alone():
        raise error


def test_what_a_rank_was_told_already_passes(made: Lab) -> None:
    scorer = scorer_of(made)
    scorer.group = World(rank=0, size=2)
    with pytest.raises(ConfigError, match="as it is"), scorer._no_rank_goes_on_alone():
        raise ConfigError("as it is")


# --- calibration -----------------------------------------------------------------------------------------------------


def test_a_teacher_over_several_gpus_is_not_measured_by_one(made: Lab) -> None:
    spread = made.changed(score={"tensor_parallel": 2})
    with pytest.raises(ConfigError, match="needs a process for each") as told:
        calibrate(spread.run, spread.model, spread.model, spread.corpus)
    assert told.value.where == "score.tensor_parallel=2"
    assert "score.limit" in told.value.help


@pytest.mark.parametrize(
    ("workers", "address", "gpus", "group", "said"),
    [
        ("auto", "local", 8, 4, 2), ("auto", "local", 2, 4, 1), (3, "local", 8, 4, 2), (1, "local", 8, 4, 1), (3, "local", 0, 2, 2),
        (5, "auto", 8, 4, 5), ("auto", "auto", 8, 4, 1),
    ],
)  # fmt: skip
def test_a_scorer_over_several_gpus_counts_once(
    made: Lab, monkeypatch: pytest.MonkeyPatch, workers: Any, address: str, gpus: int, group: int, said: int
) -> None:
    monkeypatch.setattr(calibration, "device_count", lambda: gpus)
    monkeypatch.setattr(calibration.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    run = made.changed(score={"workers": workers, "tensor_parallel": group}, cluster={"address": address}).run
    assert scorers(run) == said
