"""What the teacher thinks of each token: signals and a distribution, computed chunk by chunk over the output head.

Shapes as in `distft.objectives.loss`, with V the head's rows that this rank holds: all, or a share of them (`VocabularyShare`). The
softmax, its entropy and its rank are over the token rows of all ranks, in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distft.config.schema import Distribution, Hidden, NoDistribution, Sample
from distft.engine.load import LanguageModel
from distft.engine.pack import lay_out, pack
from distft.engine.world import World
from distft.objectives.loss import chunk_tokens
from distft.teacher.scores import Scores
from distft.teacher.vocabulary import WHOLE, Scratch, VocabularyShare

CACHED_BYTES = 1 << 23
"""Logits that a CPU looks at in one go: its caches then hold what the passes over them leave for each other."""


@torch.no_grad()
def score_documents(
    model: LanguageModel,
    documents: Sequence[npt.NDArray[np.uint32]],
    positions: Sequence[npt.NDArray[np.uint32]],
    distribution: Distribution,
    group: World | None = None,
) -> list[Scores]:
    """One forward pass over some documents; each is read alone. `positions[i]` are the tokens of document i to score, none 0.

    `group` are the ranks that hold the model together, all of which call this with the same documents and get the same scores."""
    share = WHOLE if group is None or group.size == 1 else VocabularyShare(first=model.first_id, group=group)
    layout = lay_out([len(document) for document in documents])
    device = model.device
    hidden_PD = model.hidden(pack(documents, layout).to(device))
    flat = [start + where.astype(np.int64) for start, where in zip(layout.starts, positions, strict=True)]
    predictor_N = torch.from_numpy(np.concatenate(flat) - 1).to(device)
    labels_N = torch.from_numpy(
        np.concatenate([document[where].astype(np.int64) for document, where in zip(documents, positions, strict=True)])
    ).to(device)
    size = chunk_tokens(model.shape.rows)
    block = max(8, CACHED_BYTES // (4 * model.shape.rows)) if device.type == "cpu" else size
    points_ND = torch.from_numpy(_points(documents, positions, distribution)).to(device) if _samples(distribution) else None
    scratch = Scratch() if device.type == "cpu" else None
    found = _Columns(len(predictor_N))
    for start in range(0, len(predictor_N), size):
        rows = slice(start, start + size)
        hidden_CD = hidden_PD.index_select(0, predictor_N[rows])
        logits_CV = model.shape.logits(hidden_CD, model.weight, model.bias)
        labels_C, points_CD = labels_N[rows], None if points_ND is None else points_ND[rows]
        for first in range(0, len(logits_CV), block):
            some = slice(first, first + block)
            points = None if points_CD is None else points_CD[some]
            found.add(score_logits(logits_CV[some], labels_C[some], distribution, points, share, scratch))
        if isinstance(distribution, Hidden):
            found.add_words(_words(hidden_CD))
    return found.split(positions)


def score_logits(
    logits_CV: Tensor,
    labels_C: Tensor,
    distribution: Distribution,
    points_CD: Tensor | None = None,
    share: VocabularyShare = WHOLE,
    scratch: Scratch | None = None,
) -> tuple[np.ndarray, ...]:
    """The columns of `Scores` from `label_logprob` to `logprobs`, for one chunk of float32 logits, which it consumes. `points_CD`
    are where a sampling policy looks into the cumulative distribution, ascending.

    The tail is the sum of the probabilities that are left out, not 1 minus those kept: exact where the teacher is sure. Few passes
    over [C, V] are made, for they are what scoring costs beyond the model itself."""
    label_logit_C1, peak_C1 = share.largest(share.label_logits(logits_CV, labels_C), logits_CV.amax(1, keepdim=True))
    rank_C1 = (logits_CV > label_logit_C1).sum(1, keepdim=True)
    shifted_CV = logits_CV.sub_(peak_C1)
    exp_CV = torch.exp(shifted_CV, out=scratch.like(shifted_CV) if scratch else None)
    own_total_C1 = exp_CV.sum(1, keepdim=True)
    total_C1, dot_C1, rank_C1 = share.sums(own_total_C1, _dot(exp_CV, shifted_CV)[:, None], rank_C1)
    log_total_C1 = total_C1.log()
    label_logprob_C = (label_logit_C1 - peak_C1 - log_total_C1).squeeze(1)
    entropy_C = (log_total_C1 - dot_C1 / total_C1).squeeze(1)
    if isinstance(distribution, NoDistribution | Hidden):
        counts_C = torch.zeros_like(labels_C)
        tail_C = torch.full_like(label_logprob_C, 0.0 if isinstance(distribution, Hidden) else 1.0)
        ids_M, kept_M = labels_C.new_zeros(0), label_logprob_C.new_zeros(0)
    elif isinstance(distribution, Sample):
        assert points_CD is not None, "a sampling policy needs its points"
        counts_C, ids_M, kept_M = _shares(share.find(exp_CV, points_CD, scratch))
        tail_C = torch.zeros_like(label_logprob_C)
    else:
        row_M, ids_M = _kept(shifted_CV, log_total_C1, distribution.k, distribution.min_prob)
        row_M, ids_M, shifted_M = share.best(row_M, ids_M, shifted_CV[row_M, ids_M], distribution.k)
        kept_M = shifted_M - log_total_C1[row_M, 0]
        counts_C = torch.bincount(row_M, minlength=len(shifted_CV))
        own_row_M, own_ids_M = share.own(row_M, ids_M, shifted_CV.shape[1])
        exp_CV[own_row_M, own_ids_M] = 0.0
        [left_C1] = share.sums(exp_CV.sum(1, keepdim=True))
        tail_C = (left_C1 / total_C1).squeeze(1)
    return (
        label_logprob_C.cpu().numpy(),
        entropy_C.cpu().numpy(),
        rank_C1.squeeze(1).cpu().numpy().astype(np.uint32),
        tail_C.cpu().numpy(),
        counts_C.cpu().numpy().astype(np.uint16),
        ids_M.cpu().numpy().astype(np.uint32),
        kept_M.cpu().numpy().astype(np.float16),
    )


def _dot(exp_CV: Tensor, shifted_CV: Tensor) -> Tensor:
    """The rows' sums of exp(x) x, without a buffer for the products. A logit of -inf, which some models give to tokens that they
    never say, would make 0 times infinity: only then the slow way is taken."""
    sums_C = torch.bmm(exp_CV[:, None, :], shifted_CV[:, :, None]).flatten()
    if not bool(sums_C.isfinite().all()):
        sums_C = (exp_CV * shifted_CV.clamp_min(-1e4)).sum(1)
    return sums_C


def _words(hidden_CD: Tensor) -> npt.NDArray[np.uint16]:
    """Hidden states bit for bit, as 16-bit words."""
    return hidden_CD.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)


def _samples(distribution: Distribution) -> bool:
    return isinstance(distribution, Sample)


def _points(
    documents: Sequence[npt.NDArray[np.uint32]], positions: Sequence[npt.NDArray[np.uint32]], distribution: Distribution
) -> npt.NDArray[np.float64]:
    """Where to look into each token's cumulative distribution: one uniform point in each of `draws` equal strata, which is as
    unbiased as independent draws and less noisy. They follow from (seed, the document's tokens, position), never from a batch."""
    assert isinstance(distribution, Sample), "no other policy draws"
    found = []
    for document, where in zip(documents, positions, strict=True):
        digest = hashlib.sha256(np.ascontiguousarray(document, "<u4").tobytes()).digest()
        key = np.array([distribution.seed, int.from_bytes(digest[:8], "little")], np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key)).random((len(document), distribution.draws))
        found.append((np.arange(distribution.draws) + uniform[where.astype(np.int64)]) / distribution.draws)
    return np.concatenate(found)


