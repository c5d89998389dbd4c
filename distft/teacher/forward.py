"""What the teacher thinks of each token: signals and a sparse distribution, computed chunk by chunk over the output head.

Shapes as in `distft.objectives.loss`. The softmax, its entropy and its rank are over the head's token rows in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distft.config.schema import Distribution, NoDistribution
from distft.engine.load import LanguageModel
from distft.engine.pack import lay_out, pack
from distft.objectives.loss import chunk_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The teacher's word on some tokens of one document. Entry i belongs to the token at `positions[i]`, given the tokens before
    it (law 1). Kept entries are flat, `counts[i]` of them for token i, ids ascending; empty for a cache of signals alone."""

    positions: npt.NDArray[np.uint32]
    label_logprob: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    rank: npt.NDArray[np.uint32]
    tail: npt.NDArray[np.float32]
    counts: npt.NDArray[np.uint16]
    ids: npt.NDArray[np.uint32]
    logprobs: npt.NDArray[np.float16]

    def select(self, chosen: npt.NDArray[np.bool_]) -> Scores:
        """The scores of some of the tokens."""
        if chosen.all():
            return self
        entries = np.repeat(chosen, self.counts)
        return Scores(
            positions=self.positions[chosen], label_logprob=self.label_logprob[chosen], entropy=self.entropy[chosen],
            rank=self.rank[chosen], tail=self.tail[chosen], counts=self.counts[chosen],
            ids=self.ids[entries], logprobs=self.logprobs[entries],
        )  # fmt: skip

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.label_logprob).all() and np.isfinite(self.entropy).all())


@torch.no_grad()
def score_documents(
    model: LanguageModel,
    documents: Sequence[npt.NDArray[np.uint32]],
    positions: Sequence[npt.NDArray[np.uint32]],
    distribution: Distribution,
) -> list[Scores]:
    """One forward pass over some documents; each is read alone. `positions[i]` are the tokens of document i to score, none 0."""
    layout = lay_out([len(document) for document in documents])
    device = model.head.weight.device
    hidden_PD = model.hidden(pack(documents, layout).to(device))
    flat = [start + where.astype(np.int64) for start, where in zip(layout.starts, positions, strict=True)]
    predictor_N = torch.from_numpy(np.concatenate(flat) - 1).to(device)
    labels_N = torch.from_numpy(
        np.concatenate([document[where].astype(np.int64) for document, where in zip(documents, positions, strict=True)])
    ).to(device)
    size = chunk_tokens(model.shape.rows)
    parts = []
    for start in range(0, len(predictor_N), size):
        hidden_CD = hidden_PD.index_select(0, predictor_N[start : start + size])
        logits_CV = model.shape.logits(hidden_CD, model.head.weight, model.head.bias)
        parts.append(score_logits(logits_CV, labels_N[start : start + size], distribution))
    return _split([np.concatenate(column) for column in zip(*parts, strict=True)], positions)


def score_logits(logits_CV: Tensor, labels_C: Tensor, distribution: Distribution) -> tuple[np.ndarray, ...]:
    """The columns of `Scores` but positions, for one chunk of float32 logits, which it consumes.

    The tail is the sum of the probabilities that are left out, not 1 minus those kept: exact where the teacher is sure."""
    label_logit_C1 = logits_CV.gather(1, labels_C[:, None])
    rank_C = (logits_CV > label_logit_C1).sum(1)
    lse_C1 = logits_CV.logsumexp(1, keepdim=True)
    logprobs_CV = logits_CV.sub_(lse_C1)
    label_logprob_C = (label_logit_C1 - lse_C1).squeeze(1)
    probs_CV = logprobs_CV.exp()
    entropy_C = -(probs_CV * logprobs_CV.clamp_min(-1e4)).sum(1)
    if isinstance(distribution, NoDistribution):
        none = np.zeros(0)
        tail_C, counts_C, ids_M, kept_M = torch.ones_like(label_logprob_C), torch.zeros_like(rank_C), none, none
    else:
        row_M, ids_M = _kept(logprobs_CV, distribution.k, distribution.min_prob)
        kept_M = logprobs_CV[row_M, ids_M].cpu().numpy()
        counts_C = torch.bincount(row_M, minlength=len(logprobs_CV))
        probs_CV[row_M, ids_M] = 0.0
        tail_C, ids_M = probs_CV.sum(1), ids_M.cpu().numpy()
    return (
        label_logprob_C.cpu().numpy(),
        entropy_C.cpu().numpy(),
        rank_C.cpu().numpy().astype(np.uint32),
        tail_C.cpu().numpy(),
        counts_C.cpu().numpy().astype(np.uint16),
        ids_M.astype(np.uint32),
        kept_M.astype(np.float16),
    )


def _kept(logprobs_CV: Tensor, k: int, min_prob: float) -> tuple[Tensor, Tensor]:
    """Rows and ids of the entries to keep, in row order with ids ascending.

    With a floor, one comparison finds them (there are at most 1/min_prob in a row), and only rows with more than k are sorted."""
    k = min(k, logprobs_CV.shape[1])
    if min_prob == 0:
        ids_Ck = logprobs_CV.topk(k, dim=1).indices.sort(1).values
        row_Ck = torch.arange(len(ids_Ck), device=ids_Ck.device)[:, None].expand_as(ids_Ck)
        return row_Ck.flatten(), ids_Ck.flatten()
    above_CV = logprobs_CV >= math.log(min_prob)
    crowded = (above_CV.sum(1) > k).nonzero().squeeze(1)
    if len(crowded):
        best = logprobs_CV[crowded].topk(k, dim=1).indices
        above_CV[crowded] = False
        above_CV[crowded[:, None], best] = True
    row_M, ids_M = above_CV.nonzero(as_tuple=True)
    return row_M, ids_M


def _split(columns: list[np.ndarray], positions: Sequence[npt.NDArray[np.uint32]]) -> list[Scores]:
    """Columns over all tokens, cut into documents."""
    label_logprob, entropy, rank, tail, counts, ids, logprobs = columns
    ends = np.cumsum(counts, dtype=np.int64)
    scores, token, entry = [], 0, 0
    for where in positions:
        stop = token + len(where)
        last = int(ends[stop - 1]) if stop else 0
        scores.append(Scores(
            positions=where, label_logprob=label_logprob[token:stop], entropy=entropy[token:stop], rank=rank[token:stop],
            tail=tail[token:stop], counts=counts[token:stop], ids=ids[entry:last], logprobs=logprobs[entry:last],
        ))  # fmt: skip
        token, entry = stop, last
    return scores
