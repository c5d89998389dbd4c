"""EKSFT, masking by entropy and divergence (arXiv 2605.29303): do not learn where the student wavers or has moved; hold it there.

For a sequence of n supervised tokens R and k = floor(rho * n), with M_H the k tokens of the highest H(p), M_KL the k of the highest
KL(p||q), and M their union or intersection:

    loss = mean CE over R without M  -  lambda_entropy * mean H(p)/log V over M_H  +  lambda_kl * mean KL(p||q) over M_KL

A step is the mean of its sequences' losses weighted by their n, so weights carry n over the size of their set, and every token counts
1. An empty set adds nothing: below 1/rho tokens nothing is masked, and if M is all of R nothing is learned. Among equals the earlier
token is chosen. Masks come from the student of this very step and are constants to the gradient.

While the student still is its teacher, KL(p||q) is rounding noise, and the k highest would be masked for no reason, others in each
layout. So a token has moved only beyond `Signals.rounding`: at first M_KL is empty, and M is M_H or, as an intersection, empty too.

That is the paper's formula. `variant: published_code` is what the authors' code computes instead (github.com/MINE-USTC/EKSFT), for
whoever wants to reproduce its results:

    loss = mean CE over R without M'  -  a * lambda_entropy * mean H(p)/log V over M_H
                                      +  b * lambda_kl * mean [KL(p||q) + H(p) + sum of p_v^2] over M_KL

- M' is the labels that stand right before M. The score at a position is about the next token, and the code masks the position's own
  label. So the first label of a run of supervised tokens has no score there, since the position before it has no label. The last one
  has: that of whatever follows the run. No teacher cache has a row for that, so here it is no candidate, its label is always learned,
  and the k places go to the others.
- The regulariser has p where it means log p: sum p (p - log q), which is the bracket. The choice of M_KL is by the right divergence.
- Each lambda is nudged by 5 % from its setting at every step and never kept: a = 1.05 where the mean of H(p)/log V over M_H is below
  0.5, and b = 1.05 where the mean of the bracket over M_KL is above 2; else they are 0.95. Both are of each sequence by itself, as of
  micro-batches of one, and constants to the gradient.
- A step is the plain mean of its sequences' losses, as of micro-batches of one: tokens count 1/n. Whether the code divides by its 8
  accumulated micro-batches is up to the version of transformers; where it adds them up, its clip of 1 is `train.clip: 0.125` here.

Of its step 0, where p = q, noise in bfloat16 chooses M_KL. Nobody can replicate that, so what has not moved is not chosen here either,
and the same step is the same in every layout; once k tokens have moved there is no difference. Without any token chosen (k = 0) the
code ends with a division by zero, and this does not.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from distft.objectives.treatment import Floats, LiveField, Mask, ObjectiveRule, Signals, Treatment, highest, share_of, treatment

UP, DOWN = 1.05, 0.95
"""What the published code multiplies its two lambdas by."""
TARGET_ENTROPY, TARGET_KL = 0.5, 2.0
"""By these it chooses: entropy as a share of log V, and nats of its regulariser."""


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
    variant: Literal["paper", "published_code"] = "paper"
    """paper: the formula of the paper; published_code: what its authors' code does, mistakes included."""

    @model_validator(mode="after")
    def _no_budget_for_a_replica(self) -> Eksft:
        if self.variant == "published_code" and self.drift_budget is not None:
            raise PydanticCustomError(
                "variant", "drift_budget controls weights on divergences, and what variant: published_code holds by is more than a "
                "divergence; take variant: paper, or drift_budget: null",
            )  # fmt: skip
        return self

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
        if self.variant == "published_code" and self.holds:
            return frozenset({"entropy", "rkl", "collision"})
        return frozenset({"entropy", "rkl"})

    def treat(self, signals: Signals) -> Treatment:
        if self.variant == "published_code":
            return self._as_published(signals)
        n, live = len(signals), signals.student
        chosen = share_of(self.rho, n)
        unsure, moved = highest(live.entropy, chosen), highest(live.rkl, chosen) & (live.rkl > signals.rounding)
        masked = unsure | moved if self.combine == "union" else unsure & moved
        return treatment(
            n, ce=_spread(n, ~masked), rkl=self.lambda_kl * _spread(n, moved), entropy=self._bonus(signals) * _spread(n, unsure)
        )

    def _as_published(self, signals: Signals) -> Treatment:
        n, live = len(signals), signals.student
        scored = np.arange(n) > 0 if signals.follows is None else signals.follows
        chosen = share_of(self.rho, n)
        unsure, moved = (highest(np.where(scored, score, -np.inf), chosen) & scored for score in (live.entropy, live.rkl))
        moved &= live.rkl > signals.rounding
        masked = unsure | moved if self.combine == "union" else unsure & moved
        learned = ~np.append(masked[1:], np.zeros(min(n, 1), np.bool_))  # the token before each that is chosen is not
        per_nat, regulariser = self._bonus(signals), live.rkl + live.entropy + live.collision
        sure = per_nat * _mean(live.entropy, unsure) < self.lambda_entropy * TARGET_ENTROPY
        bonus: Floats = _spread(1, unsure) * np.float32(per_nat * (UP if sure else DOWN))
        held: Floats = _spread(1, moved) * np.float32(self.lambda_kl * (UP if _mean(regulariser, moved) > TARGET_KL else DOWN))
        return treatment(n, ce=_spread(1, learned), rkl=held, entropy=bonus - held, collision=held, count=1 / max(1, n))

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


def _mean(values: Floats, chosen: Mask) -> float:
    """Over the chosen tokens; of none, 0."""
    return float(values[chosen].sum(dtype=np.float64)) / max(1, int(chosen.sum()))
