"""STM that also holds: cross-entropy on the tokens that `stm` keeps, KL to the teacher on those that it masks.

The mean is over all supervised tokens, so that a step of masked tokens alone still has a meaning.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from distft.objectives.catalog.stm import Stm
from distft.objectives.treatment import Signals, Treatment, treatment


class StmKl(Stm):
    kind: Literal["stm_kl"]  # pyright: ignore[reportIncompatibleVariableOverride]  (a rule of its own, sharing stm's selection)
    kl: Annotated[float, Field(gt=0)] = 1.0
    """Weight of KL(q||p) on each masked token."""

    @property
    def holds(self) -> bool:
        return True

    def treat(self, signals: Signals) -> Treatment:
        kept = self.kept(signals).astype(np.float32)
        return treatment(len(signals), ce=kept, kl=self.kl * (1 - kept))
