"""Anchored supervised fine-tuning (arXiv 2509.23753): `dft`, held to the teacher.

    loss = mean over supervised tokens of p(y_t) * CE_t + kl * KL(q||p)        p(y_t) is a constant to the gradient

The divergence goes from teacher to student; the authors found that the other direction collapses.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from distft.objectives.treatment import LiveField, ObjectiveRule, Signals, Treatment, treatment


class Asft(ObjectiveRule):
    kind: Literal["asft"]
    kl: Annotated[float, Field(gt=0)] = 0.05
    """Weight of KL(q||p) on each token; the paper's lambda."""

    @property
    def holds(self) -> bool:
        return True

    @property
    def live(self) -> Literal["no", "token", "sequence"]:
        return "token"

    @property
    def live_fields(self) -> frozenset[LiveField]:
        return frozenset({"label_logprob"})

    def treat(self, signals: Signals) -> Treatment:
        return treatment(len(signals), ce=np.exp(signals.student.label_logprob), kl=self.kl)
