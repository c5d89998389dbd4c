"""Distillation from another model (Hinton et al., arXiv 1503.02531): label and teacher share each token.

    loss = mean over supervised tokens of (1 - lam) * CE + lam * T^2 * KL(q_T||p_T)        q_T, p_T: softmax of logits / T

A temperature above 1 shows more of what the teacher finds unlikely; the square keeps the divergence's gradient as large as at 1. It is
part of the weight: metrics tell KL(q_T||p_T) itself, in nats. What a truncated cache has left out cannot be softened, so a temperature
other than 1 needs score.distribution.kind=hidden. With the model as its own teacher and at temperature 1 this is `sft_kl` at another
scale.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distft.objectives.treatment import ObjectiveRule, Signals, Treatment, treatment


class Kd(ObjectiveRule):
    kind: Literal["kd"]
    lam: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The teacher's share; 1: the label does not count."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Of both distributions; other than 1 only with hidden states."""

    @property
    def holds(self) -> bool:
        return True

    @property
    def softening(self) -> float:
        return self.temperature

    def treat(self, signals: Signals) -> Treatment:
        return treatment(len(signals), ce=1 - self.lam, kl=self.lam * self.temperature**2)
