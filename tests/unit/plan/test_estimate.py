"""Estimates follow from the run file and the model's headers, and keep step with the code that they speak of."""

from __future__ import annotations

from typing import Any

import pytest

from distft.config.load import validate
from distft.config.schema import Run
from distft.plan.estimate import Estimate, estimate, head_bytes, teacher_bytes_per_token
from distft.plan.measured import Lengths, TokenBytes
from distft.plan.show import plan_text

CONFIG = {"num_hidden_layers": 16, "hidden_size": 2048, "vocab_size": 128_256}
BILLION = 1_000_000_000


def run(**sections: Any) -> Run:
    return validate({"name": "a", "model": {"path": "m"}, "data": {"train": {"path": "t"}}, **sections}, where="")


def test_a_checkpoint_is_three_float32_numbers_a_parameter() -> None:
    assert guess(run(), None).checkpoint_bytes == 12 * BILLION


def of(tokens: int, longest: int = 1000) -> Lengths:
    return Lengths(tokens=tokens, longest=longest, share_rows=True)


def guess(given: Run, tokens: int | None, **figures: Any) -> Estimate:
    """An estimate of a model that is its own teacher, half of whose tokens are scored."""
    usual = {
        "parameters": BILLION, "teacher_parameters": BILLION, "config": CONFIG, "known": TokenBytes(amount=60.0, basis="estimated"),
        "tokens": tokens, "scored_tokens": None if tokens is None else tokens // 2, "lengths": None if tokens is None else of(tokens),
    }  # fmt: skip
    return estimate(given, **(usual | figures))


def policy(width: int = 2048, **settings: Any) -> float:
    return teacher_bytes_per_token(run(score={"distribution": settings}), width=width)


def test_the_cache_grows_with_what_is_kept() -> None:
    none, floor, fixed = policy(kind="none"), policy(kind="topk"), policy(kind="topk", min_prob=0.0)
    assert none < floor < fixed
    assert policy(kind="topk", k=4) < floor
    assert policy(kind="topk", min_prob=0.0, k=64) == pytest.approx((fixed + none) / 2)
    assert policy(kind="topk", min_prob=1e-6) == fixed, "never more than k"


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        ({"kind": "topk"}, 60, 89),
        ({"kind": "topk", "k": 64, "min_prob": 0.0}, 174, 190),
        ({"kind": "topk", "k": 16, "min_prob": 0.0}, 57, 63),
        ({"kind": "sample"}, 30, 38),
        ({"kind": "none"}, 14, 14),
    ],
)
def test_the_constants_give_what_the_readme_measured(settings: dict[str, Any], least: float, most: float) -> None:
    assert least <= policy(**settings) <= most


def test_hidden_states_cost_the_teachers_width_in_its_dtype() -> None:
    half = policy(kind="hidden")
    assert half == pytest.approx(14 + 2 * 2048 * 0.69)
    assert policy(kind="hidden", width=1024) < half
    whole = run(score={"distribution": {"kind": "hidden"}}, teacher={"dtype": "float32"})
    assert teacher_bytes_per_token(whole, width=2048) == pytest.approx(14 + 4 * 2048 * 0.89)


def test_the_head_is_kept_once_beside_hidden_states_alone() -> None:
    hidden = run(score={"distribution": {"kind": "hidden"}})
    assert head_bytes(hidden, rows=128_256, width=2048) == 128_256 * 2048 * 2
    assert head_bytes(run(), rows=128_256, width=2048) == 0
    known = TokenBytes(amount=100.0, basis="cache 0123")
    assert [guess(hidden, tokens, known=known, head_bytes=7).teacher_bytes for tokens in (0, 1_000)] == [7, 50_007]


def test_the_cache_and_its_pass_are_those_of_the_teacher() -> None:
    known = TokenBytes(amount=73.5, basis="cache 0123")
    found = guess(run(), 1_000, known=known, teacher_parameters=3 * BILLION)
    assert (found.teacher_bytes_per_token, found.basis, found.teacher_bytes) == (73.5, "cache 0123", 36_750)
    own, another = guess(run(), 1_000).score_hours, found.score_hours
    assert own is not None
    assert another == pytest.approx(3 * own)
    assert guess(run(), None).teacher_bytes is None


def test_hours_follow_tokens_epochs_and_parameters() -> None:
    def hours(parameters: int = BILLION, tokens: int = 10**9, **train: Any) -> float:
        found = guess(run(train=train), tokens, parameters=parameters).train_hours
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
    figures = guess(run(), None).facts()
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


TEACHER = {"artifact": "teacher", "state": "missing", "note": "", "verb": "score"}


def told(**result: Any) -> str:
    return plan_text({"config": run().model_dump(mode="json"), "artifacts": [TEACHER], **result})


def test_a_run_that_reads_no_teacher_is_told_no_cost_of_one() -> None:
    lines = told(artifacts=[], estimate={**guess(run(), 10**9).facts(), "steps": 1}).splitlines()
    assert [line.split()[0] for line in lines if "none: neither" in line] == ["teacher", "scoring"]


@pytest.mark.parametrize(
    ("known", "tokens", "said"),
    [
        (TokenBytes(amount=73.2, basis="estimated"), None, "about 73 bytes a scored token (estimated)"),
        (TokenBytes(amount=73.2, basis="cache 0123"), 40_000_000, "about 73 bytes a scored token, 1.46 GB in all (from cache 0123)"),
        (TokenBytes(amount=60.0, basis="measured on 20 documents"), 100,
         "about 60 bytes a scored token, 3 kB in all (measured on 20 documents)"),
    ],
)  # fmt: skip
def test_how_the_bytes_are_known_is_said(known: TokenBytes, tokens: int | None, said: str) -> None:
    figures = {**guess(run(), tokens, known=known).facts(), "steps": None}
    assert f"teacher cache          {said}\n" in told(estimate=figures)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ["4,000, of which 1,000 are scored (25 %)", "200 tokens/s in 20.0 s", "60.5 a scored token", "20 documents on cpu",
              "the whole corpus       2 GB, 12.5 hours with 1 scorer"]),
        ({"whole_corpus": False, "workers": 3, "score_hours": 0.5}, ["a million tokens       2 GB, 30 minutes with 3 scorers"]),
        ({"score_hours": 0.001}, ["3.6 seconds"]),
        ({"device": "NVIDIA H100"}, ["documents on NVIDIA H100", "do not fill a batch"]),
    ],
)  # fmt: skip
def test_a_calibration_is_told(changed: dict[str, Any], said: list[str]) -> None:
    found = {
        "documents": 20, "tokens": 4000, "scored_tokens": 1000, "seconds": 20.0, "tokens_per_second": 200.0, "bytes_per_token": 60.5,
        "device": "cpu", "workers": 1, "of_tokens": 9_000_000, "whole_corpus": True,
        "teacher_bytes": 2_000_000_000, "score_hours": 12.5,
    }  # fmt: skip
    text = told(estimate={**guess(run(), None).facts(), "steps": None}, calibration=found | changed)
    assert [part for part in said if part not in text] == []
    assert ("do not fill" in text) == ("device" in changed), "a CPU's speed does not hang on full batches"
