"""A NaN or an infinity in a cache row is refused by name before anything is trained on it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distft.engine.world import World
from distft.errors import CorruptArtifactError, TrainingError
from distft.objectives.catalog import Dft, Eksft
from distft.objectives.treatment import treatment
from distft.teacher.cache import not_finite
from distft.teacher.head_copy import commit_head
from distft.teacher.identity import teacher_folder
from distft.teacher.rows import Row
from distft.teacher.scores import Scores
from distft.train.record import read_metrics
from tests.helpers.caches import only_cache, rewrite
from tests.helpers.objectives import uneven
from tests.helpers.steps import feed
from tests.helpers.stores import Lab, bits, differing, lab, loaded

BAD = uneven()[2]
"""The document whose row is spoiled: fifteen supervised tokens."""

SPOILS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "label_logprob, nan": ("label_logprob", np.nan, {"kind": "stm"}),
    "label_logprob, inf": ("label_logprob", -np.inf, {"kind": "lwf"}),
    "entropy": ("entropy", np.inf, {"kind": "stm"}),
    "tail": ("tail", np.nan, {"kind": "sft_kl"}),
    "logprobs, nan": ("logprobs", np.nan, {"kind": "kd"}),
    "logprobs, inf": ("logprobs", -np.inf, {"kind": "eksft"}),
}


def spoiled(made: Lab, column: str, change: Any) -> Lab:
    """One number of one document's row, in files and manifests that are sound in themselves."""

    def to(row: Row) -> Row:
        if row.digest != BAD.digest:
            return row
        values = np.array(getattr(row.scores, column))
        change(values)
        given = {f.name: getattr(row.scores, f.name) for f in fields(Scores)}
        return replace(row, scores=Scores(**{**given, column: values}))

    made.score()
    rewrite(only_cache(made.store), made.staging, to, every=True)
    made.score()  # covers the parts anew
    return made


def assert_refused(made: Lab, column: str) -> None:
    with pytest.raises(CorruptArtifactError) as told:
        feed(made).step(np.arange(8))
    assert told.value.exit_status == 3
    assert BAD.digest in told.value.problem
    assert told.value.problem.endswith(f": {column}.")
    assert told.value.where.startswith("rows.jsonl:3, in ")
    assert BAD.digest[:12] in told.value.help
    with pytest.raises(CorruptArtifactError, match=BAD.digest):
        made.train()
    assert made.checkpoints().steps() == []
    feed(made).step(np.array([0, 1, 3, 4, 5, 6, 7]))  # all others are well


@pytest.mark.parametrize("case", SPOILS)
def test_a_row_with_no_number_in_it_is_refused_by_name(tmp_path: Path, case: str) -> None:
    column, value, objective = SPOILS[case]
    made = lab(tmp_path, documents=uneven(), objective=objective)

    def change(values: Any) -> None:
        values[len(values) // 2] = value

    assert_refused(spoiled(made, column, change), column)


@pytest.mark.parametrize(("dtype", "word"), [("float32", 0x7F80), ("bfloat16", 0xFFC0)])
def test_hidden_states_are_looked_at_in_their_own_type(tmp_path: Path, dtype: str, word: int) -> None:
    """Infinity's upper half in float32, whose lower halves may be any 16 bits; a NaN of bfloat16."""
    made = lab(tmp_path, documents=uneven(), dtype=dtype, score={"distribution": {"kind": "hidden"}})
    commit_head(teacher_folder(made.store, made.identity()), loaded(made.model, dtype=dtype), World())

    def change(values: Any) -> None:
        values[101] = word
        if dtype == "float32":
            values[100] = 0

    assert_refused(spoiled(made, "hidden", change), "hidden")


def test_any_bits_may_stand_in_the_lower_half_of_a_float32() -> None:
    none, zero = np.zeros(0, np.float32), np.zeros(1, np.float32)
    scores = Scores(
        positions=np.ones(1, np.uint32), label_logprob=zero, entropy=zero, rank=np.zeros(1, np.uint32), tail=zero,
        counts=np.zeros(1, np.uint16), ids=np.zeros(0, np.uint32), logprobs=none.astype(np.float16),
        hidden=np.array([0x7F80, 0x3F80], np.uint16),
    )  # fmt: skip
    assert not_finite(scores, torch.float32) == []
    assert not_finite(scores, torch.bfloat16) == ["hidden"]
    assert not_finite(replace(scores, hidden=scores.hidden[:0]), torch.bfloat16) == []


@pytest.mark.parametrize("select", ["highest", "lowest", "random"])
def test_a_step_of_which_every_token_is_masked_is_an_error(tmp_path: Path, select: str) -> None:
    made = lab(tmp_path, documents=uneven(), objective={"kind": "stm", "tau": 1.0000001, "select": select})
    made.score()
    with pytest.raises(TrainingError, match="No token of step 1 has a weight") as told:
        made.train()
    assert "loosen the objective" in told.value.help
    assert made.checkpoints().steps() == []


@pytest.mark.parametrize("normalise", ["token_mean", "group_mean"])
def test_lwf_without_anchors_and_without_holding_says_that_it_trains_nothing(tmp_path: Path, normalise: str) -> None:
    """Its tokens count, so this is no division by nothing; but weight decay and old momentum would move the model."""
    made = lab(tmp_path, documents=uneven(), objective={"kind": "lwf", "p_star": 1e-30, "beta": 0.0, "normalise": normalise})
    made.score()
    assert_nothing_is_trained(made)


def assert_nothing_is_trained(made: Lab) -> None:
    before = bits(made.engine())
    with pytest.raises(TrainingError, match=r"No token has a weight: the objective counts [1-9]\d* and trains nothing") as told:
        made.train()
    assert told.value.where.startswith("step 1, rows")
    assert "loosen the objective's selection" in told.value.help
    assert read_metrics(made.run_folder) == []
    engine = made.engine()
    mine = feed(made).step(np.arange(8))
    with pytest.raises(TrainingError, match="nothing was updated"):
        engine.train_step(mine.micro_batches, normaliser=sum(mine.counts), lr=1e-3)
    assert differing(before, bits(engine)) == []
    assert all(p.grad is None for p in engine.parameters.values())


@pytest.mark.parametrize("rule", [Dft, Eksft])
def test_a_live_rule_that_masks_a_whole_step_says_so(rule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab(tmp_path, documents=uneven(), objective={"kind": rule.model_fields["kind"].annotation.__args__[0]})
    made.score()
    monkeypatch.setattr(rule, "treat", lambda self, signals: treatment(len(signals)))
    assert_nothing_is_trained(made)


def test_a_fraction_never_masks_a_whole_step(tmp_path: Path) -> None:
    """floor(0.99 n) of n tokens leaves one of each document."""
    made = lab(tmp_path, documents=uneven(), objective={"kind": "stm", "fraction": 0.99})
    made.score()
    assert feed(made).step(np.arange(8)).counts == [8.0]
    assert made.train()["steps"] > 0
