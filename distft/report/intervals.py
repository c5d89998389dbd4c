"""95 % intervals for scores and gains, over the items or documents that were measured.

They say how far another draw of items from the same source would move a number. They know nothing of another training seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
FEWEST_DOCUMENTS = 5
"""Below this a variance between documents means nothing, and no interval is given."""
RESAMPLES = 4_000


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def wilson(right: int, count: int) -> Interval:
    """Wilson's score interval of a proportion: stays inside [0, 1] and has a width at 0 and at `count` too."""
    share = right / count
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def accuracy_gain(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """Of the difference of two proportions over the same items: the Wald interval for matched pairs with half a pair added to
    each of the four cells (Agresti and Min, 2005), which keeps its promise for few items and few changes."""
    count = len(before) + 2
    gained = sum(a and not b for b, a in zip(before, after, strict=True)) + 0.5
    lost = sum(b and not a for b, a in zip(before, after, strict=True)) + 0.5
    centre = (gained - lost) / count
    half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count
    return Interval(max(-1.0, centre - half), min(1.0, centre + half))


def per_token(sums: Sequence[float], tokens: Sequence[int]) -> Interval | None:
    """Of sum(sums) / sum(tokens), with whole documents as the unit, since tokens of one document are not independent: the
    linearised variance of a ratio. None where there are too few documents."""
    count = len(sums)
    if count < FEWEST_DOCUMENTS:
        return None
    sums_D, tokens_D = np.asarray(sums, np.float64), np.asarray(tokens, np.float64)
    mean = sums_D.sum() / tokens_D.sum()
    squares = float(((sums_D - mean * tokens_D) ** 2).sum())
    half = student_t(count - 1) * math.sqrt(count / (count - 1) * squares) / tokens_D.sum()
    lowest = 0.0 if (sums_D >= 0).all() else -math.inf  # what is never negative is not on average
    return Interval(max(lowest, float(mean - half)), float(mean + half))


def ratio(gains: Sequence[float], reference: Sequence[float]) -> Interval:
    """Of sum(gains) / sum(reference), both over the same items: percentiles of a paired bootstrap with a fixed seed. Means
    something only where the reference's own gain is clear of zero."""
    random = np.random.default_rng(0)
    both_IX = np.stack([np.asarray(gains, np.float64), np.asarray(reference, np.float64)], axis=1)
    count = len(both_IX)
    drawn = []
    for _ in range(RESAMPLES // 200):  # in blocks, so that memory stays small for many items
        times_RI = random.multinomial(count, np.full(count, 1 / count), size=200)
        drawn.append(times_RI @ both_IX)
    sums_RX = np.concatenate(drawn)
    usable = sums_RX[sums_RX[:, 1] != 0]
    low, high = np.percentile(usable[:, 0] / usable[:, 1], [2.5, 97.5])
    return Interval(float(low), float(high))


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t by its Cornish-Fisher expansion: within 0.3 % from four degrees of freedom on."""
    return (
        Z
        + (Z**3 + Z) / (4 * freedom)
        + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
        + (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * freedom**3)
    )
