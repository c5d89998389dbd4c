"""Selective token masking (arXiv 2501.14315): learn only the tokens that the teacher finds likely enough.

    loss = sum_t m_t * CE_t / sum_t m_t        m_t = 1 where the perplexity 1/q(y_t) is at most tau

The mean is over the kept tokens of the whole step. At tau 2.5 about a fifth of a typical answer is masked, and with it most of the
loss. Masking does not hold: see `stm_kl`. Instead of by `tau`, each document can be masked by `fraction`: its floor(fraction * n)
tokens of the highest perplexity, the earlier ones among equals.

`select` has the controls of the paper's ablation: they mask as many tokens of each document as `highest` would, but others. The paper
masks perplexities *below* tau for `lowest`, which are four fifths of an answer; that would compare masks of different sizes. For
`random` its code draws with replacement over prompt and answer, which masks fewer answer tokens than it says; here it is without
replacement and over supervised tokens alone, drawn from (seed, digest of the document), so the mask is the same in every epoch and
layout.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from distft.objectives.treatment import Mask, ObjectiveRule, Signals, Treatment, highest, share_of, treatment


class Stm(ObjectiveRule):
    kind: Literal["stm"]
    tau: Annotated[float, Field(gt=1)] | None = 2.5
    """The highest perplexity that is still learned; null where `fraction` is given."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of tau: which share of each document's tokens is masked."""
    select: Literal["highest", "lowest", "random"] = "highest"
    """Which tokens are masked: those of the highest perplexity, or as many others, as a control."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of select: random."""

    @model_validator(mode="before")
    @classmethod
    def _fraction_replaces_the_default(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("fraction") is not None and "tau" not in given:
            return {**given, "tau": None}
        return given

    @model_validator(mode="after")
    def _one_measure(self) -> Stm:
        if (self.tau is None) == (self.fraction is None):
            raise PydanticCustomError("measure", "tau and fraction both say how much is masked: give one, and null for the other")
        return self

    @property
    def needs_signals(self) -> bool:
        return self.tau is not None or self.select != "random"

    @property
    def needs_document(self) -> bool:
        return self.select == "random"

    def kept(self, signals: Signals) -> Mask:
        """Which tokens are learned: 1/q(y) <= tau, that is log q(y) >= -ln tau; or all but the fraction; or as many of others."""
        if self.tau is not None:
            kept = signals.label_logprob >= -math.log(self.tau)
        else:
            kept = ~highest(-signals.label_logprob, share_of(self.fraction or 0.0, len(signals)))
        if self.select == "highest":
            return kept
        masked = len(kept) - int(kept.sum())
        return ~(self._drawn(signals, masked) if self.select == "random" else highest(signals.label_logprob, masked))

    def _drawn(self, signals: Signals, count: int) -> Mask:
        """So many tokens at random. Philox keyed by (seed, digest), as an epoch's order is."""
        if not signals.document:
            raise ValueError("select: random draws from the document's digest, and there is none")
        key = np.array([self.seed, int(signals.document[:16], 16)], np.uint64)
        drawn = np.zeros(len(signals), np.bool_)
        drawn[np.random.Generator(np.random.Philox(key=key)).permutation(len(signals))[:count]] = True
        return drawn

    def treat(self, signals: Signals) -> Treatment:
        kept = self.kept(signals).astype(np.float32)
        return treatment(len(signals), ce=kept, count=kept)
