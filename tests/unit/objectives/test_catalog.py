"""Each rule against values worked out by hand, and what it declares against what it does."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.objectives.catalog import Objective, Sft, SftKl, Stm, StmKl
from distft.objectives.treatment import ObjectiveRule, Signals, Treatment

COLUMNS = ("ce", "kl", "rkl", "entropy", "count")

RULES: dict[str, ObjectiveRule] = {
    "sft": Sft(),
    "sft_kl": SftKl(kind="sft_kl", kl=0.25),
    "sft_kl backwards": SftKl(kind="sft_kl", kl=0.25, direction="student_to_teacher"),
    "stm": Stm(kind="stm", tau=2.0),
    "stm_kl": StmKl(kind="stm_kl", tau=2.0, kl=3.0),
}


def signals(*probabilities: float) -> Signals:
    """Of tokens whose label the teacher gives these probabilities."""
    label_logprob = np.log(np.array(probabilities, np.float64)).astype(np.float32)
    return Signals(label_logprob=label_logprob, entropy=np.ones_like(label_logprob), rank=np.zeros(len(label_logprob), np.uint32))


def columns(treatment: Treatment) -> dict[str, list[float]]:
    return {name: getattr(treatment, name).tolist() for name in COLUMNS}


# What each rule does with tokens of probability 0.9, 0.5 (exactly 1/tau), 0.4 and 0.01.
BY_HAND: dict[str, dict[str, list[float]]] = {
    "sft": {"ce": [1, 1, 1, 1], "kl": [0, 0, 0, 0], "rkl": [0, 0, 0, 0], "entropy": [0, 0, 0, 0], "count": [1, 1, 1, 1]},
    "sft_kl": {"ce": [1, 1, 1, 1], "kl": [0.25] * 4, "rkl": [0, 0, 0, 0], "entropy": [0, 0, 0, 0], "count": [1, 1, 1, 1]},
    "sft_kl backwards": {"ce": [1] * 4, "kl": [0] * 4, "rkl": [0.25] * 4, "entropy": [0] * 4, "count": [1] * 4},
    "stm": {"ce": [1, 1, 0, 0], "kl": [0, 0, 0, 0], "rkl": [0, 0, 0, 0], "entropy": [0, 0, 0, 0], "count": [1, 1, 0, 0]},
    "stm_kl": {"ce": [1, 1, 0, 0], "kl": [0, 0, 3, 3], "rkl": [0, 0, 0, 0], "entropy": [0, 0, 0, 0], "count": [1, 1, 1, 1]},
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_does_what_was_worked_out_by_hand(name: str) -> None:
    assert columns(RULES[name].treat(signals(0.9, 0.5, 0.4, 0.01))) == BY_HAND[name]


def test_every_rule_of_the_catalog_is_tested_here() -> None:
    assert {type(rule) for rule in RULES.values()} == set(get_args(Objective))


@pytest.mark.parametrize("tau", [1.5, 2.0, 2.5, 7.0, 1000.0])
def test_stm_keeps_a_token_exactly_at_its_threshold_and_masks_the_next_one(tau: float) -> None:
    at = np.float32(-math.log(tau))
    below, above = np.nextafter(at, np.float32(-1e9)), np.nextafter(at, np.float32(0))
    given = signals(1.0, 1.0, 1.0)
    given = Signals(label_logprob=np.array([below, at, above], np.float32), entropy=given.entropy, rank=given.rank)
    assert Stm(kind="stm", tau=tau).treat(given).ce.tolist() == [0, 1, 1]
    assert StmKl(kind="stm_kl", tau=tau).treat(given).kl.tolist() == [1, 0, 0]


probabilities = st.lists(st.floats(1e-30, 1.0), max_size=12)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None)
@given(labels=probabilities)
def test_weights_are_numbers_that_the_loss_can_bear(name: str, labels: list[float]) -> None:
    treatment = RULES[name].treat(signals(*labels))
    for column in COLUMNS:
        values = getattr(treatment, column)
        assert values.dtype == np.float32
        assert values.shape == (len(labels),)
        assert np.isfinite(values).all()
        assert (values >= 0).all()


@settings(max_examples=60, deadline=None)
@given(labels=probabilities)
def test_stm_kl_learns_what_stm_learns_and_holds_the_rest(labels: list[float]) -> None:
    plain, held = RULES["stm"].treat(signals(*labels)), RULES["stm_kl"].treat(signals(*labels))
    assert held.ce.tolist() == plain.ce.tolist() == plain.count.tolist()
    assert (held.kl > 0).tolist() == [weight == 0 for weight in plain.ce.tolist()]
    assert held.count.tolist() == [1.0] * len(labels)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_reads_what_it_declares_and_nothing_else(name: str) -> None:
    """A rule that declares no signals gets NaN (Feed does that), which must not reach a weight; one that does must heed them."""
    rule = RULES[name]
    blind = np.full(3, np.nan, np.float32)
    unknown = rule.treat(Signals(label_logprob=blind, entropy=blind, rank=np.zeros(3, np.uint32)))
    likely, unlikely = rule.treat(signals(0.9, 0.9, 0.9)), rule.treat(signals(0.01, 0.01, 0.01))
    if rule.needs_signals:
        assert columns(likely) != columns(unlikely)
    else:
        assert columns(unknown) == columns(likely) == columns(unlikely)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_holds_if_and_only_if_it_asks_for_a_distribution(name: str) -> None:
    given = RULES[name].treat(signals(0.9, 0.5, 0.4, 0.01))
    assert bool((given.kl + given.rkl).any()) == RULES[name].needs_distribution
