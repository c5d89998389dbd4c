"""The student's distribution over a chunk of tokens: its distance from label and teacher, and the gradient of both.

With e = exp(z - max z), the student's tail mass is the sum of e after the kept entries are set to zero: exact, where 1 - sum(p_kept)
would cancel to noise for a student that is sure. The normaliser is that sum plus the kept ones, so a teacher costs no second pass over
the vocabulary. The gradient has one factor per row on the tail and its own value on kept entries:

    tail v:  e_v * [ (ce + kl)/E - kl*Q/E_tail + rkl*(log(P/Q) - R)/E ]      E = sum e, P = E_tail/E, R = KL(p||q)
    kept i:  p_i * [ ce + kl + rkl*(log(p_i/q_i) - R) ] - kl*q_i
    label y: the above - ce

Against a dense teacher all tokens are kept, and there is no tail; there alone a temperature T can soften both sides. The divergences
are then those of softmax(z/T), times T^2, which keeps their gradients as large as they are at 1:

    v:  T * p_v * [ kl + rkl*(log(p_v/q_v) - R) ] - T * kl*q_v          p, q and R at temperature T

Shapes as in `distft.objectives.loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distft.objectives.distributions import LOWEST, DenseRows, SparseRows

TINY = 1e-37
"""Smallest mass whose logarithm is taken; reached only by float32 underflow."""

TOP = 20
"""Of how many highest logits `top_entropy` is the entropy."""


class Chunk:
    """The student's distribution over one chunk and its distance from label and teacher. `exp_CV` holds exp(z - max) with the
    teacher's kept entries zeroed; those stand in `kept_M`. Against a dense teacher nothing is zeroed."""

    def __init__(self, logits_CV: Tensor, labels_C: Tensor, teacher: SparseRows | DenseRows | None, *, keep_logits: bool,
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        assert temperature == 1.0 or not isinstance(teacher, SparseRows), "what a cache left out cannot be softened"
        self.labels_C, self.teacher, self.temperature = labels_C, teacher, temperature
        label_logit_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
        peak_C1 = logits_CV.amax(1, keepdim=True)
        self.logits_CV = logits_CV if keep_logits else None
        shifted_CV = logits_CV - peak_C1 if keep_logits else logits_CV.sub_(peak_C1)
        if isinstance(teacher, DenseRows):
            self.exp_CV = shifted_CV.exp()
            self._compare_whole(teacher, shifted_CV)
        else:
            self.exp_CV = shifted_CV.exp_()
            if teacher is not None:
                self._take_out_kept(teacher)
            else:
                self.total_C = self.exp_CV.sum(1)
                self.kl_C = self.rkl_C = torch.zeros_like(self.total_C)
        self.lse_C = peak_C1.squeeze(1) + self.total_C.log()
        self.ce_C = self.lse_C - label_logit_C

    def _compare_whole(self, teacher: DenseRows, shifted_CV: Tensor) -> None:
        """Both divergences over the whole vocabulary. Consumes `shifted_CV`."""
        square = self.temperature**2
        self.total_C = self.exp_CV.sum(1)
        self.soft_CV, soft_total_C = self.exp_CV, self.total_C  # exp(z/T) of the student, and its sum
        if self.temperature != 1.0:
            self.soft_CV = shifted_CV.div_(self.temperature).exp()
            soft_total_C = self.soft_CV.sum(1)
        self.soft_total_C1 = soft_total_C[:, None]
        teacher_logprobs_CV = teacher.head.logprobs(teacher.hidden_NT, self.temperature)
        logprobs_CV = shifted_CV.sub_(self.soft_total_C1.log()).clamp_min_(LOWEST)
        self.log_ratio_CV = logprobs_CV.sub_(teacher_logprobs_CV)  # log p_v/q_v
        self.teacher_CV = teacher_logprobs_CV.exp_()
        self.exact_rkl_C = _row_dots(self.soft_CV, self.log_ratio_CV) / soft_total_C
        self.kl_C = (-_row_dots(self.teacher_CV, self.log_ratio_CV)).clamp_min(0.0) * square
        self.rkl_C = self.exact_rkl_C.clamp_min(0.0) * square

    def _take_out_kept(self, teacher: SparseRows) -> None:
        counts_C = teacher.counts_N
        self.row_M = torch.repeat_interleave(
            torch.arange(len(counts_C), device=counts_C.device), counts_C, output_size=len(teacher.ids_M)
        )
        first_C = counts_C.cumsum(0) - counts_C
        self._slot_M = torch.arange(len(teacher.ids_M), device=counts_C.device) - first_C[self.row_M]
        self._width = max(1, int(counts_C.max()) if len(counts_C) else 1)

        kept_M = self.exp_CV[self.row_M, teacher.ids_M]
        self.exp_CV[self.row_M, teacher.ids_M] = 0.0
        tail_C = self.exp_CV.sum(1)
        self.total_C = tail_C + self._row_sum(kept_M)
        self.tail_C = tail_C.clamp_min(TINY)
        self.kept_M = kept_M / self.total_C[self.row_M]  # p_i
        self.teacher_M = teacher.logprobs_M.exp()  # q_i

        self.log_ratio_M = self.kept_M.clamp_min(TINY).log() - teacher.logprobs_M  # log p_i/q_i
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

    def value(self, name: str) -> Tensor:
        """One of the values that are known of the student (`LiveField`), or its cross-entropy, per token."""
        if name == "entropy":
            return self._entropy(self._kept_logits())
        if name == "top_entropy":
            logits_CV = self._kept_logits()
            return self._entropy(logits_CV.topk(min(TOP, logits_CV.shape[1]), dim=1).values)
        return -self.ce_C if name == "label_logprob" else getattr(self, f"{name}_C")

    @staticmethod
    def _entropy(logits_CV: Tensor) -> Tensor:
        """Of the softmax over these logits, in nats."""
        logprobs_CV = torch.log_softmax(logits_CV, 1).clamp_min_(LOWEST)
        return -_row_dots(logprobs_CV.exp(), logprobs_CV)

    def entropy_gradient(self, entropy_C: Tensor, weights_C: Tensor) -> Tensor:
        """d (-weights * H(p)) / d logits."""
        logprobs_CV = (self._kept_logits() - self.lse_C[:, None]).clamp_min_(LOWEST)
        return logprobs_CV.exp().mul_(logprobs_CV.add_(entropy_C[:, None])).mul_(weights_C[:, None])

    def _kept_logits(self) -> Tensor:
        assert self.logits_CV is not None, "entropies need the logits"
        return self.logits_CV

    def gradient(self, ce_C: Tensor, kl_C: Tensor, rkl_C: Tensor) -> Tensor:
        """d loss / d logits of the first three terms. Consumes `exp_CV`."""
        if isinstance(self.teacher, DenseRows):
            return self._dense_gradient(ce_C[:, None], kl_C[:, None], rkl_C[:, None])
        scale_C = (ce_C + kl_C) / self.total_C
        if self.teacher is not None:
            # a large weight over a tail that underflows would be infinite, and infinity times the tail's 0 is no number
            scale_C = scale_C - (kl_C * self.teacher.tail_N / self.tail_C).clamp_max(torch.finfo(torch.float32).max)
            scale_C = scale_C + rkl_C * (self.tail_ratio_C - self.exact_rkl_C) / self.total_C
        grad_CV = self.exp_CV.mul_(scale_C[:, None])
        if self.teacher is not None:
            row_M = self.row_M
            away_M = self.log_ratio_M - self.exact_rkl_C[row_M]
            pull_M = (ce_C + kl_C)[row_M] + rkl_C[row_M] * away_M
            grad_CV[row_M, self.teacher.ids_M] = self.kept_M * pull_M - kl_C[row_M] * self.teacher_M
        grad_CV[torch.arange(len(ce_C), device=ce_C.device), self.labels_C] -= ce_C
        return grad_CV

    def _dense_gradient(self, ce_C1: Tensor, kl_C1: Tensor, rkl_C1: Tensor) -> Tensor:
        """The same against a dense teacher. Consumes all buffers."""
        soft, temperature = self.temperature != 1.0, self.temperature
        # At temperature 1 both softmaxes are one, and the label's pull goes in with the others.
        pull_CV = self.log_ratio_CV.sub_(self.exact_rkl_C[:, None]).mul_(rkl_C1).add_(kl_C1 if soft else ce_C1 + kl_C1)
        grad_CV = self.soft_CV.mul_(pull_CV).div_(self.soft_total_C1)
        grad_CV -= self.teacher_CV.mul_(kl_C1)
        if soft:
            grad_CV.mul_(temperature).add_(self.exp_CV.mul_(ce_C1 / self.total_C[:, None]))
        grad_CV[torch.arange(len(ce_C1), device=ce_C1.device), self.labels_C] -= ce_C1.squeeze(1)
        return grad_CV


def _row_dots(one_CV: Tensor, other_CV: Tensor) -> Tensor:
    """The rows' dot products, without a buffer for the products."""
    return torch.bmm(one_CV[:, None, :], other_CV[:, :, None]).flatten()
