"""Objectives that look at the student of the step itself: between the student's word on a micro-batch and the weights of its tokens.

The rule is the same pure function of a document's signals as any other; here it gets the live ones, too. Prompt tokens that are held
stand behind each document's answer and keep the weight that they came with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distft.engine.world import World
from distft.objectives.loss import PARTS, Targets, TokenValues, Weights
from distft.objectives.treatment import Floats, LiveField, ObjectiveRule, Signals, Treatment, live_signals
from distft.train.targets import ALONE, Treated


@dataclass(frozen=True, slots=True)
class LiveTreatment:
    """The rule, and what it is told of the documents of a micro-batch."""

    rule: ObjectiveRule
    documents: Sequence[Signals]
    fixed: Floats
    """The weight on KL(q||p) of each token of the batch that is no answer's, and 0 for the others."""
    answers: npt.NDArray[np.bool_]
    """Which tokens of the batch are answers'."""
    kl_factor: float = 1.0
    """Multiplies all divergences."""
    owners: npt.NDArray[np.int64] | None = None
    """Which rank of `team` has each token, for a rule of whole documents; None: all are this rank's."""
    team: World = ALONE

    @classmethod
    def of(cls, rule: ObjectiveRule, treated: Sequence[Treated]) -> LiveTreatment:
        known = [one.signals for one in treated if one.signals is not None]
        answers = [np.arange(len(one.places)) < len(signals) for one, signals in zip(treated, known, strict=True)]
        fixed = [one.treatment.kl for one in treated]
        return cls(
            rule, known, np.concatenate([np.zeros(0, np.float32), *fixed]), np.concatenate([np.zeros(0, np.bool_), *answers])
        )

    @property
    def fields(self) -> frozenset[LiveField]:
        return self.rule.live_fields

    @property
    def asks(self) -> bool:
        """Whether the answers' tokens need the teacher's distribution: what is held there, or which, is not known yet."""
        return self.rule.holds or bool(self.fields & {"kl", "rkl"})

    @property
    def own_answers(self) -> npt.NDArray[np.bool_]:
        """Which of this rank's tokens are answers'."""
        return self.answers if self.owners is None else self.answers[self.owners == self.team.rank]

    def shared(self, owners: npt.NDArray[np.int64], team: World) -> LiveTreatment:
        """The same on ranks that have some of the tokens each. A rule of single tokens needs no others."""
        if self.rule.live == "sequence":
            return replace(self, owners=owners, team=team)
        mine = owners == team.rank
        return replace(self, fixed=self.fixed[mine], answers=self.answers[mine])

    def decide(self, rows: slice, seen: dict[LiveField, Tensor]) -> Weights:
        """For rules of single tokens: any run of tokens, whatever documents they are of."""
        answers = self.answers[rows]
        signals = _any_run(int(answers.sum()), self.documents[0].vocabulary if self.documents else 0)
        device = next(iter(seen.values())).device
        live = live_signals(len(signals), **{name: _floats(value)[answers] for name, value in seen.items()})
        made = self.rule.treat(replace(signals, live=live))
        if made.entropy.any() or made.collision.any():
            raise ValueError("a rule of single tokens gives a weight on entropy or collision, which the loss has not planned for")
        return self._weights([made], answers, self.fixed[rows], device)

    def settle(self, seen: TokenValues, targets: Targets) -> tuple[Targets, Tensor]:
        """For rules of whole documents: all of the batch. See `distft.engine.base.Selection`. A team settles together: what each rank
        sees of its tokens becomes known to all, and each treats all documents, and then its own tokens alone."""
        named = {name: self._of_all(_value(seen, name))[self.answers] for name in sorted(self.fields)}
        made, start = [], 0
        for signals in self.documents:
            stop = start + len(signals)
            live = live_signals(len(signals), **{name: values[start:stop] for name, values in named.items()})
            made.append(self.rule.treat(replace(signals, live=live)))
            start = stop
        weights = self._weights(made, self.answers, self.fixed, seen.ce_N.device)
        if self.owners is not None:
            weights = weights.chunk(torch.from_numpy(self.owners == self.team.rank).to(seen.ce_N.device))
        held_N = (weights.kl_N != 0) | (weights.rkl_N != 0)
        bears_N = held_N | (weights.ce_N != 0) | (weights.entropy_N != 0)
        if weights.collision_N is not None:
            bears_N |= weights.collision_N != 0
        borne_N = bears_N.nonzero().squeeze(1)
        given = {f"{name}_N": getattr(weights, f"{name}_N") for name in PARTS}
        columns = {name: column[borne_N] for name, column in given.items() if column is not None}
        teacher = targets.teacher and targets.teacher.select(borne_N, held_N[borne_N])
        quadrant_N = None if targets.quadrant_N is None else targets.quadrant_N[borne_N]
        return replace(targets, labels_N=targets.labels_N[borne_N], **columns, teacher=teacher, quadrant_N=quadrant_N), borne_N

    def _of_all(self, value_N: Tensor) -> Floats:
        """A value of this rank's tokens, and of the other ranks', in the order of the batch."""
        mine = _floats(value_N)
        if self.owners is None:
            return mine
        found = np.empty(len(self.owners), np.float32)
        for rank, values in enumerate(self.team.gather(torch.from_numpy(mine))):
            found[self.owners == rank] = values.numpy()
        return found

    def _weights(self, made: Sequence[Treatment], answers: npt.NDArray[np.bool_], fixed: Floats, device: torch.device) -> Weights:
        columns: dict[str, Tensor] = {}
        for name in PARTS:
            if name == "collision" and not any(one.collision.any() for one in made):
                continue
            column = fixed.copy() if name == "kl" else np.zeros_like(fixed)
            column[answers] = np.concatenate([np.zeros(0, np.float32), *(getattr(one, name) for one in made)])
            if name in ("kl", "rkl"):
                column *= np.float32(self.kl_factor)
            columns[f"{name}_N"] = torch.from_numpy(column).to(device)
        return Weights(**columns)


def _any_run(tokens: int, vocabulary: int) -> Signals:
    """Consecutive tokens, whatever documents they are of. What a cache knows of them is no matter of a rule of single tokens: NaN
    betrays one that reads it."""
    blank = np.full(tokens, np.nan, np.float32)
    return Signals(label_logprob=blank, entropy=blank, rank=np.zeros(tokens, np.uint32), vocabulary=vocabulary)


def _floats(value: Tensor) -> Floats:
    return value.detach().float().cpu().numpy()


def _value(seen: TokenValues, name: LiveField) -> Tensor:
    if name == "label_logprob":
        return -seen.ce_N
    value = getattr(seen, f"{name}_N")
    assert value is not None, "it was asked for"
    return value
