"""Signals in, treatment out: the algebra that every objective speaks.

An objective looks at what is known of each supervised token and says what to do with it, as five weights:

    loss_t = ce_t * CE(y_t, p) + kl_t * KL(q||p) + rkl_t * KL(p||q) - entropy_t * H(p) + collision_t * C(p)

with C(p) the sum of p_v squared, the chance that two draws from p are the same token. None is negative but `entropy`, which rewards
H(p) where it is above 0 and punishes it where it is below.

Every token belongs to a group, nearly always the only one. The step's loss is the sum over groups of

    sum of loss_t over the group's tokens / sum of count_t over the same tokens, of all ranks and micro-batches

and a group without a count adds nothing. Counts and groups are known before the first backward pass: they follow from cached signals
and annotation alone, even where weights follow from the student (`live`). Weights that come from the student are constants to the
gradient.

numpy only: rules must be readable and testable without torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field

from distft.config.section import Section

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

LiveField = Literal["label_logprob", "entropy", "top_entropy", "kl", "rkl", "collision"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSignals:
    """What the student says of the same tokens at this very step, detached. Fields that a rule does not name in `live_fields` may hold
    NaN, which betrays one that reads them."""

    label_logprob: Floats
    """log p(y_t), from the whole vocabulary."""
    entropy: Floats
    """H(p) in nats, from the whole vocabulary."""
    top_entropy: Floats
    """Entropy in nats of the softmax over p's 20 highest logits; of all of them where there are fewer."""
    kl: Floats
    """KL(q||p) in nats, as the loss computes it."""
    rkl: Floats
    """KL(p||q) in nats, as the loss computes it."""
    collision: Floats
    """C(p), from the whole vocabulary."""


def live_signals(tokens: int, **known: Floats) -> LiveSignals:
    """Live signals of which the named ones are known."""
    blank = np.full(tokens, np.nan, np.float32)
    return LiveSignals(**{**dict.fromkeys(get_args(LiveField), blank), **known})


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What is known of the supervised tokens of one document, in token order. `entropy` and `rank` are the teacher's."""

    label_logprob: Floats
    """log q(y_t), from the whole vocabulary."""
    entropy: Floats
    """H(q) in nats, from the whole vocabulary."""
    rank: npt.NDArray[np.uint32]
    """How many tokens the teacher finds likelier than y_t."""
    document: str = ""
    """The document's digest, 32 hex digits: what seeded randomness is drawn from, so that no layout changes it."""
    anchors: Mask | None = None
    """Which tokens somebody marked as the ones to be learned; None without an annotation."""
    vocabulary: int = 0
    """How many tokens the student's distribution is over, for entropies as a share of the highest possible one; 0: not said."""
    rounding: float = 1e-5
    """Nats by which two passes of equal weights over the same token may be apart."""
    follows: Mask | None = None
    """Which tokens stand right behind another supervised one; None: all but the first."""
    live: LiveSignals | None = None
    """Given to rules that are `live`, None to all others."""

    def __len__(self) -> int:
        return len(self.label_logprob)

    @property
    def student(self) -> LiveSignals:
        """The live signals, for rules that cannot do without: with none, weights of 0 would train nothing in silence."""
        if self.live is None:
            raise ValueError("this rule reads the student of the step, and was given no live signals")
        return self.live


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """Five weights per token, what the token adds to the normaliser, and which normaliser that is."""

    ce: Floats
    kl: Floats
    rkl: Floats
    entropy: Floats
    count: Floats
    group: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    """Left out: all tokens are of group 0."""
    collision: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    """Left out: no token has one. It exists for `eksft`'s replica of published code, and costs others nothing."""

    def __post_init__(self) -> None:
        if len(self.collision) == 0:
            object.__setattr__(self, "collision", np.broadcast_to(np.float32(0), (len(self.count),)))
        if len(self.group) == 0:
            object.__setattr__(self, "group", np.zeros(len(self.count), np.uint8))
        elif len(self.group) != len(self.count):
            raise ValueError(f"{len(self.group)} groups for {len(self.count)} tokens")


