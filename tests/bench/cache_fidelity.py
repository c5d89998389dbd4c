"""What each policy costs on disk, and what a student loses by learning from it instead of from the whole distribution.

    python -m pytest -m bench -s tests/bench/cache_fidelity.py

DISTFT_BENCH_MODEL names a model's folder and DISTFT_BENCH_DATA a JSONL of chats: a teacher's own view of real text. Without them
only the synthetic vocabulary is measured: 151,936 tokens, peaked as a large teacher's predictions are.

The gradient is that of KL(q||p) in the student's logits, per token and without any cut; its error is the root of the summed squares of
what the policy's gradient lacks, over that of the whole gradient. Students are the teacher with noise on its logits (synthetic) or on
its weights (real), near and far.

`hidden` is measured on real text, in both dtypes, through the very code that scores and the copy of the head that a cache keeps. The
whole distribution is that of transformers' own forward pass. In bfloat16 it is told from two: the bfloat16 teacher's, which is what is
stored, and the float32 teacher's, which is what a bfloat16 teacher costs under any policy.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.config.schema import Distribution, Hidden, NoDistribution, Sample, Source, TopK
from distft.corpus.render import render_source, token_rows
from distft.engine.load import LanguageModel, load_model
from distft.engine.pack import lay_out, pack
from distft.engine.world import World
from distft.objectives.distributions import DenseHead
from distft.store.location import open_location
from distft.store.model_folder import resolve_model
from distft.store.shards import ShardWriter
from distft.teacher.cache import sparse_rows
from distft.teacher.encode import SCHEMA, RecordBatches, to_batch
from distft.teacher.forward import _points, score_documents, score_logits
from distft.teacher.head_copy import commit_head, dense_rows, read_head
from distft.teacher.planes import stored_schema, to_planes
from distft.teacher.scores import Scores

POLICIES: dict[str, Distribution] = {
    "topk k=128 min_prob=1e-3 (default)": TopK(),
    "topk k=128 min_prob=5e-4": TopK(min_prob=5e-4),
    "topk k=64 min_prob=0": TopK(k=64, min_prob=0),
    "topk k=16 min_prob=0": TopK(k=16, min_prob=0),
    "sample draws=50": Sample(kind="sample"),
    "sample draws=200": Sample(kind="sample", draws=200),
    "none": NoDistribution(kind="none"),
}
TOKENS, ROWS = 1536, 48


@dataclass(frozen=True)
class Dense:
    """Hidden states as they are stored, the logits that the cache makes of them, and those that they stand for."""

    scores: Scores
    stored_CV: Tensor
    truth_CV: Tensor


@dataclass(frozen=True)
class Batch:
    teacher_CV: Tensor
    labels_C: Tensor
    students: list[Tensor]
    """Logits."""
    document: np.ndarray
    hidden: dict[str, Dense]


@dataclass
class Error:
    missing: float = 0.0
    whole: float = 0.0
    along: float = 0.0
    kept: float = 0.0

    def add(self, full_CV: Tensor, stored_CV: Tensor) -> None:
        self.missing += float((stored_CV - full_CV).square().sum())
        self.whole += float(full_CV.square().sum())
        self.along += float((full_CV * stored_CV).sum())
        self.kept += float(stored_CV.square().sum())

    def __str__(self) -> str:
        if self.kept == 0:
            return f"{'-':>8}{'-':>9}"
        return f"{(self.missing / self.whole) ** 0.5:>8.2g}{self.along / (self.whole * self.kept) ** 0.5:>9.5f}"


def stored_gradient(scores: Scores, p_CV: Tensor) -> Tensor:
    """d KL / d logits over the k+1 categories that the cache knows."""
    rows = sparse_rows([scores])
    row_M = torch.repeat_interleave(torch.arange(len(p_CV)), rows.counts_N)
    kept_CV = torch.zeros_like(p_CV)
    kept_CV[row_M, rows.ids_M] = rows.logprobs_M.double().exp()
    inside_CV = torch.zeros_like(p_CV, dtype=torch.bool)
    inside_CV[row_M, rows.ids_M] = True
    tail_C = p_CV.masked_fill(inside_CV, 0).sum(1).clamp_min(1e-300)
    return torch.where(inside_CV, p_CV - kept_CV, p_CV * (1 - rows.tail_N.double() / tail_C)[:, None])


def measured(name: str, batches: Iterator[Batch]) -> None:
    """Prints a table."""
    found: dict[str, list[Scores]] = {policy: [] for policy in POLICIES}
    errors = {policy: (Error(), Error()) for policy in POLICIES}
    divergence, lost, tokens = [0.0, 0.0], dict.fromkeys(POLICIES, 0.0), 0
    for batch in batches:
        teacher_CV, labels_C, students, document = batch.teacher_CV, batch.labels_C, batch.students, batch.document
        places = np.arange(1, len(labels_C) + 1, dtype=np.uint32)
        q_CV = teacher_CV.double().softmax(1)
        tokens += len(labels_C)
        for at, student_CV in enumerate(students):
            divergence[at] += float((q_CV * (q_CV.clamp_min(1e-300).log() - student_CV.double().log_softmax(1))).sum())
        for policy, settings in POLICIES.items():
            points = (
                torch.from_numpy(_points([document], [places], settings)[: len(labels_C)])
                if isinstance(settings, Sample)
                else None
            )
            columns = score_logits(teacher_CV.clone(), labels_C, settings, points)
            scores = Scores(positions=places, **dict(zip(_NAMES, columns, strict=True)))
            found[policy].append(scores)
            if isinstance(settings, NoDistribution):
                continue
            if isinstance(settings, TopK):  # KL(q || what is stored with its tail spread evenly over what it leaves out)
                kept = np.bincount(np.repeat(places - 1, scores.counts), minlength=len(places))
                row_M = np.repeat(np.arange(len(places)), scores.counts)
                rest_CV = q_CV.clone()
                rest_CV[row_M, scores.ids.astype(np.int64)] = 0
                spread_C = rest_CV.sum(1) / torch.from_numpy(q_CV.shape[1] - kept).clamp_min(1)
                ratio = rest_CV.clamp_min(1e-300).log() - spread_C.clamp_min(1e-300).log()[:, None]
                lost[policy] += float((rest_CV * ratio).sum())
            for at, student_CV in enumerate(students):
                p_CV = student_CV.double().softmax(1)
                errors[policy][at].add(p_CV - q_CV, stored_gradient(scores, p_CV))
        for policy, dense in batch.hidden.items():
            found.setdefault(policy, []).append(dense.scores)
            truth_CV, stored_CV = (logits.double().log_softmax(1) for logits in (dense.truth_CV, dense.stored_CV))
            lost[policy] = lost.get(policy, 0.0) + float((truth_CV.exp() * (truth_CV - stored_CV)).sum())
            for at, student_CV in enumerate(students):
                p_CV = student_CV.double().softmax(1)
                errors.setdefault(policy, (Error(), Error()))[at].add(p_CV - truth_CV.exp(), p_CV - stored_CV.exp())
    print(
        f"\n{name}: {tokens:,} tokens; students at {divergence[0] / tokens:.3f} and {divergence[1] / tokens:.2f} nats per token\n"
        f"{'':<36}{'bytes':>7}{'entries':>9}{'KL lost':>9}   {'near: error, cosine':>17}   {'far: error, cosine':>17}"
    )
    for policy, scores in found.items():
        entries = sum(len(one.ids) for one in scores) / tokens
        kl = f"{'-':>9}" if isinstance(POLICIES.get(policy), Sample | NoDistribution) else f"{lost[policy] / tokens:>9.2g}"
        print(f"{policy:<36}{disk_bytes(scores) / tokens:>7.1f}{entries:>9.1f}{kl}   {errors[policy][0]}   {errors[policy][1]}")


_NAMES = ("label_logprob", "entropy", "rank", "tail", "counts", "ids", "logprobs")


def disk_bytes(scores: list[Scores]) -> int:
    """What a part with these documents takes in a store, all of it."""
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(open_location(folder), "part", stored_schema(SCHEMA)) as writer:
            batches = RecordBatches()
            for rows in (*batches.add(enumerate(scores)), batches.rest()):
                some = [one for _, one in rows]
                writer.write(to_planes(to_batch([f"{n:032x}" for n, _ in rows], [len(s) + 1 for s in some], some)))
        return writer.entry.size


def synthetic() -> Iterator[Batch]:
    """Zipf's law behind a few likely tokens, in an order of each token's own. Half of the tokens are all but sure."""
    vocabulary, random = 151_936, torch.Generator().manual_seed(0)
    for number in range(TOKENS // ROWS):
        base_CV = -1.1 * torch.arange(1, vocabulary + 1).float().log().repeat(ROWS, 1)
        base_CV[:, :6] += torch.rand(ROWS, 1, generator=random) * torch.tensor([12.0, 6, 4, 3, 2, 1]) + 2
        logits_CV = base_CV[:, torch.randperm(vocabulary, generator=random)]
        logits_CV += 0.5 * torch.randn(ROWS, vocabulary, generator=random)
        labels_C = torch.multinomial(logits_CV.softmax(1), 1, generator=random).squeeze(1)
        students = [logits_CV + noise * torch.randn(ROWS, vocabulary, generator=random) for noise in (0.2, 1.2)]
        yield Batch(logits_CV, labels_C, students, np.arange(number, number + ROWS + 1).astype(np.uint32), {})


def real(folder: str, data: str) -> Iterator[Batch]:
    model = resolve_model(folder, None)
    rows = token_rows(model)

    def loaded(noise: float, dtype: str = "float32") -> LanguageModel:
        made = load_model(model, dtype=dtype, attention="sdpa", head_rows=rows, device=torch.device("cpu"))
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.whole.parameters():
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=random)
        return made

    models, done = [loaded(noise) for noise in (0.0, 0.02, 0.12)], 0
    half = loaded(0.0, "bfloat16")
    head, half_head = kept_head(models[0]), kept_head(half)
    for document in render_source(Source(path=data, limit=200), model, max_tokens=512):
        packed, places = pack([document.tokens], lay_out([len(document.tokens)])), np.flatnonzero(document.supervised)
        labels_C = torch.from_numpy(document.tokens[places].astype(np.int64))
        with torch.no_grad():
            logits = [
                one.shape.logits(one.hidden(packed)[torch.from_numpy(places - 1)], one.head.weight, one.head.bias)
                for one in models
            ]
            whole_CV, half_CV = (own_logits(one, document.tokens, places) for one in (models[0], half))
            hidden = {
                "hidden, float32 teacher": stored(models[0], head, document.tokens, places, whole_CV),
                "hidden, bfloat16 teacher": stored(half, half_head, document.tokens, places, half_CV),
                "  the same told from float32's": stored(half, half_head, document.tokens, places, whole_CV),
            }
        yield Batch(logits[0], labels_C, logits[1:], document.tokens, hidden)
        done += len(places)
        if done >= TOKENS:
            return


def kept_head(model: LanguageModel) -> DenseHead:
    """The head as a cache keeps it."""
    with tempfile.TemporaryDirectory() as folder:
        commit_head(open_location(folder), model, World())
        size = sum(path.stat().st_size for path in (Path(folder) / "data").iterdir())
        print(f"the head's file: {size:,} bytes in {str(model.weight.dtype).removeprefix('torch.')}")
        return read_head(open_location(folder), Path(folder))


def own_logits(model: LanguageModel, tokens: np.ndarray, places: np.ndarray) -> Tensor:
    """By transformers' own forward pass, and nothing of ours."""
    return model.whole(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, places - 1, : model.shape.rows].float()


def stored(model: LanguageModel, head: DenseHead, tokens: np.ndarray, places: np.ndarray, truth_CV: Tensor) -> Dense:
    [scores] = score_documents(model, [tokens], [places.astype(np.uint32)], Hidden(kind="hidden"))
    return Dense(scores, head.logprobs(dense_rows([scores], head).hidden_NT), truth_CV)


@pytest.mark.bench
def test_bytes_and_fidelity() -> None:
    measured("synthetic, 151,936 tokens", synthetic())
    folder, data = os.environ.get("DISTFT_BENCH_MODEL"), os.environ.get("DISTFT_BENCH_DATA")
    if folder and data:
        measured(f"{Path(folder).name} on {Path(data).name}", real(folder, data))
