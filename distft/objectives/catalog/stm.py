"""Selective token masking (arXiv 2501.14315): learn only the tokens that the teacher finds likely enough.

A token is kept when its perplexity 1/q(y_t) under the teacher is at most `tau`; the mean is over the kept tokens. At tau 2.5 about
a fifth of a typical answer is masked, and with it most of the loss. Masking does not hold: see `stm_kl`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from distft.objectives.treatment import ObjectiveRule, Signals, Treatment, treatment


class Stm(ObjectiveRule):
    kind: Literal["stm"]
    tau: Annotated[float, Field(gt=1)] = 2.5
    """The highest perplexity that is still learned."""

    @property
    def needs_signals(self) -> bool:
        return True

    def kept(self, signals: Signals) -> npt.NDArray[np.bool_]:
        """Which tokens are learned: 1/q(y) <= tau, that is log q(y) >= -ln tau."""
        return signals.label_logprob >= -math.log(self.tau)

    def treat(self, signals: Signals) -> Treatment:
        kept = self.kept(signals).astype(np.float32)
        return treatment(len(signals), ce=kept, count=kept)
