"""What objectives will do with the tokens of a scored corpus, before anything is trained: shares of tokens and of loss.

A share of loss is one of the teacher's cross-entropy, -log q(y): where training starts from, as long as the student is the teacher.
Objectives that decide by the student of each step (`live`) are asked at step 0, where p = q: its entropy and log p(y) are those of the
cache, and both divergences are 0. With another model as the teacher step 0 is not known, and they stay undecided.

Pure: arrays in, figures out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from distft.config.schema import NoDistribution, Run, Sample
from distft.corpus.reader import Document
from distft.objectives.catalog import Eaft, Eksft, Objective, Stm, Talr
from distft.objectives.quadrants import LIKELY, QUADRANTS, UNSURE, quadrants
from distft.objectives.treatment import ObjectiveRule, Signals, Treatment, follows, live_signals

TREATMENTS = ("learned", "both", "held", "entropy", "masked", "live")
"""In the order in which they are told. both: learned and held; entropy: an entropy bonus and nothing else; masked: no weight at all;
live: decided by the student, and not known yet."""
LEARNED, BOTH, HELD, ENTROPY, MASKED, LIVE = range(6)

TAUS = (1.5, 2.5, 10.0, 25.0, 1000.0)
NEGLIGIBLE = 0.01
"""Of cross-entropy and divergence on one token, a weight below this share of the other's does not name the treatment: an anchor of
`lwf` with c = 0.999 is learned."""

MOST_DOCUMENTS, MOST_TOKENS, MOST_BYTES = 4_000, 600_000, 48 << 20
"""What is looked at, at most: a few seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A document and what the teacher said of its supervised tokens, in token order."""

    document: Document
    signals: Signals
    entries: npt.NDArray[np.uint16]
    """How many tokens of the distribution are kept, for each."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """An objective on all documents that were looked at. Arrays are over all their supervised tokens, one document after another."""

    rule: ObjectiveRule
    configured: bool
    """Whether it is the run file's own."""
    codes: npt.NDArray[np.int8]
    """The treatment of each token, as a place in TREATMENTS."""
    weights: npt.NDArray[np.float32]
    """ce, kl, rkl and entropy of each token, [4, tokens]; NaN where they are not known. A collision is none at step 0, where nothing
    has moved."""
    counts: npt.NDArray[np.float32]
    groups: npt.NDArray[np.uint8]

    @property
    def known(self) -> bool:
        return not bool((self.codes == LIVE).any())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {key: value for key, value in self.rule.model_dump(exclude_defaults=True).items() if key != "kind"}

    @property
    def name(self) -> str:
        return " ".join([self.rule.model_dump()["kind"], *(f"{key}={_short(value)}" for key, value in self.settings.items())])


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """The documents, and every objective on them; the run file's own comes first."""

    seen: Sequence[Seen]
    applied: Sequence[Applied]
    left_out: dict[str, str]
    """Objectives of the catalog that this cache cannot serve, and why."""
    own_teacher: bool
    """Whether the student is its teacher at step 0."""
    held: int
    """Training documents that the cache holds, and how many there are."""
    rows: int

    @cached_property
    def label_logprob(self) -> npt.NDArray[np.float32]:
        return np.concatenate([np.zeros(0, np.float32), *(one.signals.label_logprob for one in self.seen)])

    @cached_property
    def entropy(self) -> npt.NDArray[np.float32]:
        return np.concatenate([np.zeros(0, np.float32), *(one.signals.entropy for one in self.seen)])

    @cached_property
    def ce(self) -> npt.NDArray[np.float64]:
        """The teacher's cross-entropy of each token."""
        return -self.label_logprob.astype(np.float64)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Where each document's tokens begin, and where the last one's end."""
        return np.cumsum([0, *(len(one.signals) for one in self.seen)], dtype=np.int64)

    @cached_property
    def quadrant(self) -> npt.NDArray[np.int8]:
        """Each token's place in QUADRANTS."""
        return np.concatenate([np.zeros(0, np.int8), *(quadrants(one.signals) for one in self.seen)])

    def sweep(self, taus: Sequence[float] = TAUS) -> list[dict[str, float]]:
        """What `stm` would mask at each tau, by its own comparison: shares of tokens and of cross-entropy."""
        signals = Signals(label_logprob=self.label_logprob, entropy=self.entropy, rank=np.zeros(len(self.ce), np.uint32))
        found = []
        for tau in taus:
            masked = ~Stm(kind="stm", tau=tau).kept(signals)
            found.append({"tau": tau, "tokens": _share(masked), "ce": _share(masked, self.ce)})
        return found

    def shares(self, one: Applied, of: npt.NDArray[np.bool_] | slice = slice(None)) -> dict[str, dict[str, float]]:
        """Shares of tokens and of cross-entropy by treatment, over all tokens or some; each adds up to 1."""
        codes, ce = one.codes[of], self.ce[of]
        tokens, mass = np.bincount(codes, minlength=6), np.bincount(codes, weights=ce, minlength=6)
        return {
            name: {"tokens": float(tokens[n]) / max(1, len(codes)), "ce": float(mass[n] / ce.sum()) if ce.sum() > 0 else 0.0}
            for n, name in enumerate(TREATMENTS)
        }

    def loss(self, one: Applied) -> float | None:
        """The objective's own loss at step 0 over all these tokens: divergences are 0, so that cross-entropy and entropy remain."""
        if not self.own_teacher or not one.known:
            return None
        per_token = one.weights[0] * self.ce - one.weights[3] * self.entropy.astype(np.float64)
        total = 0.0
        for group in range(one.rule.groups):
            mine = one.groups == group
            count = float(one.counts[mine].sum(dtype=np.float64))
            total += float(per_token[mine].sum()) / count if count > 0 else 0.0
        return total

    def objective(self, one: Applied) -> dict[str, Any]:
        """One objective, as `--json` prints it. Mean weights are over the quadrant's tokens; `hold` is KL in both directions."""
        basis = "fixed" if one.rule.live == "no" else "step 0" if one.known else "unknown"
        found = {}
        for n, name in enumerate(QUADRANTS):
            mine = self.quadrant == n
            weights = one.weights[:, mine]
            mean = weights.mean(axis=1, dtype=np.float64) if mine.any() and one.known else None
            found[name] = {
                "treatments": {key: share["tokens"] for key, share in self.shares(one, mine).items()},
                "mean_ce_weight": None if mean is None else float(mean[0]),
                "mean_hold_weight": None if mean is None else float(mean[1] + mean[2]),
            }
        return {
            "kind": one.rule.model_dump()["kind"], "name": one.name, "settings": one.settings, "configured": one.configured,
            "basis": basis, "notes": notes(one, own_teacher=self.own_teacher), "treatments": self.shares(one),
            "mean_ce_weight": float(one.weights[0].mean(dtype=np.float64)) if one.known and len(self.ce) else None,
            "loss_at_step_0": self.loss(one), "quadrants": found,
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """All of it, as `--json` prints it under `tokens`. Every share is between 0 and 1."""
        count = max(1, len(self.ce))
        return {
            "documents": len(self.seen), "documents_held": self.held, "documents_in_corpus": self.rows,
            "supervised_tokens": len(self.ce), "mean_ce": float(self.ce.sum()) / count,
            "mean_entropy": float(self.entropy.sum(dtype=np.float64)) / count,
            "student_is_teacher": self.own_teacher,
            "entropy_threshold": UNSURE, "probability_threshold": LIKELY,
            "quadrants": {
                name: {"tokens": _share(self.quadrant == n), "ce": _share(self.quadrant == n, self.ce)}
                for n, name in enumerate(QUADRANTS)
            },
            "sweep": self.sweep(), "objectives": [self.objective(one) for one in self.applied], "left_out": self.left_out,
        }  # fmt: skip


def plan_tokens(run: Run, seen: Sequence[Seen], *, held: int, rows: int, vocabulary: int) -> TokenPlan:
    """The run's objective, and every other of the catalog at its defaults that its cache can serve. `vocabulary` is the number of
    tokens that the student chooses among."""
    given = [
        replace(one, signals=replace(one.signals, document=one.document.digest, vocabulary=vocabulary,
                                     anchors=one.document.anchors[one.document.supervised],
                                     follows=follows(one.document.supervised)))
        for one in seen
    ]  # fmt: skip
    own_teacher = run.teacher.path is None
    rules, left_out = _catalog(run)
    applied = [_apply(rule, given, configured=n == 0, own_teacher=own_teacher) for n, rule in enumerate(rules)]
    return TokenPlan(seen=given, applied=applied, left_out=left_out, own_teacher=own_teacher, held=held, rows=rows)


def at_step_0(rule: ObjectiveRule, signals: Signals, *, own_teacher: bool) -> Treatment | None:
    """What the rule says of one document before the first step; None where that takes a student who is not its teacher."""
    if rule.live == "no":
        return rule.treat(signals)
    if not own_teacher:
        return None
    zero = np.zeros(len(signals), np.float32)
    # The cache has no entropy of the 20 highest logits. That of all is near it where the model is sure and above it where the tail is
    # heavy; it is cut at the most that 20 tokens can have.
    top = np.minimum(signals.entropy, np.float32(math.log(20)))
    # The collision is not known, and no rule reads it of a token that has not moved.
    live = live_signals(
        len(signals), label_logprob=signals.label_logprob, entropy=signals.entropy, top_entropy=top, kl=zero, rkl=zero
    )
    return rule.treat(replace(signals, live=live))


def codes(made: Treatment) -> npt.NDArray[np.int8]:
    """The treatment that each token's weights amount to."""
    hold = made.kl + made.rkl + made.collision
    learned, held = (made.ce > 0) & (made.ce >= NEGLIGIBLE * hold), (hold > 0) & (hold >= NEGLIGIBLE * made.ce)
    return np.select(
        [learned & held, learned, held, made.entropy > 0], [BOTH, LEARNED, HELD, ENTROPY], default=MASKED
    ).astype(np.int8)  # fmt: skip


def notes(one: Applied, *, own_teacher: bool) -> list[str]:
    """What must be known to read the figures of an objective right."""
    rule, found = one.rule, []
    if rule.live != "no" and own_teacher:
        found.append("Its weights follow from the student of each step. This is step 0, where the student is the teacher.")
    elif rule.live != "no":
        found.append(
            "Its weights follow from the student of each step, and with another model as the teacher step 0 is not known."
        )
    if isinstance(rule, Talr):
        found.append("A variant: tokens are compared within their own document, and a hard document is not weighed down.")
    if isinstance(rule, Eaft) and own_teacher:
        found.append("The entropy of its 20 likeliest tokens is taken to be that of all, at most ln 20.")
    if isinstance(rule, Eksft) and own_teacher and rule.lambda_kl > 0:
        later = (
            "hold, and not learn, up to rho of each document"
            if rule.variant == "paper"
            else "hold up to rho of each document, and not learn the tokens before those"
        )
        found.append(f"No token has moved at step 0, so it holds none yet; later it will {later}.")
    if rule.prompt_kl > 0:
        found.append("It holds the prompts, too; shares are of supervised tokens alone.")
    return found


def _apply(rule: ObjectiveRule, seen: Sequence[Seen], *, configured: bool, own_teacher: bool) -> Applied:
    found, weights = [np.zeros(0, np.int8)], [np.zeros((4, 0), np.float32)]
    counts, groups = [np.zeros(0, np.float32)], [np.zeros(0, np.uint8)]
    for one in seen:
        made = at_step_0(rule, one.signals, own_teacher=own_teacher)
        if made is None:
            number = len(one.signals)
            count, group = rule.counts(one.signals)
            found.append(np.full(number, LIVE, np.int8))
            weights.append(np.full((4, number), np.nan, np.float32))
        else:
            count, group = made.count, made.group
            found.append(codes(made))
            weights.append(np.stack([made.ce, made.kl, made.rkl, made.entropy]))
        counts.append(count)
        groups.append(group)
    return Applied(
        rule=rule, configured=configured, codes=np.concatenate(found), weights=np.concatenate(weights, axis=1),
        counts=np.concatenate(counts), groups=np.concatenate(groups),
    )  # fmt: skip


def _catalog(run: Run) -> tuple[list[ObjectiveRule], dict[str, str]]:
    """The run's rule, then the others at their defaults; and those that its cache cannot serve."""
    rules: list[ObjectiveRule] = [run.objective]
    left_out: dict[str, str] = {}
    policy = run.score.distribution
    for kind in get_args(Objective):
        rule: ObjectiveRule = kind.model_validate({"kind": get_args(kind.model_fields["kind"].annotation)[0]})
        name = rule.model_dump()["kind"]
        if rule == run.objective:
            continue
        if rule.needs_distribution and isinstance(policy, NoDistribution):
            left_out[name] = "the cache keeps no distributions"
        elif rule.needs_tail and isinstance(policy, Sample):
            left_out[name] = "KL(p||q) cannot be had from draws"
        elif rule.needs_anchors:
            left_out[name] = "it needs annotated anchors"
        else:
            rules.append(rule)
    return rules, left_out


def _share(chosen: npt.NDArray[np.bool_], weights: npt.NDArray[np.float64] | None = None) -> float:
    if weights is None:
        return float(chosen.mean()) if len(chosen) else 0.0
    total = float(weights.sum())
    return float(weights[chosen].sum()) / total if total > 0 else 0.0


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
