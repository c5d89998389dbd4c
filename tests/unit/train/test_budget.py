"""The drift budget's controller against plants whose answers are known, and what it does when nothing helps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from distft.train.budget import MOST, OVER, RELEASE, DriftBudget

BUDGET = 0.05


def run(
    free: float, grip: float, pace: float, *, noise: float = 0.0, measurements: int = 40, budget: float = BUDGET, seed: int = 0,
    cosine: bool = True,
) -> tuple[DriftBudget, list[float]]:  # fmt: skip
    """A student that would drift to `free` nats if nothing held it, and to free / (1 + grip * factor) as it is held, at a pace that
    falls with a cosine learning rate. What is told is where it is; what is measured has noise, as a share of the budget."""
    control, drift, seen, random = DriftBudget(budget), 0.0, [], np.random.default_rng(seed)
    for number in range(measurements):
        rate = 1 + math.cos(math.pi * number / measurements) if cosine else 1.0
        drift += (free / (1 + grip * control.factor) - drift) * pace * rate
        seen.append(drift)
        control.observe(drift + noise * budget * random.normal())
    return control, seen


@pytest.mark.parametrize(
    ("free", "grip", "pace", "noise"),
    [(0.5, 3.0, 0.2, 0.0), (0.5, 3.0, 0.05, 0.0), (0.2, 9.0, 0.15, 0.02), (0.3, 1.0, 0.1, 0.02)],
)
def test_drift_comes_to_the_budget_and_stays_there(free: float, grip: float, pace: float, noise: float) -> None:
    control, seen = run(free, grip, pace, noise=noise)
    arrived = next(n for n, drift in enumerate(seen) if drift > 0.8 * BUDGET)
    assert arrived < 20
    assert max(seen) <= 1.2 * BUDGET
    assert min(seen[arrived:]) >= 0.65 * BUDGET  # it is gripped before it is known how fast it moves
    assert all(0.85 * BUDGET <= drift <= 1.15 * BUDGET for drift in seen[-10:])
    assert control.kept


@pytest.mark.parametrize("pace", [0.1, 0.3])
def test_noise_does_not_drive_it(pace: float) -> None:
    """Noise of a tenth of the budget keeps drift near it; of a fifth, it does not ratchet the factor up and drift away from it."""
    means = []
    for seed in range(8):
        seen = np.array(run(0.5, 3.0, pace, noise=0.1, measurements=80, seed=seed, cosine=False)[1][-20:]) / BUDGET
        assert ((seen >= 0.8) & (seen <= 1.2)).all(), seen
        seen = np.array(run(0.5, 3.0, pace, noise=0.2, measurements=80, seed=seed, cosine=False)[1][-40:]) / BUDGET
        means.append(seen.mean())
    assert min(means) >= 0.75
    assert 0.8 <= np.mean(means) <= 1.2


def test_what_is_within_the_band_changes_nothing() -> None:
    control = DriftBudget(BUDGET, factor=2.0, seen=[BUDGET] * 3)
    for drift in (1.0, 0.99, 1.01, 1.02, 1.02):
        control.observe(drift * BUDGET)
    assert control.factor == 2.0


def test_a_start_far_above_the_budget_is_brought_down() -> None:
    control, seen = run(2.0, 0.6, 0.3)
    assert max(seen) > 5 * BUDGET
    assert seen[-1] == pytest.approx(BUDGET, rel=0.12)  # the band, and a little
    assert control.kept
    assert not control.hopeless


def test_a_budget_that_is_never_reached_releases_no_more_than_it_may() -> None:
    control, seen = run(0.03, 1.0, 0.2)
    assert max(seen) < BUDGET
    assert control.factor == pytest.approx(1 / RELEASE)


def test_a_budget_that_cannot_be_met_is_noticed_once() -> None:
    control, told = DriftBudget(BUDGET), 0
    for drift in (0.1, 0.4, 0.8, *[1.0] * 20):
        control.observe(drift)
        told += control.hopeless
    assert told == 1
    assert control.factor == pytest.approx(MOST)
    assert not control.kept


def test_it_goes_on_where_it_was() -> None:
    one, _ = run(0.5, 3.0, 0.2, measurements=12)
    two = DriftBudget.resumed(BUDGET, one.facts())
    assert two == one
    for drift in (0.04, 0.06, 0.05):
        one.observe(drift)
        two.observe(drift)
    assert two == one
    assert json.loads(json.dumps(one.facts())) == one.facts()


def test_estimates_below_zero_are_no_trouble() -> None:
    """Draws from a teacher estimate drift with noise, and near zero on both sides of it."""
    control = DriftBudget(BUDGET)
    for drift in (-0.01, 0.002, -0.004):
        control.observe(drift)
    assert 1 / RELEASE <= control.factor < 1
    assert control.last < OVER * BUDGET
