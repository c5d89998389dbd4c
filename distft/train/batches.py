"""A step's documents as micro-batches with targets. How they are packed and shared out over ranks follows from the hardware and
changes no gradient (law 7); which documents they are is decided in `train.order`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from distft.config.schema import Train
from distft.corpus.reader import Corpus, Document
from distft.engine.base import MicroBatch
from distft.engine.pack import batches_by_tokens
from distft.engine.world import World
from distft.objectives.catalog import Objective
from distft.objectives.quadrants import NONE, QUADRANTS, quadrants
from distft.objectives.treatment import Floats, Signals, Treatment, follows, treatment
from distft.teacher.cache import TeacherCache, signals, sparse_rows
from distft.train.live import LiveTreatment
from distft.train.targets import Treated, micro_batch, scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """This rank's share of a step. Of a team that shares its rows, the leading rank alone counts."""

    micro_batches: list[MicroBatch]
    groups: list[npt.NDArray[np.uint8]]
    """The group of each token of each micro-batch; a prompt's are of none, which is the number after the last."""
    counts: list[float]
    """Its part of each group's normaliser."""
    quadrants: list[int]
    """How many of its tokens are of each of QUADRANTS, with and without a weight; none where no teacher was asked."""
    tokens: int

    @property
    def headed(self) -> int:
        """How many of its tokens reach the output head; for objectives that select by whole documents, all that they look at."""
        return sum(len(batch.predictor_N) for batch in self.micro_batches)

    def normalised(self, totals: Sequence[float], *, kl_factor: float = 1.0) -> tuple[list[MicroBatch], float]:
        """Micro-batches and the number to divide their loss by, from each group's normaliser over all ranks. Where there are several
        groups, weights are scaled so that the sum of all normalisers serves for each, as it does for prompts. `kl_factor` multiplies
        all divergences."""
        normaliser = float(sum(totals))
        if len(totals) == 1 and kl_factor == 1.0:
            return self.micro_batches, normaliser
        factors = np.array([*(normaliser / total if total else 0.0 for total in totals), 1.0], np.float32)
        changed = [
            scaled(batch, factors[group], kl_factor=kl_factor)
            for batch, group in zip(self.micro_batches, self.groups, strict=True)
        ]
        return changed, normaliser


def share(batches: Sequence[list[int]], world: World) -> list[list[int]]:
    """This rank's batches, the same for all of a team, and of the same number on every rank: collectives must meet. Batches come
    longest first, so dealing them round and back evens out the cost; missing ones are empty."""
    teams, team = world.size // world.team.size, world.rank // world.team.size
    rounds = -(-len(batches) // teams)
    mine = []
    for turn in range(rounds):
        seat = team if turn % 2 == 0 else teams - 1 - team
        index = turn * teams + seat
        mine.append(batches[index] if index < len(batches) else [])
    return mine


class Feed:
    """Turns document rows into micro-batches with targets. `vocabulary` is the number of tokens that the student chooses among,
    `rounding` the nats of KL that a student may be apart from itself."""

    def __init__(
        self, corpus: Corpus, cache: TeacherCache | None, objective: Objective, train: Train, world: World, *, vocabulary: int,
        rounding: float = 1e-5,
    ) -> None:  # fmt: skip
        self.corpus, self.cache, self.objective, self.train, self.world = corpus, cache, objective, train, world
        self.vocabulary, self.rounding = vocabulary, rounding
        self.lengths = corpus.lengths("train")

    def step(self, rows: npt.NDArray[np.int64]) -> Step:
        """This rank's share of the step with these documents."""
        batches = batches_by_tokens([int(self.lengths[row]) for row in rows], self.train.micro_batch_tokens)
        counts, kinds = np.zeros(self.objective.groups + 1), np.zeros(len(QUADRANTS) + 1, np.int64)
        made, groups, tokens, team = [], [], 0, self.world.team
        for batch in share(batches, self.world):
            documents = [self.corpus.document("train", int(rows[i])) for i in batch]
            treated = [self._treated(document) for document in documents]
            for one in treated if team.leads else ():
                np.add.at(counts, one.treatment.group, one.treatment.count.astype(np.float64))
                if one.quadrant is not None:
                    kinds += np.bincount(one.quadrant, minlength=len(kinds))
                tokens += len(one.document)
            done, group = micro_batch(
                [one.reached() for one in treated] if self.objective.live == "no" else treated,
                self.cache.rows if self.cache else sparse_rows,
                live=None if self.objective.live == "no" else LiveTreatment.of(self.objective, treated),
                temperature=self.objective.softening, team=team,
            )  # fmt: skip
            made.append(done)
            groups.append(group)
        return Step(
            micro_batches=made, groups=groups, counts=counts[:-1].tolist(), quadrants=kinds[:NONE].tolist(), tokens=tokens
        )  # fmt: skip

    def _treated(self, document: Document) -> Treated:
        """What is done with a document's tokens: first those of the answer, then, where it is held too, those of the prompt."""
        rule, own, rest = self.objective, None, None
        answer = np.flatnonzero(document.supervised)
        if self.cache and (rule.needs_signals or rule.needs_distribution):
            scores = self.cache.scores(document)
            spoken = document.supervised[scores.positions.astype(np.int64)]
            own, rest = scores.select(spoken), scores.select(~spoken)
        known = replace(
            signals(own) if own is not None else _nothing_known(len(answer)), document=document.digest, vocabulary=self.vocabulary,
            rounding=self.rounding, anchors=document.anchors[answer],
            follows=follows(document.supervised),
        )  # fmt: skip
        if rule.live == "no":
            made = rule.treat(known)
        else:
            count, group = rule.counts(known)
            made = treatment(len(known), count=count, group=group)
        kinds = quadrants(known) if own is not None else None
        if rule.prompt_kl == 0:
            return Treated(document, answer, made, own, known, kinds)
        assert own is not None, "a rule that holds the prompt needs the distribution"
        assert rest is not None
        assert kinds is not None
        weight = rule.prompt_weight(float(made.count.sum()), len(rest))  # pyright: ignore[reportArgumentType]  (what it counts)
        held = treatment(len(rest), kl=weight, count=0.0, group=rule.groups)
        places = np.concatenate([answer, rest.positions.astype(np.int64)])
        kinds = np.concatenate([kinds, np.full(len(rest), NONE, np.int8)])
        return Treated(document, places, _joined(made, held), own.followed_by(rest), known, kinds)


def _joined(one: Treatment, other: Treatment) -> Treatment:
    return Treatment(**{name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in one.__slots__})


def _nothing_known(tokens: int) -> Signals:
    """For rules that declared that they read nothing: NaN betrays one that does."""
    blank: Floats = np.full(tokens, np.nan, np.float32)
    return Signals(label_logprob=blank, entropy=blank, rank=np.zeros(tokens, np.uint32))
