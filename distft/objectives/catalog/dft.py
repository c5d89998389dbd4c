"""Dynamic fine-tuning (arXiv 2508.05629): cross-entropy weighted by how likely the student finds the label already.

    loss = mean over supervised tokens of p(y_t) * CE_t        p(y_t) is a constant to the gradient

It learns little of what is new to the student, and holds nothing: see `asft`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from distft.objectives.treatment import LiveField, ObjectiveRule, Signals, Treatment, treatment


class Dft(ObjectiveRule):
    kind: Literal["dft"]

    @property
    def live(self) -> Literal["no", "token", "sequence"]:
        return "token"

    @property
    def live_fields(self) -> frozenset[LiveField]:
        return frozenset({"label_logprob"})

    def treat(self, signals: Signals) -> Treatment:
        return treatment(len(signals), ce=np.exp(signals.student.label_logprob))