def treatment(
    tokens: int, *, ce: Floats | float = 0.0, kl: Floats | float = 0.0, rkl: Floats | float = 0.0,
    entropy: Floats | float = 0.0, collision: Floats | float = 0.0, count: Floats | float = 1.0,
    group: npt.NDArray[np.uint8] | int = 0,
) -> Treatment:  # fmt: skip
    """Spreads numbers over `tokens` tokens; arrays are taken as they are."""

    def column(value: Floats | float) -> Floats:
        return np.broadcast_to(np.asarray(value, np.float32), (tokens,))

    groups = np.broadcast_to(np.asarray(group, np.uint8), (tokens,))
    return Treatment(
        ce=column(ce), kl=column(kl), rkl=column(rkl), entropy=column(entropy), collision=column(collision), count=column(count),
        group=groups,
    )  # fmt: skip


def share_of(fraction: float, tokens: int) -> int:
    """floor(fraction * tokens), meant as decimals: 0.29 of 100 is 29, though the product in binary is a hair below."""
    return math.floor(fraction * tokens + 1e-9)


def follows(supervised: Mask) -> Mask:
    """Of each of a document's supervised tokens, whether it stands right behind another one."""
    return np.diff(np.flatnonzero(supervised), prepend=-2) == 1


def highest(values: Floats, count: int) -> Mask:
    """Which are the `count` highest; among equals the earlier ones are."""
    chosen = np.zeros(len(values), np.bool_)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen


class ObjectiveRule(Section, ABC):
    """What an objective's file defines: its settings as fields, `kind` as its name, and its rule as `treat`."""

    prompt_kl: Annotated[float, Field(ge=0)] = 0.0
    """Hold the prompt, too: KL(q||p) on the tokens before and between what is supervised (SelfAug, arXiv 2509.03934). The mean over
    a document's prompt weighs this many times as much as the mean over its answer. Needs score.positions=all."""

    drift_budget: Annotated[float, Field(gt=0)] | None = None
    """How far the model may move on held-out text, in nats per token. All weights on divergences are then multiplied by a factor that
    measured drift controls; the weights given here are where it starts. null: they stay as they are."""

    @property
    def needs_signals(self) -> bool:
        """True when `treat` reads the teacher's signals."""
        return False

    @property
    def needs_distribution(self) -> bool:
        """True when any token may get a weight on KL(q||p) or KL(p||q), or when `treat` reads one of them."""
        return self.holds or self.prompt_kl > 0

    @property
    def holds(self) -> bool:
        """True when any token of an answer may get a weight on KL(q||p) or KL(p||q), with these settings."""
        return False

    @property
    def needs_tail(self) -> bool:
        """True when any token may get a weight on KL(p||q), or when `treat` reads it. It asks the teacher about all that the student
        would say: draws from the teacher cannot answer."""
        return False

    @property
    def needs_anchors(self) -> bool:
        """True when `treat` reads annotated anchors."""
        return False

    @property
    def needs_document(self) -> bool:
        """True when `treat` draws at random, and so reads the document's digest."""
        return False

    @property
    def softening(self) -> float:
        """The temperature of both sides of every divergence, whose square the weights are to hold. Other than 1, it asks the teacher
        about the whole vocabulary."""
        return 1.0

    @property
    def live(self) -> Literal["no", "token", "sequence"]:
        """Whether weights depend on the student of this step. token: each token's on that token's own signals, so that they can be
        decided wherever the token is; sequence: on those of all of its document."""
        return "no"

    @property
    def live_fields(self) -> frozenset[LiveField]:
        """Which live signals `treat` reads; empty unless `live`."""
        return frozenset()

    @property
    def groups(self) -> int:
        """How many normalisers a step has; groups are numbered from 0."""
        return 1

    @abstractmethod
    def treat(self, signals: Signals) -> Treatment:
        """The weights of each token of one document. Pure: no state, no randomness beyond what settings and document fix. `count` and
        `group` never depend on `signals.live`."""

    def counts(self, signals: Signals) -> tuple[Floats, npt.NDArray[np.uint8]]:
        """`count` and `group` of each token, before the student has been asked: what a step's totals are made of. NaN in the place of
        all live signals betrays a count that depends on one."""
        made = self.treat(signals if self.live == "no" else replace(signals, live=live_signals(len(signals))))
        return made.count, made.group

    def prompt_weight(self, supervised: int, prompt: int) -> float:
        """The weight of KL(q||p) on each of a document's `prompt` tokens, which are of group 0 and count nothing:
        prompt_kl * supervised / prompt. The document then adds supervised * (mean over the answer + prompt_kl * mean over the prompt)
        to the step, however long its prompt is. For `stm`, whose answer is a mean over kept tokens alone, `supervised` is what the
        document counts. A temperature's square is part of it, as it is in `kd`."""
        return self.prompt_kl * self.softening**2 * supervised / prompt if prompt else 0.0
