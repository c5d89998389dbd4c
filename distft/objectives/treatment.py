"""Signals in, treatment out: the algebra that every objective speaks.

An objective looks at what is known of each supervised token and says what to do with it, as four non-negative weights:

    loss_t = ce_t * CE(y_t, p) + kl_t * KL(q||p) + rkl_t * KL(p||q) - entropy_t * H(p)

The step's loss is the sum over its tokens divided by one number, the sum of `count` over the same tokens of all ranks and
micro-batches. Both are known before the first backward pass when the objective reads cached signals only.

numpy only: rules must be readable and testable without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distft.config.section import Section

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What is known of the supervised tokens of one document, in token order. `entropy` and `rank` are the teacher's."""

    label_logprob: Floats
    """log q(y_t), from the whole vocabulary."""
    entropy: Floats
    """H(q) in nats, from the whole vocabulary."""
    rank: npt.NDArray[np.uint32]
    """How many tokens the teacher finds likelier than y_t."""

    def __len__(self) -> int:
        return len(self.label_logprob)


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """Four weights per token and what the token adds to the normaliser."""

    ce: Floats
    kl: Floats
    rkl: Floats
    entropy: Floats
    count: Floats


def treatment(
    tokens: int, *, ce: Floats | float = 0.0, kl: Floats | float = 0.0, rkl: Floats | float = 0.0,
    entropy: Floats | float = 0.0, count: Floats | float = 1.0,
) -> Treatment:  # fmt: skip
    """Spreads numbers over `tokens` tokens; arrays are taken as they are."""

    def column(value: Floats | float) -> Floats:
        return np.broadcast_to(np.asarray(value, np.float32), (tokens,))

    return Treatment(ce=column(ce), kl=column(kl), rkl=column(rkl), entropy=column(entropy), count=column(count))


class ObjectiveRule(Section):
    """What an objective's file defines: its settings as fields, `kind` as its name, and its rule as `treat`."""

    @property
    def needs_signals(self) -> bool:
        """True when `treat` reads the teacher's signals."""
        return False

    @property
    def needs_distribution(self) -> bool:
        """True when any token may get a weight on KL(q||p) or KL(p||q)."""
        return False

    @property
    def needs_tail(self) -> bool:
        """True when any token may get a weight on KL(p||q), which asks the teacher about all that the student would say: draws
        from the teacher cannot answer."""
        return False

    def treat(self, signals: Signals) -> Treatment:
        """The weights of each token. Pure: no state, no randomness beyond what the settings fix."""
        raise NotImplementedError  # abstract: each catalog entry has its own rule
