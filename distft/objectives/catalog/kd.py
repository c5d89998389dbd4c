"""Distillation from another model (Hinton et al., arXiv 1503.02531, at temperature 1): label and teacher share each token.

    loss = mean over supervised tokens of (1 - lam) * CE + lam * KL(q||p)

With the model as its own teacher this is `sft_kl` at another scale.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distft.objectives.treatment import ObjectiveRule, Signals, Treatment, treatment


class Kd(ObjectiveRule):
    kind: Literal["kd"]
    lam: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The teacher's share; 1: the label does not count."""

    @property
    def needs_distribution(self) -> bool:
        return True

    def treat(self, signals: Signals) -> Treatment:
        return treatment(len(signals), ce=1 - self.lam, kl=self.lam)
