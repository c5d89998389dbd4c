"""`distft.objectives.chunk` against a teacher whose whole distribution can be made again: both divergences over the vocabulary.

All tokens are kept, and there is no tail; here alone a temperature T can soften both sides. The divergences are those of softmax(z/T):

    v:  p_v * [ ce + entropy*(log p_v + H) + collision*2*(p_v - C) ]
        + 1/T * ( s_v * [ kl + rkl*(log(s_v/q_v) - R) ] - kl*q_v )       R = KL(s||q)
    label y: the above - ce

with p at temperature 1, s and q at T. There are two buffers, log p and log q, the second only of the tokens that are held; whatever is
exponentiated is for a few rows at a time, once for the values and once for the gradient.

Shapes as in `distft.objectives.loss`; K tokens of the chunk are held, B of its rows are a block.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from distft.objectives.chunk import collision_pull, entropy_slope, top_entropy
from distft.objectives.distributions import LOWEST, DenseRows, blocks


class WholeChunk:
    """As `Chunk`. `logprobs_CV`, in the buffer of the logits, holds log p."""

    entropy_C: Tensor
    collision_C: Tensor
    top_entropy_C: Tensor

    def __init__(
        self, logits_CV: Tensor, labels_C: Tensor, teacher: DenseRows, *, asked: frozenset[str], temperature: float
    ) -> None:
        self.labels_C, self.temperature = labels_C, temperature
        held_K = range(len(labels_C)) if teacher.held_N is None else teacher.held_N.nonzero().flatten().tolist()
        self._held_K, self._all = held_K, len(held_K) == len(labels_C)
        if "top_entropy" in asked:
            self.top_entropy_C = top_entropy(logits_CV)
        label_logit_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
        self.lse_C, self.kl_C, self.exact_rkl_C = (torch.zeros_like(label_logit_C) for _ in range(3))
        if "entropy" in asked:
            self.entropy_C = torch.zeros_like(label_logit_C)
        if "collision" in asked:
            self.collision_C = torch.zeros_like(label_logit_C)
        self.teacher_KV = teacher.head.logprobs(teacher.hidden_NT, temperature)  # log q
        self.logprobs_CV = logits_CV
        for rows in blocks(len(labels_C)):
            self.lse_C[rows] = logits_CV[rows].logsumexp(1)
            logprobs_BV = logits_CV[rows].sub_(self.lse_C[rows, None]).clamp_min_(LOWEST)
            if "entropy" in asked:
                self.entropy_C[rows] = -_row_dots(logprobs_BV.exp(), logprobs_BV)
            if "collision" in asked:
                self.collision_C[rows] = logprobs_BV.exp().square_().sum(1)
            self._compare(rows)
        self.ce_C = self.lse_C - label_logit_C
        # Rounding may leave -1e-8 where p equals q. Only the reported value is clamped; gradients use the exact terms.
        self.kl_C, self.rkl_C = self.kl_C.clamp_min(0.0), self.exact_rkl_C.clamp_min(0.0)

    def _compare(self, rows: slice) -> None:
        """Both divergences of a block's tokens."""
        where, teacher_BV = self._held(rows)
        if len(teacher_BV):
            soft_BV = self._softened(where)
            ratio_BV = soft_BV - teacher_BV  # log s/q
            self.exact_rkl_C[where] = _row_dots(soft_BV.exp(), ratio_BV)
            self.kl_C[where] = -_row_dots(teacher_BV.exp(), ratio_BV)

    def _held(self, rows: slice) -> tuple[slice | Tensor, Tensor]:
        """Which tokens of a block are held, and log q of those."""
        if self._all:
            return rows, self.teacher_KV[rows]
        first, last = bisect_left(self._held_K, rows.start), bisect_left(self._held_K, rows.stop)
        where = torch.tensor(self._held_K[first:last], dtype=torch.int64, device=self.lse_C.device)
        return where, self.teacher_KV[first:last]

    def _softened(self, where: slice | Tensor) -> Tensor:
        """log s; at temperature 1 it may be log p itself."""
        logprobs_BV = self.logprobs_CV[where]
        return logprobs_BV if self.temperature == 1.0 else torch.log_softmax(logprobs_BV / self.temperature, 1).clamp_min_(LOWEST)

    def value(self, name: str) -> Tensor:
        """See `Chunk.value`."""
        return -self.ce_C if name == "label_logprob" else getattr(self, f"{name}_C")

    def gradient(
        self, ce_C: Tensor, kl_C: Tensor, rkl_C: Tensor, bonus_C: Tensor | None = None, spread_C: Tensor | None = None
    ) -> Tensor:
        """See `Chunk.gradient`. Consumes both buffers."""
        grad_CV = self.logprobs_CV
        for rows in blocks(len(ce_C)):
            where, teacher_BV = self._held(rows)
            pull_BV = self._pull(where, teacher_BV, kl_C[where, None], rkl_C[where, None]) if len(teacher_BV) else None
            slope_BV = None
            if bonus_C is not None:
                probs_BV = grad_CV[rows].exp()
                slope_BV = entropy_slope(grad_CV[rows] * probs_BV, probs_BV, self.entropy_C[rows], bonus_C[rows])
            probs_BV, pulled_BV = grad_CV[rows].exp_(), ce_C[rows, None]
            if spread_C is not None:
                pulled_BV = collision_pull(probs_BV, self.collision_C[rows], spread_C[rows]).add_(pulled_BV)
            probs_BV.mul_(pulled_BV)
            for part_BV, places in ((pull_BV, where), (slope_BV, rows)):
                if part_BV is not None:
                    grad_CV[places] += part_BV
        grad_CV[torch.arange(len(ce_C), device=ce_C.device), self.labels_C] -= ce_C
        return grad_CV

    def _pull(self, where: slice | Tensor, teacher_BV: Tensor, kl_B1: Tensor, rkl_B1: Tensor) -> Tensor:
        """The teacher's part of the gradient."""
        soft_BV = self._softened(where)
        pull_BV = (soft_BV - teacher_BV).sub_(self.exact_rkl_C[where, None]).mul_(rkl_B1).add_(kl_B1).mul_(soft_BV.exp())
        return pull_BV.sub_(teacher_BV.exp_().mul_(kl_B1)).div_(self.temperature)


def _row_dots(one_BV: Tensor, other_BV: Tensor) -> Tensor:
    """The rows' dot products, without a buffer for the products."""
    return torch.bmm(one_BV[:, None, :], other_BV[:, :, None]).flatten()
