"""The student's distribution over a chunk of tokens: its distance from label and teacher, and the gradient of both.

With e = exp(z - max z), the student's tail mass is the sum of e after the kept entries are set to zero: exact, where 1 - sum(p_kept)
would cancel to noise for a student that is sure. The normaliser is that sum plus the kept ones, so a teacher costs no second pass over
the vocabulary. The gradient has one factor per row on the tail and its own value on kept entries:

    tail v:  e_v * [ (ce + kl)/E - kl*Q/E_tail + rkl*(log(P/Q) - R)/E ]      E = sum e, P = E_tail/E, R = KL(p||q)
    kept i:  p_i * [ ce + kl + rkl*(log(p_i/q_i) - R) ] - kl*q_i
    label y: the above - ce

and an entropy bonus adds p_v * entropy * (log p_v + H) to each, a collision p_v * collision * 2 (p_v - C). log p_i of kept entries is
from their logits, and so exact however small p_i is. The tail has no logits left when its sum is known: log P stops at that of TINY,
85 nats.

All of it happens in the buffer of the logits. Where more room is needed it is taken for a few rows at a time. Against a teacher of
hidden states see `distft.objectives.whole`. Shapes as in `distft.objectives.loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distft.objectives.distributions import LOWEST, SparseRows, blocks

TINY = 1e-37
"""Smallest mass whose logarithm is taken; reached only by float32 underflow."""

TOP = 20
"""Of how many highest logits `top_entropy` is the entropy."""


class Chunk:
    """The student's distribution over one chunk and its distance from label and teacher. `exp_CV`, in the buffer of the logits, holds
    exp(z - max) with the teacher's kept entries zeroed; those stand in `kept_M`. `asked` are entropies, and the collision, that are to
    be known."""

    entropy_C: Tensor
    collision_C: Tensor
    top_entropy_C: Tensor

    def __init__(self, logits_CV: Tensor, labels_C: Tensor, teacher: SparseRows | None, *, asked: frozenset[str]) -> None:
        self.labels_C, self.teacher = labels_C, teacher
        label_logit_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
        peak_C1 = logits_CV.amax(1, keepdim=True)
        self.exp_CV = logits_CV.sub_(peak_C1)
        if "top_entropy" in asked:
            self.top_entropy_C = top_entropy(self.exp_CV)
        if teacher is not None:
            self._take_out_kept(teacher)
        else:
            self.total_C = self.exp_CV.exp_().sum(1)
            self.kl_C = self.rkl_C = torch.zeros_like(self.total_C)
        if "entropy" in asked:
            self.entropy_C = self._entropy()
        if "collision" in asked:
            self.collision_C = self._collision()
        self.lse_C = peak_C1.squeeze(1) + self.total_C.log()
        self.ce_C = self.lse_C - label_logit_C

    def _take_out_kept(self, teacher: SparseRows) -> None:
        """Makes exponentials of the shifted logits, and both divergences."""
        counts_C = teacher.counts_N
        self.row_M = torch.repeat_interleave(
            torch.arange(len(counts_C), device=counts_C.device), counts_C, output_size=len(teacher.ids_M)
        )
        first_C = counts_C.cumsum(0) - counts_C
        self._slot_M = torch.arange(len(teacher.ids_M), device=counts_C.device) - first_C[self.row_M]
        self._width = max(1, int(counts_C.max()) if len(counts_C) else 1)

        logit_M = self.exp_CV[self.row_M, teacher.ids_M]
        self.exp_CV.exp_()[self.row_M, teacher.ids_M] = 0.0
        tail_C, kept_M = self.exp_CV.sum(1), logit_M.exp()
        self.total_C = tail_C + self._row_sum(kept_M)
        self.tail_C = tail_C.clamp_min(TINY)
        self.kept_M = kept_M / self.total_C[self.row_M]  # p_i
        self.teacher_M = teacher.logprobs_M.exp()  # q_i

        self.logprob_M = (logit_M - self.total_C.log()[self.row_M]).clamp_min(LOWEST)  # log p_i
        self.log_ratio_M = self.logprob_M - teacher.logprobs_M  # log p_i/q_i
        tail_share_C = tail_C / self.total_C
        self.tail_ratio_C = (self.tail_C / self.total_C).clamp_min(TINY).log() - teacher.tail_N.clamp_min(TINY).log()  # log P/Q
        forward_C = -self._row_sum(self.teacher_M * self.log_ratio_M) - teacher.tail_N * self.tail_ratio_C
        self.exact_rkl_C = self._row_sum(self.kept_M * self.log_ratio_M) + tail_share_C * self.tail_ratio_C
        # Rounding may leave -1e-8 where p equals q. Only the reported value is clamped; gradients use the exact terms.
        self.kl_C, self.rkl_C = forward_C.clamp_min(0.0), self.exact_rkl_C.clamp_min(0.0)

    def _row_sum(self, values_M: Tensor) -> Tensor:
        """Sums per row in a fixed order (scatter-add on a GPU is not)."""
        padded = values_M.new_zeros(len(self.exp_CV), self._width)
        padded[self.row_M, self._slot_M] = values_M
        return padded.sum(1)

    def _entropy(self) -> Tensor:
        """H(p) in nats. What underflows has none."""
        entropy_C = torch.empty_like(self.total_C)
        for rows in blocks(len(entropy_C)):
            probs_BV = self.exp_CV[rows] / self.total_C[rows, None]
            entropy_C[rows] = -_times_log(probs_BV).sum(1)
        return entropy_C if self.teacher is None else entropy_C - self._row_sum(self.kept_M * self.logprob_M)

    def _collision(self) -> Tensor:
        """C(p), the sum of p_v squared."""
        collision_C = torch.empty_like(self.total_C)
        for rows in blocks(len(collision_C)):
            collision_C[rows] = (self.exp_CV[rows] / self.total_C[rows, None]).square_().sum(1)
        return collision_C if self.teacher is None else collision_C + self._row_sum(self.kept_M.square())

    def value(self, name: str) -> Tensor:
        """One of the values that are known of the student (`LiveField`), or its cross-entropy, per token."""
        return -self.ce_C if name == "label_logprob" else getattr(self, f"{name}_C")

    def gradient(
        self, ce_C: Tensor, kl_C: Tensor, rkl_C: Tensor, bonus_C: Tensor | None = None, spread_C: Tensor | None = None
    ) -> Tensor:
        """d loss / d logits, in the buffer of the logits; `bonus_C` is the weight of the entropy, `spread_C` that of the collision,
        which were asked for."""
        scale_C = (ce_C + kl_C) / self.total_C
        if self.teacher is not None:
            # Where the tail underflows, so do its e_v, and no factor could pull them up: the clamp changes no gradient but keeps a
            # large weight over TINY from being infinite, which times 0 is no number.
            scale_C = scale_C - (kl_C * self.teacher.tail_N / self.tail_C).clamp_max(torch.finfo(torch.float32).max)
            scale_C = scale_C + rkl_C * (self.tail_ratio_C - self.exact_rkl_C) / self.total_C
        grad_CV = self.exp_CV
        if bonus_C is None and spread_C is None:
            grad_CV.mul_(scale_C[:, None])
        else:
            for rows in blocks(len(grad_CV)):
                probs_BV = grad_CV[rows] / self.total_C[rows, None]
                grad_CV[rows] *= scale_C[rows, None]
                if spread_C is not None:
                    grad_CV[rows] += collision_pull(probs_BV, self.collision_C[rows], spread_C[rows]).mul_(probs_BV)
                if bonus_C is not None:
                    grad_CV[rows] += entropy_slope(_times_log(probs_BV), probs_BV, self.entropy_C[rows], bonus_C[rows])
        if self.teacher is not None:
            row_M = self.row_M
            away_M = self.log_ratio_M - self.exact_rkl_C[row_M]
            pull_M = (ce_C + kl_C)[row_M] + rkl_C[row_M] * away_M
            if bonus_C is not None:
                pull_M += bonus_C[row_M] * (self.logprob_M + self.entropy_C[row_M])
            if spread_C is not None:
                pull_M += 2 * spread_C[row_M] * (self.kept_M - self.collision_C[row_M])
            grad_CV[row_M, self.teacher.ids_M] = self.kept_M * pull_M - kl_C[row_M] * self.teacher_M
        grad_CV[torch.arange(len(ce_C), device=ce_C.device), self.labels_C] -= ce_C
        return grad_CV


def top_entropy(logits_CV: Tensor) -> Tensor:
    """Entropy in nats of the softmax over the highest logits."""
    logprobs = torch.log_softmax(logits_CV.topk(min(TOP, logits_CV.shape[1]), dim=1).values, 1).clamp_min_(LOWEST)
    return -(logprobs.exp() * logprobs).sum(1)


def entropy_slope(times_log_BV: Tensor, probs_BV: Tensor, entropy_B: Tensor, bonus_B: Tensor) -> Tensor:
    """d (-bonus * H(p)) / d logits, from p log p and p. Consumes both."""
    return times_log_BV.add_(probs_BV.mul_(entropy_B[:, None])).mul_(bonus_B[:, None])


def collision_pull(probs_BV: Tensor, collision_B: Tensor, spread_B: Tensor) -> Tensor:
    """d (spread * C(p)) / d logits as a factor on p, from p."""
    return (probs_BV - collision_B[:, None]).mul_(2 * spread_B[:, None])


def _times_log(probs_BV: Tensor) -> Tensor:
    """p log p, 0 at 0."""
    return probs_BV.log().clamp_min_(LOWEST).mul_(probs_BV)
