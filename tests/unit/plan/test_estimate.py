"""Estimates follow from the run file and the model's headers, and keep step with the code that they speak of."""

from __future__ import annotations

from typing import Any

import pytest

from distft.config.load import validate
from distft.config.schema import Run
from distft.plan.estimate import HEAD_BUFFER_BYTES, estimate, memory_per_rank, teacher_bytes_per_token
from distft.plan.show import plan_text

CONFIG = {"num_hidden_layers": 16, "hidden_size": 2048, "vocab_size": 128_256}
BILLION = 1_000_000_000


def run(**sections: Any) -> Run:
    return validate({"name": "a", "model": {"path": "m"}, "data": {"train": {"path": "t"}}, **sections}, where="")


def test_the_heads_buffers_are_those_of_the_loss() -> None:
    from distft.objectives.loss import CHUNK_BYTES

    assert HEAD_BUFFER_BYTES == 3 * CHUNK_BYTES


def test_a_billion_parameters_in_bfloat16() -> None:
    """20 bytes a parameter before activations: 2 + 2 in bfloat16, 4 x 4 in float32."""
    small = memory_per_rank(run(train={"micro_batch_tokens": 2}), BILLION, CONFIG)
    assert 20 * BILLION < small < 22.5 * BILLION
    assert memory_per_rank(run(model={"path": "m", "dtype": "float32"}, train={"micro_batch_tokens": 2}), BILLION, CONFIG) < small


def test_what_saves_memory_saves_it_in_the_estimate() -> None:
    usual = memory_per_rank(run(), BILLION, CONFIG)
    assert memory_per_rank(run(train={"gradient_checkpointing": True}), BILLION, CONFIG) < usual
    assert memory_per_rank(run(train={"micro_batch_tokens": 1024}), BILLION, CONFIG) < usual


def policy(**settings: Any) -> float:
    return teacher_bytes_per_token(run(score={"distribution": settings}))


def test_the_cache_grows_with_what_is_kept() -> None:
    none, floor, fixed = policy(kind="none"), policy(kind="topk"), policy(kind="topk", min_prob=0.0)
    assert none < floor < fixed
    assert policy(kind="topk", k=4) < floor
    assert policy(kind="topk", min_prob=0.0, k=64) == pytest.approx((fixed + none) / 2)
    assert policy(kind="topk", min_prob=1e-6) == fixed, "never more than k"


def test_hours_follow_tokens_epochs_and_parameters() -> None:
    def hours(parameters: int = BILLION, tokens: int = 10**9, **train: Any) -> float:
        found = estimate(run(train=train), parameters=parameters, config=CONFIG, tokens=tokens, trained_tokens=tokens).train_hours
        assert found is not None
        return found

    assert hours(epochs=3) == pytest.approx(3 * hours())
    assert hours(tokens=2 * 10**9) == pytest.approx(2 * hours())
    assert hours(parameters=2 * BILLION) == pytest.approx(2 * hours())
    assert hours(gradient_checkpointing=True) == pytest.approx(hours() * 4 / 3)
    assert hours() == pytest.approx(6e18 / (989e12 * 0.4 * 3600))


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (None, "known once the corpus is tokenised"),
        (0.001, "less than a minute"),
        (0.5, "0.5 GPU-hours"),
        (120.0, "1.2e+02 GPU-hours"),
    ],
)
def test_hours_are_told_as_people_do(hours: float | None, said: str) -> None:
    figures = estimate(run(), parameters=BILLION, config=CONFIG, tokens=None, trained_tokens=None).facts()
    figures |= {"score_hours": hours, "train_hours": hours, "steps": None if hours is None else 1200}
    statuses = [
        {"artifact": "corpus", "state": "stale", "note": "a: 1 -> 2\nb: 3 -> 4", "verb": "tokenize"},
        {"artifact": "teacher", "state": "have", "note": "", "verb": "score"},
    ]
    lines = plan_text({"config": run().model_dump(mode="json"), "artifacts": statuses, "estimate": figures}).splitlines()
    assert [line for line in lines if line.startswith("training") and said in line]
    stale = next(number for number, line in enumerate(lines) if line.startswith("corpus"))
    assert lines[stale].split() == ["corpus", "STALE", "a:", "1", "->", "2", "(distft", "tokenize)"]
    assert lines[stale + 1].strip() == "b: 3 -> 4"
    assert lines[stale + 2].split() == ["teacher", "have"]
