"""Four kinds of supervised tokens, by what the teacher thought of each: was it sure, and did it find the label likely?

What an objective spends on each kind says what it teaches. Sure and unlikely tokens contradict what the model knows: learning them is
what makes it forget. Thresholds are fixed, so that kinds can be compared over corpora, teachers and steps.

numpy only, as rules are.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from distft.objectives.treatment import Signals

Quadrant = Literal["sure_likely", "sure_unlikely", "unsure_likely", "unsure_unlikely"]
QUADRANTS: tuple[Quadrant, ...] = get_args(Quadrant)
NONE = len(QUADRANTS)
"""The place of tokens that are of no quadrant: a prompt's, and all that no teacher was asked about."""

UNSURE = math.log(2)
"""Nats of H(q) above which the teacher counts as unsure: more than the toss of a coin."""
LIKELY = 0.5
"""q(y) from which a label counts as likely."""


def quadrants(signals: Signals) -> npt.NDArray[np.int8]:
    """Each token's place in QUADRANTS."""
    unsure, unlikely = signals.entropy > np.float32(UNSURE), signals.label_logprob < np.float32(math.log(LIKELY))
    return np.where(np.isnan(signals.entropy), NONE, 2 * unsure + unlikely).astype(np.int8)
