"""Token-adaptive loss reweighting within each sequence, after TALR (arXiv 2509.20758): learn less where the student finds the label
unlikely, compared with the rest of the same document.

    loss = mean over supervised tokens of w_t * CE_t        w_t = max(p(y_t)^(1/tau), w_min), a constant to the gradient

This is a variant. The paper's temperature tau is the median over the batch of each sequence's mean NLL; here it is the sequence's own
mean NLL, since a median over a batch depends on what else is in the micro-batch and on the rank, and the same step would differ from
layout to layout (law 7). So two things of the paper are not reproduced. A hard sequence is not weighed down against easy ones: only
hard tokens within each are. And weights are not normalised on a simplex over the batch's tokens: they do not add up to anything. A
sequence of one token always gets 1/e or w_min. tau is kept above a millionth of a nat, where every weight is 1 to any precision.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from distft.objectives.treatment import LiveField, ObjectiveRule, Signals, Treatment, treatment

LOWEST_TAU = 1e-6


class Talr(ObjectiveRule):
    kind: Literal["talr"]
    w_min: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The lowest weight of a token."""

    @property
    def live(self) -> Literal["no", "token", "sequence"]:
        return "sequence"

    @property
    def live_fields(self) -> frozenset[LiveField]:
        return frozenset({"label_logprob"})

    def treat(self, signals: Signals) -> Treatment:
        logprob = signals.student.label_logprob.astype(np.float64)
        tau = max(-float(logprob.sum()) / max(1, len(logprob)), LOWEST_TAU)
        return treatment(len(signals), ce=np.maximum(np.exp(logprob / tau), self.w_min).astype(np.float32))
