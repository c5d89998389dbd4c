"""EKSFT, masking by entropy and divergence (arXiv 2605.29303): do not learn where the student wavers or has moved; hold it there.

For a sequence of n supervised tokens R and k = floor(rho * n), with M_H the k tokens of the highest H(p), M_KL the k of the highest
KL(p||q), and M their union or intersection:

    loss = mean CE over R without M  -  lambda_entropy * mean H(p)/log V over M_H  +  lambda_kl * mean KL(p||q) over M_KL

A step is the mean of its sequences' losses weighted by their n, so weights carry n over the size of their set, and every token counts
1. An empty set adds nothing: below 1/rho tokens nothing is masked, and if M is all of R nothing is learned. Among equals the earlier
token is chosen. Masks come from the student of this very step and are constants to the gradient.

This is the paper's formula, not its published code, which shifts the mask by one token, takes p for log p in the divergence, chooses
over a micro-batch, and nudges both lambdas by 5 % a step.

While the student still is its teacher, KL(p||q) is rounding noise, and the k highest would be masked for no reason, others in each
layout. So a token has moved only beyond `Signals.rounding`: at first M_KL is empty, and M is M_H or, as an intersection, empty too.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from distft.objectives.treatment import Floats, LiveField, Mask, ObjectiveRule, Signals, Treatment, highest, share_of, treatment


class Eksft(ObjectiveRule):
    kind: Literal["eksft"]
    rho: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Which share of a sequence's tokens each of the two criteria chooses."""
    lambda_kl: Annotated[float, Field(ge=0)] = 0.05
    """Weight of KL(p||q) on the tokens that have moved most."""
    lambda_entropy: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the entropy bonus, as a share of log V, on the tokens of the highest entropy."""
    combine: Literal["union", "intersection"] = "union"
    """Which tokens are not learned: those that either criterion chooses, or both."""

    @property
    def holds(self) -> bool:
        return self.lambda_kl > 0

    @property
    def needs_distribution(self) -> bool:
        return True

    @property
    def needs_tail(self) -> bool:
        return True

    @property
    def live(self) -> Literal["no", "token", "sequence"]:
        return "sequence"

    @property
    def live_fields(self) -> frozenset[LiveField]:
        return frozenset({"entropy", "rkl"})

    def treat(self, signals: Signals) -> Treatment:
        n, live = len(signals), signals.student
        chosen = share_of(self.rho, n)
        unsure, moved = highest(live.entropy, chosen), highest(live.rkl, chosen) & (live.rkl > signals.rounding)
        masked = unsure | moved if self.combine == "union" else unsure & moved
        return treatment(
            n, ce=_spread(n, ~masked), rkl=self.lambda_kl * _spread(n, moved), entropy=self._bonus(signals) * _spread(n, unsure)
        )

    def _bonus(self, signals: Signals) -> float:
        """The weight of H(p) in nats: the paper's H(p) is a share of the highest possible entropy."""
        if self.lambda_entropy == 0:
            return 0.0
        if signals.vocabulary < 2:
            raise ValueError("the entropy bonus is a share of log V, and the size of the vocabulary is not said")
        return self.lambda_entropy / math.log(signals.vocabulary)


def _spread(n: int, chosen: Mask) -> Floats:
    """n times the mean over the chosen tokens, as a weight on each."""
    return chosen.astype(np.float32) * np.float32(n / max(1, int(chosen.sum())))
