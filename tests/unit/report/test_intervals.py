"""Intervals against computations by hand, and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distft.report.intervals import accuracy_gain, per_token, ratio, student_t, wilson


def test_wilson_is_the_worked_example() -> None:
    # 16 of 200: z = 1.959964, z2 = 3.841459; centre (0.08 + 3.841459/400) / (1 + 3.841459/200) = 0.0896036/1.0192073 = 0.0879150;
    # half 1.959964/1.0192073 * sqrt(0.08*0.92/200 + 3.841459/160000) = 1.9230279 * 0.0198002 = 0.0380763
    found = wilson(16, 200)
    assert found.low == pytest.approx(0.0879150 - 0.0380763, abs=2e-6)
    assert found.high == pytest.approx(0.0879150 + 0.0380763, abs=2e-6)


def test_wilson_stays_inside_and_has_a_width_at_the_ends() -> None:
    none, all_right = wilson(0, 10), wilson(10, 10)
    assert none.low == 0.0
    assert none.high == pytest.approx(3.841459 / 13.841459, abs=1e-6)  # z2 / (n + z2)
    assert (all_right.low, all_right.high) == (pytest.approx(1 - none.high), pytest.approx(1.0))
    assert all_right.high <= 1.0


def test_accuracy_gain_is_the_worked_example() -> None:
    # Ten items: four gained, one lost. With half a pair per cell: n 12, gained 4.5, lost 1.5; centre 3/12 = 0.25;
    # half 1.959964 * sqrt(6 - 9/12) / 12 = 1.959964 * 2.2912878 / 12 = 0.3742370
    before = [True, True, True, False, False, False, False, False, False, False]
    after = [False, True, True, True, True, True, True, False, False, False]
    found = accuracy_gain(before, after)
    assert found.low == pytest.approx(0.25 - 0.3742370, abs=1e-6)
    assert found.high == pytest.approx(0.25 + 0.3742370, abs=1e-6)


def test_no_change_is_never_certain() -> None:
    found = accuracy_gain([False] * 20, [False] * 20)
    assert found.low < 0 < found.high


def test_per_token_of_equal_documents_is_students_interval_of_a_mean() -> None:
    # Six documents of ten tokens with means 1..6: mean 3.5, s = sqrt(3.5), t(5) = 2.5706.
    found = per_token([10.0, 20.0, 30.0, 40.0, 50.0, 60.0], [10] * 6)
    assert found is not None
    half = 2.5706 * math.sqrt(3.5) / math.sqrt(6)
    assert found.low == pytest.approx(3.5 - half, rel=2e-3)
    assert found.high == pytest.approx(3.5 + half, rel=2e-3)


def test_per_token_weighs_documents_by_their_tokens() -> None:
    # sums 2, 9, 8, 20, 11 over 1, 3, 4, 8, 4 tokens: 50/20 = 2.5; residuals -0.5, 1.5, -2, 0, 1; squares 7.5;
    # half t(4) * sqrt(5/4 * 7.5) / 20 = 2.7764 * 3.0618622 / 20 = 0.4250477
    found = per_token([2.0, 9.0, 8.0, 20.0, 11.0], [1, 3, 4, 8, 4])
    assert found is not None
    assert found.low == pytest.approx(2.5 - 0.4250477, rel=2e-3)
    assert found.high == pytest.approx(2.5 + 0.4250477, rel=5e-3)


def test_too_few_documents_give_no_interval() -> None:
    assert per_token([1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1]) is None


@pytest.mark.parametrize(("freedom", "expected"), [(4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_student_t_is_that_of_the_tables(freedom: int, expected: float) -> None:
    assert student_t(freedom) == pytest.approx(expected, rel=3e-3)


def test_ratio_of_proportional_gains_is_exact() -> None:
    reference = np.random.default_rng(1).normal(1, 0.2, 50)
    found = ratio(list(0.4 * reference), list(reference))
    assert (found.low, found.high) == (pytest.approx(0.4), pytest.approx(0.4))


def test_ratio_agrees_with_its_linearised_variance() -> None:
    random = np.random.default_rng(2)
    reference = random.normal(2.0, 0.5, 400)
    gains = 0.5 * reference + random.normal(0, 0.3, 400)
    share = gains.sum() / reference.sum()
    half = 1.96 * math.sqrt(((gains - share * reference) ** 2).sum()) / reference.sum()
    found = ratio(list(gains), list(reference))
    assert found.low == pytest.approx(share - half, abs=0.15 * half)
    assert found.high == pytest.approx(share + half, abs=0.15 * half)


def test_the_same_items_give_the_same_interval() -> None:
    gains, reference = [0.0, 1.0, 1.0, -1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]
    assert ratio(gains, reference) == ratio(gains, reference)
