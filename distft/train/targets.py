"""Documents with treatments as one micro-batch: packed tokens, and for the tokens with a weight what they are trained towards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from distft.corpus.reader import Document
from distft.engine.base import MicroBatch
from distft.engine.pack import Layout, lay_out, pack
from distft.engine.world import World
from distft.objectives.distributions import DenseRows, SparseRows
from distft.objectives.loss import PARTS, Targets
from distft.objectives.treatment import Mask, Signals, Treatment
from distft.teacher.cache import sparse_rows
from distft.teacher.scores import Scores

if TYPE_CHECKING:
    from distft.train.live import LiveTreatment

ALONE = World()


@dataclass(frozen=True, slots=True)
class Treated:
    """A document and what is done with some of its tokens: entry i of treatment and scores is about the token at `places[i]`."""

    document: Document
    places: npt.NDArray[np.int64]
    treatment: Treatment
    scores: Scores | None = None
    signals: Signals | None = None
    """What is known of the first of these tokens, those of the answer."""
    quadrant: npt.NDArray[np.int8] | None = None
    """Which of `distft.objectives.quadrants` each token is of; None where no teacher was asked."""

    def reached(self) -> Treated:
        """Those of the tokens that have a weight. Without one on a divergence a token's distribution is taken away, too."""
        ce, kl, rkl, entropy, collision = (getattr(self.treatment, name) for name in PARTS)
        held: Mask = (kl != 0) | (rkl != 0)
        borne: Mask = held | (ce != 0) | (entropy != 0) | (collision != 0)
        kept = self.select(borne)
        return kept if kept.scores is None else replace(kept, scores=_silence(kept.scores, held[borne]))

    def select(self, kept: Mask) -> Treated:
        """Some of the tokens. What is known of all of the answer's goes."""
        treatment = Treatment(**{name: getattr(self.treatment, name)[kept] for name in self.treatment.__slots__})
        scores = None if self.scores is None else self.scores.select(kept)
        quadrant = None if self.quadrant is None else self.quadrant[kept]
        return replace(self, places=self.places[kept], treatment=treatment, scores=scores, signals=None, quadrant=quadrant)


def supervised(document: Document, treatment: Treatment, scores: Scores | None = None) -> Treated:
    """A document whose supervised tokens are treated."""
    return Treated(document, np.flatnonzero(document.supervised), treatment, scores)


def micro_batch(
    treated: Sequence[Treated],
    teacher_rows: Callable[[list[Scores]], SparseRows | DenseRows] = sparse_rows,
    *,
    live: LiveTreatment | None = None,
    temperature: float = 1.0,
    team: World = ALONE,
) -> tuple[MicroBatch, npt.NDArray[np.uint8]]:
    """Packs documents, and says which group each token is of. No documents give a batch that runs the backbone and trains nothing,
    for a rank that has nothing to do. `teacher_rows` makes distributions of scores: `TeacherCache.rows`. Of a `team` that shares the
    rows, each rank has the rows whole, and its own part of all that is about a token."""
    documents = [one.document.tokens for one in treated] or [np.zeros(2, np.uint32)]
    layout = lay_out([len(tokens) for tokens in documents], ranks=team.size)
    none = np.zeros(0, np.int64)
    if team.size > 1:
        owners = _owners(treated, layout)
        live = None if live is None else live.shared(np.concatenate([none, *owners]), team)
        treated = [one.select(owner == team.rank) for one, owner in zip(treated, owners, strict=True)]
    predictor_N = np.concatenate([none, *map(layout.own, _predictors(treated, layout))])
    labels_N = np.concatenate([none, *(one.document.tokens[one.places].astype(np.int64) for one in treated)])
    columns = {
        f"{name}_N": torch.from_numpy(
            np.concatenate([np.zeros(0, np.float32), *(getattr(one.treatment, name) for one in treated)])
        )
        for name in PARTS
        if name != "collision" or any(one.treatment.collision.any() for one in treated)
    }
    held_N = (columns["kl_N"] != 0) | (columns["rkl_N"] != 0)
    if live is not None and live.asks:
        held_N |= torch.from_numpy(live.own_answers)
    scores = [one.scores for one in treated if one.scores is not None]
    teacher = teacher_rows(scores) if scores and bool(held_N.any()) else None
    if teacher is not None and not bool(held_N.all()):
        teacher = teacher.select(torch.arange(len(held_N)), held_N)
    kinds = [one.quadrant for one in treated if one.quadrant is not None]
    targets = Targets(
        labels_N=torch.from_numpy(labels_N), **columns, teacher=teacher, temperature=temperature,
        quadrant_N=torch.from_numpy(np.concatenate(kinds)) if kinds else None,
        live=live if live is not None and live.rule.live == "token" else None,
    )  # fmt: skip
    batch = MicroBatch(
        packed=pack(documents, layout), predictor_N=torch.from_numpy(predictor_N), targets=targets,
        selection=live if live is not None and live.rule.live == "sequence" else None,
        documents=tuple(f"{one.document.file}:{one.document.row} ({one.document.digest[:12]})" for one in treated),
    )  # fmt: skip
    return batch, np.concatenate([np.zeros(0, np.uint8), *(one.treatment.group for one in treated)])


