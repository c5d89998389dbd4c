"""The forgetting meter: KL(teacher||student) in nats per token on documents that are never trained on.

The same measurement, before the first step, proves that the cache is aligned: a model that is its own teacher cannot differ from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np

from distft.corpus.reader import Corpus, Document
from distft.engine.base import MicroBatch
from distft.engine.pack import batches_by_tokens
from distft.engine.world import World
from distft.errors import CorruptArtifactError
from distft.objectives.loss import TokenValues
from distft.objectives.treatment import treatment
from distft.progress import Meter
from distft.teacher.cache import TeacherCache, sampling_excess
from distft.train.batches import share
from distft.train.targets import Treated, micro_batch, own_part, supervised

Measure = Callable[[MicroBatch], TokenValues]

OWN_TEACHER_LIMIT = {"float32": 1e-3, "bfloat16": 2e-2}
"""Nats per token that rounding (float16 log-probabilities, another batch shape) may put between a model and its own cache. A shift
by one token gives several nats."""
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-3}
"""Nats of KL(p||q) that it puts between a token and its own cache: what lies below is no movement of a student."""
PROBED_DOCUMENTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Means over the supervised tokens of some documents, in nats."""

    kl: float
    nll: float
    teacher_nll: float
    label_gap: float
    """|nll - teacher_nll| token by token: a mean over tokens would not see them swapped."""
    tokens: int

    def facts(self) -> dict[str, float]:
        return asdict(self)


def measure_drift(
    measure: Measure, documents: Iterable[Document], cache: TeacherCache, world: World, *, tokens_per_batch: int,
    meter: Meter | None = None,
) -> Drift:  # fmt: skip
    """How far the student is from the teacher on these documents. With a truncating policy it is a lower bound: what lies in the
    tail counts as one category. With a sampling one it is an unbiased estimate, which may come out below 0."""
    held = list(documents)
    sums = np.zeros(5)
    for batch in share(batches_by_tokens([len(d.tokens) for d in held], tokens_per_batch), world):
        chosen = [held[i] for i in batch]
        asked = _asked(chosen, cache)
        values = measure(micro_batch(asked, cache.rows, team=world.team)[0])
        scores = [one.scores for one in own_part(asked, world.team) if one.scores is not None]
        nll_N, teacher_nll_N = (
            values.ce_N.double().cpu().numpy(),
            -np.concatenate([s.label_logprob for s in scores] or [np.zeros(0)]),
        )
        gap = np.abs(nll_N - teacher_nll_N).sum()
        excess = sum(float(sampling_excess(s).sum()) for s in scores) if cache.sampled else 0.0
        sums += (float(values.kl_N.double().sum()) - excess, nll_N.sum(), teacher_nll_N.sum(dtype=np.float64), gap, len(nll_N))
        if meter:
            meter.advance(sum(len(d.tokens) for d in chosen))
    *totals, tokens = world.total(*sums)
    kl, nll, teacher_nll, gap = (total / tokens for total in totals)
    return Drift(kl=kl, nll=nll, teacher_nll=teacher_nll, label_gap=gap, tokens=int(tokens))


def check_own_teacher(measure: Measure, corpus: Corpus, cache: TeacherCache, world: World, *, dtype: str, where: str) -> None:
    """Refuses to train when the untouched model is not what its own cache says: a shifted, foreign or damaged cache shows here."""
    lengths = corpus.lengths("train")
    rows = range(min(PROBED_DOCUMENTS, len(lengths)))
    documents = [corpus.document("train", row) for row in rows]
    drift = measure_drift(measure, documents, cache, world, tokens_per_batch=int(max(lengths[row] for row in rows)) * 2)
    limit = OWN_TEACHER_LIMIT[dtype]
    apart = not drift.kl <= limit and not cache.sampled  # an estimate has its noise; the labels' losses have none
    if apart or not drift.label_gap <= 10 * limit:
        raise CorruptArtifactError(
            f"The model is its own teacher, yet on {len(documents)} documents they are {drift.kl:.3g} nats per token apart (at most "
            f"{limit:g} is rounding) and their losses of the label {drift.label_gap:.3g} (at most {10 * limit:g}).", where=where,
            help="Nothing was trained. The cache is damaged or was made by another version; score into a fresh store.",
        )  # fmt: skip


def _asked(documents: list[Document], cache: TeacherCache) -> list[Treated]:
    """Documents of which every supervised token is asked about."""
    scores = [cache.supervised(document) for document in documents]
    return [
        supervised(document, treatment(len(one), ce=1.0, kl=1.0), one) for document, one in zip(documents, scores, strict=True)
    ]
