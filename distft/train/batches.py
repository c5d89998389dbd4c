"""A step's documents as micro-batches with targets. How they are packed and shared out over ranks follows from the hardware and
changes no gradient (law 7); which documents they are is decided in `train.order`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distft.config.schema import Train
from distft.corpus.reader import Corpus, Document
from distft.engine.base import MicroBatch
from distft.engine.pack import batches_by_tokens, lay_out, pack
from distft.engine.world import World
from distft.objectives.catalog import Objective
from distft.objectives.loss import SparseRows, Targets
from distft.objectives.treatment import Signals, Treatment
from distft.teacher.cache import TeacherCache, signals, sparse_rows
from distft.teacher.forward import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """This rank's share of a step. `count` is its part of the normaliser."""

    micro_batches: list[MicroBatch]
    count: float
    tokens: int


def share(batches: Sequence[list[int]], world: World) -> list[list[int]]:
    """This rank's batches, of the same number on every rank: collectives must meet. Batches come longest first, so dealing them
    round and back evens out the cost; missing ones are empty."""
    rounds = -(-len(batches) // world.size)
    mine = []
    for turn in range(rounds):
        seat = world.rank if turn % 2 == 0 else world.size - 1 - world.rank
        index = turn * world.size + seat
        mine.append(batches[index] if index < len(batches) else [])
    return mine


class Feed:
    """Turns document rows into micro-batches with targets."""

    def __init__(self, corpus: Corpus, cache: TeacherCache | None, objective: Objective, train: Train, world: World) -> None:
        self.corpus, self.cache, self.objective, self.train, self.world = corpus, cache, objective, train, world
        self.lengths = corpus.lengths("train")

    def step(self, rows: npt.NDArray[np.int64]) -> Step:
        """This rank's share of the step with these documents."""
        batches = batches_by_tokens([int(self.lengths[row]) for row in rows], self.train.micro_batch_tokens)
        made = [self._batch([self.corpus.document("train", int(rows[i])) for i in batch]) for batch in share(batches, self.world)]
        return Step(
            micro_batches=[batch for batch, _, _ in made], count=sum(count for _, count, _ in made),
            tokens=sum(tokens for _, _, tokens in made),
        )  # fmt: skip

    def _batch(self, documents: list[Document]) -> tuple[MicroBatch, float, int]:
        reads = self.objective.needs_signals or self.objective.needs_distribution
        scores = [self.cache.supervised(d) for d in documents] if reads and self.cache else None
        treatments = []
        for index, document in enumerate(documents):
            known = signals(scores[index]) if scores else _nothing_known(int(document.supervised.sum()))
            treatments.append(self.objective.treat(known))
        batch = micro_batch(documents, treatments, scores)
        return batch, float(sum(t.count.sum(dtype=np.float64) for t in treatments)), sum(len(d.tokens) for d in documents)


def micro_batch(documents: list[Document], treatments: list[Treatment], scores: list[Scores] | None) -> MicroBatch:
    """Packs documents and drops every token whose four weights are zero: it never reaches the head. An empty list gives a batch
    that runs the backbone and trains nothing, for a rank that has nothing to do."""
    if not documents:
        blank = np.zeros(2, np.uint32)
        return MicroBatch(
            packed=pack([blank], lay_out([2])), predictor_N=torch.zeros(0, dtype=torch.int64), targets=_targets([], [], None)
        )
    layout = lay_out([len(d.tokens) for d in documents])
    predictors, labels, kept_scores, kept = [], [], [], []
    for index, (document, treatment, start) in enumerate(zip(documents, treatments, layout.starts, strict=True)):
        places = np.flatnonzero(document.supervised)
        borne = (treatment.ce != 0) | (treatment.kl != 0) | (treatment.rkl != 0) | (treatment.entropy != 0)
        predictors.append(start + places[borne] - 1)
        labels.append(document.tokens[places[borne]].astype(np.int64))
        kept.append(Treatment(**{name: getattr(treatment, name)[borne] for name in ("ce", "kl", "rkl", "entropy", "count")}))
        if scores is not None:
            held = (treatment.kl != 0) | (treatment.rkl != 0)
            kept_scores.append(_silence(scores[index].select(borne), held[borne]))
    held_anywhere = any((t.kl != 0).any() or (t.rkl != 0).any() for t in kept)
    teacher = sparse_rows(kept_scores) if held_anywhere and kept_scores else None
    return MicroBatch(
        packed=pack([d.tokens for d in documents], layout),
        predictor_N=torch.from_numpy(np.concatenate(predictors).astype(np.int64)),
        targets=_targets(labels, kept, teacher),
    )


def _silence(scores: Scores, held: npt.NDArray[np.bool_]) -> Scores:
    """Takes the distribution away from tokens without a divergence: no entries and tail 1 make it zero at no cost."""
    if held.all():
        return scores
    entries = np.repeat(held, scores.counts)
    return Scores(
        positions=scores.positions, label_logprob=scores.label_logprob, entropy=scores.entropy, rank=scores.rank,
        tail=np.where(held, scores.tail, np.float32(1)), counts=np.where(held, scores.counts, 0).astype(np.uint16),
        ids=scores.ids[entries], logprobs=scores.logprobs[entries],
    )  # fmt: skip


def _targets(labels: list[npt.NDArray[np.int64]], treatments: list[Treatment], teacher: SparseRows | None) -> Targets:
    def column(name: str) -> torch.Tensor:
        values = [getattr(treatment, name) for treatment in treatments]
        return torch.from_numpy(np.concatenate(values).astype(np.float32)) if values else torch.zeros(0)

    return Targets(
        labels_N=torch.from_numpy(np.concatenate(labels)) if labels else torch.zeros(0, dtype=torch.int64),
        ce_N=column("ce"), kl_N=column("kl"), rkl_N=column("rkl"), entropy_N=column("entropy"), teacher=teacher,
    )  # fmt: skip


def _nothing_known(tokens: int) -> Signals:
    """For rules that declared that they read nothing: NaN betrays one that does."""
    blank = np.full(tokens, np.nan, np.float32)
    return Signals(label_logprob=blank, entropy=blank, rank=np.zeros(tokens, np.uint32))