def _shares(ids_CD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of draws, ascending in each row: the number of distinct ids per row, these in row order, and the logarithm of each one's share
    of the draws."""
    fresh_CD = torch.ones_like(ids_CD, dtype=torch.bool)
    fresh_CD[:, 1:] = ids_CD[:, 1:] != ids_CD[:, :-1]
    starts_M = fresh_CD.flatten().nonzero().squeeze(1)
    ends_M = torch.cat([starts_M[1:], starts_M.new_tensor([ids_CD.numel()])])
    return fresh_CD.sum(1), ids_CD[fresh_CD], ((ends_M - starts_M) / ids_CD.shape[1]).log()


def _kept(shifted_CV: Tensor, log_total_C1: Tensor, k: int, min_prob: float) -> tuple[Tensor, Tensor]:
    """Rows and places of the entries to keep, in row order with places ascending.

    With a floor, one comparison finds them (there are at most 1/min_prob in a row), and only rows with more than k are sorted."""
    k = min(k, shifted_CV.shape[1])
    if min_prob == 0:
        ids_Ck = shifted_CV.topk(k, dim=1).indices.sort(1).values
        row_Ck = torch.arange(len(ids_Ck), device=ids_Ck.device)[:, None].expand_as(ids_Ck)
        return row_Ck.flatten(), ids_Ck.flatten()
    row_M, ids_M = (shifted_CV >= log_total_C1 + math.log(min_prob)).nonzero(as_tuple=True)
    counts_C = torch.bincount(row_M, minlength=len(shifted_CV))
    crowded = (counts_C > k).nonzero().squeeze(1)
    if len(crowded):
        best = shifted_CV[crowded].topk(k, dim=1).indices
        others = ~torch.isin(row_M, crowded)
        row_M = torch.cat([row_M[others], crowded[:, None].expand_as(best).flatten()])
        ids_M = torch.cat([ids_M[others], best.flatten()])
        order = (row_M * shifted_CV.shape[1] + ids_M).argsort()
        row_M, ids_M = row_M[order], ids_M[order]
    return row_M, ids_M


class _Columns:
    """The columns of all tokens, in room that is made once. Small arrays that were kept, one for each block, would lie between the
    large buffers that come and go, and keep malloc from using their room again: gigabytes for a long document."""

    def __init__(self, tokens: int) -> None:
        kinds = (np.float32, np.float32, np.uint32, np.float32, np.uint16)
        self._fixed: list[npt.NDArray[Any]] = [np.empty(tokens, kind) for kind in kinds]
        self._kept: list[npt.NDArray[Any]] = [np.empty(0, np.uint32), np.empty(0, np.float16)]
        self._words = np.empty((0, 0), np.uint16)
        self._tokens = self._entries = self._hidden = 0

    def add(self, columns: tuple[np.ndarray, ...]) -> None:
        """What `score_logits` found of the tokens that come next."""
        *fixed, ids, logprobs = columns
        rows = slice(self._tokens, self._tokens + len(fixed[0]))
        for room, column in zip(self._fixed, fixed, strict=True):
            room[rows] = column
        end = self._entries + len(ids)
        if end > len(self._kept[0]):
            self._kept = [np.resize(room, max(2 * end, 1 << 16)) for room in self._kept]
        for room, column in zip(self._kept, (ids, logprobs), strict=True):
            room[self._entries : end] = column
        self._tokens, self._entries = rows.stop, end

    def add_words(self, words: npt.NDArray[np.uint16]) -> None:
        """Hidden states of the tokens that come next."""
        if not self._words.size:
            self._words = np.empty((len(self._fixed[0]), words.shape[1]), np.uint16)
        self._words[self._hidden : self._hidden + len(words)] = words
        self._hidden += len(words)

    def split(self, positions: Sequence[npt.NDArray[np.uint32]]) -> list[Scores]:
        """Cut into documents."""
        label_logprob, entropy, rank, tail, counts = self._fixed
        ids, logprobs = (room[: self._entries] for room in self._kept)
        words = self._words if self._words.size else np.zeros((len(counts), 0), np.uint16)
        ends = np.cumsum(counts, dtype=np.int64)
        scores, token, entry = [], 0, 0
        for where in positions:
            stop = token + len(where)
            last = int(ends[stop - 1]) if stop else 0
            scores.append(Scores(
                positions=where, label_logprob=label_logprob[token:stop], entropy=entropy[token:stop], rank=rank[token:stop],
                tail=tail[token:stop], counts=counts[token:stop], ids=ids[entry:last], logprobs=logprobs[entry:last],
                hidden=words[token:stop].reshape(-1),
            ))  # fmt: skip
            token, entry = stop, last
        return scores