def own_part(treated: Sequence[Treated], team: World) -> list[Treated]:
    """Of a micro-batch of these documents, the tokens that this rank of a team has: those of `micro_batch`, in its order."""
    if not treated:
        return []
    owners = _owners(treated, lay_out([len(one.document) for one in treated], ranks=team.size))
    return [one.select(owner == team.rank) for one, owner in zip(treated, owners, strict=True)]


def _predictors(treated: Sequence[Treated], layout: Layout) -> list[npt.NDArray[np.int64]]:
    """Of each document's tokens, the place before each in the flattened rows. It may be another rank's than the token itself, which
    its own rank then knows from the document."""
    return [start + one.places - 1 for one, start in zip(treated, layout.starts, strict=False)]


def _owners(treated: Sequence[Treated], layout: Layout) -> list[npt.NDArray[np.int64]]:
    """Which rank of the team has each document's tokens: the one that has the predictor."""
    return [layout.owners(places) for places in _predictors(treated, layout)]


def scaled(batch: MicroBatch, factor_N: npt.NDArray[np.float32], *, kl_factor: float) -> MicroBatch:
    """The same batch with every token's weights multiplied, and its divergences by `kl_factor` as well."""
    targets, factors = batch.targets, torch.from_numpy(factor_N)
    live = batch.selection or targets.live
    if live is not None:
        assert bool((factors == 1).all()), "no live objective has groups"
        changed = replace(live, kl_factor=live.kl_factor * kl_factor)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        if batch.selection is not None:
            return replace(batch, selection=changed)
        return replace(batch, targets=replace(targets, live=changed))
    return replace(batch, targets=replace(
        targets, ce_N=targets.ce_N * factors, kl_N=targets.kl_N * factors * kl_factor, rkl_N=targets.rkl_N * factors * kl_factor,
        entropy_N=targets.entropy_N * factors, collision_N=None if targets.collision_N is None else targets.collision_N * factors,
    ))  # fmt: skip


def _silence(scores: Scores, held: Mask) -> Scores:
    """Takes the distribution away from tokens without a divergence: no entries and tail 1 make it zero at no cost. Hidden states stay
    until there are rows of them (`micro_batch`)."""
    if held.all():
        return scores
    entries = np.repeat(held, scores.counts)
    return replace(
        scores, tail=np.where(held, scores.tail, np.float32(1)), counts=np.where(held, scores.counts, 0).astype(np.uint16),
        ids=scores.ids[entries], logprobs=scores.logprobs[entries],
    )  # fmt: skip
