"""The one loss: four weights per token in, loss and both gradients out, in a single chunked pass over the output head.

Per token t with hidden state h_t, logits z = shape(W h_t + b), p = softmax(z), label y, and a teacher's sparse distribution of kept
probabilities q_i and tail mass Q (all other tokens together):

    loss_t = ce*CE + kl*KL(q||p) + rkl*KL(p||q) - entropy*H(p)

Both KLs are over the k+1 categories {kept tokens, everything else}. By the data-processing inequality they are never above the
divergence over the whole vocabulary, never negative, and equal to it when every token is kept.

How it is computed. With e = exp(z - max z), the student's tail mass is the sum of e after the kept entries are set to zero: exact,
where 1 - sum(p_kept) would cancel to noise for a student that is sure. The normaliser is that sum plus the kept ones, so a teacher
costs no second pass over the vocabulary. The gradient has one factor per row on the tail and its own value on kept entries:

    tail v:  e_v * [ (ce + kl)/E - kl*Q/E_tail + rkl*(log(P/Q) - R)/E ]      E = sum e, P = E_tail/E, R = KL(p||q)
    kept i:  p_i * [ ce + kl + rkl*(log(p_i/q_i) - R) ] - kl*q_i
    label y: the above - ce

No tensor larger than [chunk, vocabulary] is made, and the gradients of h and W are finished in the forward pass, so that a sharded
engine gathers W once. The sum over chunks runs in a fixed order: equal inputs give equal bits.

Shapes: N tokens, C of them in a chunk, V head rows, D hidden width, M kept teacher entries over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 27
"""Bytes of one [chunk, vocabulary] float32 buffer; two or three of them are alive at a time."""

TINY = 1e-37
"""Smallest mass whose logarithm is taken; reached only by float32 underflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """A teacher's kept entries for N tokens, flat and in row order; ids are distinct within a row. A row with no entries and
    `tail_N` 1 says nothing about p: its divergences are 0."""

    ids_M: Tensor
    logprobs_M: Tensor
    counts_N: Tensor
    tail_N: Tensor

    def chunk(self, start: int, stop: int) -> SparseRows:
        """Rows start to stop. Two syncs of the device a chunk."""
        first = int(self.counts_N[:start].sum())
        last = first + int(self.counts_N[start:stop].sum())
        return SparseRows(
            ids_M=self.ids_M[first:last], logprobs_M=self.logprobs_M[first:last],
            counts_N=self.counts_N[start:stop], tail_N=self.tail_N[start:stop],
        )  # fmt: skip

    def to(self, device: torch.device) -> SparseRows:
        return SparseRows(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What N tokens are trained towards."""

    labels_N: Tensor
    ce_N: Tensor
    kl_N: Tensor
    rkl_N: Tensor
    entropy_N: Tensor
    teacher: SparseRows | None
    """None: no token has a weight on a divergence."""

    def to(self, device: torch.device) -> Targets:
        moved: dict[str, Any] = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "teacher"}
        return Targets(**moved, teacher=self.teacher and self.teacher.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """What was measured per token, unweighted, in nats. Divergences are 0 without a teacher; H(p) is None unless asked for."""

    ce_N: Tensor
    kl_N: Tensor
    rkl_N: Tensor
    entropy_N: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitShape:
    """What a model does to W h + b before the softmax, exactly as in its own forward pass."""

    rows: int
    """Head rows that stand for a token; padding rows beyond them never receive mass."""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """Float32 logits [C, rows], in a fresh buffer. In a bfloat16 model the product is rounded to bfloat16, as the model's own
        forward rounds it; all that follows is float32."""
        logits_CV = (hidden_CD @ weight_VD[: self.rows].T).float()
        if bias_V is not None:
            logits_CV += bias_V[: self.rows].float()
        if self.scale != 1.0:
            logits_CV *= self.scale
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV

    def back(self, grad_CV: Tensor, logits_CV: Tensor | None) -> Tensor:
        """The gradient through `logits`, in place. `logits_CV` is needed for soft-capping alone."""
        if self.softcap is not None:
            assert logits_CV is not None, "soft-capping needs the logits again"
            grad_CV *= 1 - (logits_CV / self.softcap).square()
        if self.scale != 1.0:
            grad_CV *= self.scale
        return grad_CV


def chunk_tokens(rows: int) -> int:
    """Tokens per chunk for a head of so many rows."""
    return max(16, min(1024, CHUNK_BYTES // (4 * rows)))


def token_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, *, shape: LogitShape, chunk: int | None = None
) -> tuple[Tensor, TokenValues]:
    """The weighted sum of all tokens' losses, differentiable in hidden, weight and bias, and each token's values.

    The caller divides by the step's normaliser (law 7): nothing here knows how many tokens other ranks or micro-batches have.
    """
    loss, ce_N, kl_N, rkl_N, entropy_N = _TokenLoss.apply(
        hidden_ND, weight_VD, bias_V, targets, shape, chunk or chunk_tokens(shape.rows)
    )  # pyright: ignore[reportGeneralTypeIssues]  (autograd functions are untyped)
    return loss, TokenValues(ce_N=ce_N, kl_N=kl_N, rkl_N=rkl_N, entropy_N=entropy_N)


def measure(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, *, shape: LogitShape, entropy: bool = False
) -> TokenValues:
    """Each token's values, with no gradient; the weights in `targets` do not matter."""
    size, columns = chunk_tokens(shape.rows), []
    with torch.no_grad():
        for start in range(0, len(hidden_ND), size):
            stop = min(start + size, len(hidden_ND))
            teacher = targets.teacher and targets.teacher.chunk(start, stop)
            logits_CV = shape.logits(hidden_ND[start:stop], weight_VD, bias_V)
            part = _Chunk(logits_CV, targets.labels_N[start:stop], teacher, keep_logits=entropy)
            columns.append((part.ce_C, part.kl_C, part.rkl_C, part.student_entropy() if entropy else part.ce_C))
    empty = (hidden_ND.new_zeros(0, dtype=torch.float32),) * 4
    ce_N, kl_N, rkl_N, entropy_N = (torch.cat(column) for column in zip(*columns, strict=True)) if columns else empty
    return TokenValues(ce_N=ce_N, kl_N=kl_N, rkl_N=rkl_N, entropy_N=entropy_N if entropy else None)


class _Chunk:
    """The student's distribution over one chunk and its distance from label and teacher. `exp_CV` holds exp(z - max) with the
    teacher's kept entries zeroed; those stand in `kept_M`."""

    def __init__(self, logits_CV: Tensor, labels_C: Tensor, teacher: SparseRows | None, *, keep_logits: bool) -> None:
        self.labels_C, self.teacher = labels_C, teacher
        label_logit_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
        peak_C1 = logits_CV.amax(1, keepdim=True)
        self.logits_CV = logits_CV if keep_logits else None
        shifted_CV = logits_CV - peak_C1 if keep_logits else logits_CV.sub_(peak_C1)
        self.exp_CV = shifted_CV.exp_()
        if teacher is None:
            self.total_C = self.exp_CV.sum(1)
            self.kl_C = self.rkl_C = torch.zeros_like(self.total_C)
        else:
            self._take_out_kept(teacher)
        self.lse_C = peak_C1.squeeze(1) + self.total_C.log()
        self.ce_C = self.lse_C - label_logit_C

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

    def student_entropy(self) -> Tensor:
        """H(p) in nats, from the whole vocabulary."""
        assert self.logits_CV is not None, "entropy needs the logits"
        logprobs_CV = self.logits_CV - self.lse_C[:, None]
        return -(logprobs_CV.exp() * logprobs_CV).sum(1)

    def gradient(self, ce_C: Tensor, kl_C: Tensor, rkl_C: Tensor) -> Tensor:
        """d loss / d logits of the first three terms. Consumes `exp_CV`."""
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


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, shape: LogitShape, size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        wants_entropy = bool((targets.entropy_N != 0).any())
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        values = [hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32) for _ in range(4)]

        for start in range(0, len(hidden_ND), size):
            rows = slice(start, min(start + size, len(hidden_ND)))
            teacher = targets.teacher and targets.teacher.chunk(rows.start, rows.stop)
            logits_CV = shape.logits(hidden_ND[rows], weight_VD, bias_V)
            keep = wants_entropy or shape.softcap is not None
            chunk = _Chunk(logits_CV, targets.labels_N[rows], teacher, keep_logits=keep)
            for column, value_C in zip(values, (chunk.ce_C, chunk.kl_C, chunk.rkl_C), strict=False):
                column[rows] = value_C
            entropy_grad_CV = None
            if wants_entropy:
                values[3][rows] = chunk.student_entropy()
                logprobs_CV = logits_CV - chunk.lse_C[:, None]
                entropy_grad_CV = logprobs_CV.exp() * (logprobs_CV + values[3][rows, None]) * targets.entropy_N[rows, None]
            grad_CV = chunk.gradient(targets.ce_N[rows], targets.kl_N[rows], targets.rkl_N[rows])
            if entropy_grad_CV is not None:
                grad_CV += entropy_grad_CV
            grad_CV = shape.back(grad_CV, chunk.logits_CV)
            if grad_bias_V is not None:
                grad_bias_V[: shape.rows] += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VD.dtype)
            grad_hidden_ND[rows] = grad_CV @ weight_VD[: shape.rows]
            _add_product(grad_weight_VD[: shape.rows], grad_CV, hidden_ND[rows])

        ce_N, kl_N, rkl_N, entropy_N = values
        loss = (targets.ce_N * ce_N).sum() + (targets.kl_N * kl_N).sum() + (targets.rkl_N * rkl_N).sum()
        if wants_entropy:
            loss = loss - (targets.entropy_N * entropy_N).sum()
        grad_bias_V = None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), grad_bias_V)
        if not wants_entropy:
            ctx.mark_non_differentiable(ce_N, kl_N, rkl_N)
            return loss, ce_N, kl_N, rkl_N, None
        ctx.mark_non_differentiable(ce_N, kl_N, rkl_N, entropy_N)  # a second call would undo the first
        return loss, ce_N, kl_N, rkl_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        outer = grads[0].item()  # 1/normaliser: rounding it to bfloat16 would be an error of 0.4 % in every gradient
        grads_out = [None if grad is None else _scaled(grad, outer) for grad in (grad_hidden_ND, grad_weight_VD, grad_bias_V)]
        return (*grads_out, None, None, None)


def _scaled(grad: Tensor, factor: float) -> Tensor:
    """grad * factor in place, multiplied in float32 and rounded once into grad's own dtype: what Python numbers get on every device
    (a CUDA tensor as factor would be rounded first). A second backward pass through the same graph is refused by autograd, which
    sees that a saved tensor has changed."""
    return grad.mul_(factor)


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """total += grad^T hidden, accumulated in float32 whatever the inputs are."""
    if grad_CV.dtype == torch.float32:
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        total_VD += (grad_CV.T @ hidden_CD).float()
