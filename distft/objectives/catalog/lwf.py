"""Learn anchors, hold the rest (LAwF, github.com/longern/LAwF): few tokens are learned, all others stay with the teacher.

With anchors A, other supervised tokens R, and a target between label and teacher, m_t = c * delta(y_t) + (1 - c) * q_t:

    token_mean:  (alpha * sum over A of KL(m||p) + beta * sum over R of KL(q||p)) / (|A| + |R|)
    group_mean:   alpha * mean over A of KL(m||p) + beta * mean over R of KL(q||p)

KL(m||p) = c * CE(y, p) + (1 - c) * KL(q||p) + [(1 - c) * H(q) - H(m)], and the bracket knows nothing of p: the weights below give the
paper's gradient, and a loss that lacks this constant. Means are over the whole step; a step without anchors has no first term.

Anchors are `given` by annotation, or found by the `floor`: a token is one exactly if q(y) < p_star, the complement of what `stm`
learns at tau = 1/p_star. For floor anchors the authors choose c per token so that m(y) = p_star: that is `c: floor`, with
c_t = (p_star - q(y)) / (1 - q(y)).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from distft.objectives.treatment import Floats, Mask, ObjectiveRule, Signals, Treatment, treatment


class Lwf(ObjectiveRule):
    kind: Literal["lwf"]
    anchors: Literal["given", "floor"] = "floor"
    """given: those of the annotation; floor: the tokens whose label the teacher gives less than p_star."""
    p_star: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Of anchors: floor."""
    alpha: Annotated[float, Field(gt=0)] = 4.0
    """Weight of an anchor."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(q||p) on a token that is no anchor; 0 lets them drift."""
    c: Annotated[float, Field(gt=0, le=1)] | Literal["floor"] = "floor"
    """How far an anchor's target lies from the teacher (0) towards the label alone (1); floor: as far as gives the label p_star. Left
    out or null it is floor for anchors: floor, and 0.999 for anchors: given."""
    normalise: Literal["token_mean", "group_mean"] = "token_mean"
    """One mean over all supervised tokens, or one over anchors and another over the rest."""

    @model_validator(mode="before")
    @classmethod
    def _confidence_by_anchors(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("c") is None:
            return {**given, "c": 0.999 if given.get("anchors") == "given" else "floor"}
        return given

    @model_validator(mode="after")
    def _floor_for_floor(self) -> Lwf:
        if self.c == "floor" and self.anchors != "floor":
            raise PydanticCustomError("c", "c: floor is about anchors: floor; give a number for anchors that are given")
        return self

    @property
    def needs_signals(self) -> bool:
        return self.anchors == "floor"

    @property
    def holds(self) -> bool:
        return self.beta > 0 or self.c != 1

    @property
    def needs_anchors(self) -> bool:
        return self.anchors == "given"

    @property
    def groups(self) -> int:
        return 2 if self.normalise == "group_mean" else 1

    def learned(self, signals: Signals) -> Mask:
        """Which tokens are anchors."""
        if self.anchors == "floor":
            return signals.label_logprob < math.log(self.p_star)
        if signals.anchors is None:
            raise ValueError("anchors: given, and the document has no annotation")
        return signals.anchors

    def confidence(self, signals: Signals) -> Floats | float:
        """c of each token; meaningful on anchors alone."""
        if self.c != "floor":
            return self.c
        lacking = np.maximum(self.p_star - np.exp(signals.label_logprob), 0)
        return (lacking / (lacking + 1 - self.p_star)).astype(np.float32)

    def treat(self, signals: Signals) -> Treatment:
        anchors, c = self.learned(signals), self.confidence(signals)
        ce = np.where(anchors, self.alpha * c, 0).astype(np.float32)
        kl = np.where(anchors, self.alpha * (1 - c), self.beta).astype(np.float32)
        group = anchors.astype(np.uint8) if self.normalise == "group_mean" else 0
        return treatment(len(signals), ce=ce, kl=kl, group=group)
