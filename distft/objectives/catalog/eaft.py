"""Entropy-adaptive fine-tuning (arXiv 2601.02151): learn less where the student is sure of something else.

    loss = mean over supervised tokens of (h_t / 3)^alpha * CE_t        h_t: entropy of the softmax over p's 20 highest logits

The gate is a constant to the gradient and at most 1, since 3 is a little more than ln 20. It reads the student of this very step and
no teacher. The mean is over all supervised tokens of the step, not over the sum of gates: a sure student takes smaller steps.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from distft.objectives.treatment import LiveField, ObjectiveRule, Signals, Treatment, treatment

HIGHEST = 3.0
"""What the authors divide by, for ln 20 = 2.996."""


class Eaft(ObjectiveRule):
    kind: Literal["eaft"]
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of the gate; the larger, the less is learned where the student is sure."""

    @property
    def live(self) -> Literal["no", "token", "sequence"]:
        return "token"

    @property
    def live_fields(self) -> frozenset[LiveField]:
        return frozenset({"top_entropy"})

    def treat(self, signals: Signals) -> Treatment:
        unsure = np.maximum(signals.student.top_entropy, 0)  # rounding may leave -1e-8, which has no power 0.5
        return treatment(len(signals), ce=((unsure / HIGHEST) ** self.alpha).astype(np.float32))
