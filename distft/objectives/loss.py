"""The one loss: four weights per token in, loss and both gradients out, in a single chunked pass over the output head.

Per token t with hidden state h_t, logits z = shape(W h_t + b), p = softmax(z), label y, and a teacher's sparse distribution of kept
probabilities q_i and tail mass Q (all other tokens together):

    loss_t = ce*CE + kl*KL(q||p) + rkl*KL(p||q) - entropy*H(p)

Both KLs are over the k+1 categories {kept tokens, everything else}. By the data-processing inequality they are never above the
divergence over the whole vocabulary, never negative, and equal to it when every token is kept. A teacher whose hidden states and
head are at hand (`DenseRows`) is compared over the whole vocabulary, exactly.

How a chunk is computed stands in `objectives/chunk.py`. No tensor larger than [chunk, vocabulary] is made, and the gradients of h and
W are finished in the forward pass, so that a sharded engine gathers W once. The sum over chunks runs in a fixed order: equal inputs
give equal bits. Weights may follow from the student itself (`Targets.live`): they are decided chunk by chunk, between value and
gradient, and are constants to the gradient.

Shapes: N tokens, C of them in a chunk, V head rows, D hidden width, M kept teacher entries over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distft.objectives.chunk import Chunk
from distft.objectives.distributions import DenseRows, LogitShape, SparseRows
from distft.objectives.treatment import LiveField

CHUNK_BYTES = 1 << 27
"""Bytes of one [chunk, vocabulary] float32 buffer; two or three of them are alive at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The four weights of N tokens."""

    ce_N: Tensor
    kl_N: Tensor
    rkl_N: Tensor
    entropy_N: Tensor

    def chunk(self, rows: slice) -> Weights:
        return Weights(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


class Live(Protocol):
    """Weights that follow from the student of this very step, token by token."""

    @property
    def fields(self) -> frozenset[LiveField]:
        """What has to be known of the student."""
        ...

    def decide(self, rows: slice, seen: dict[LiveField, Tensor]) -> Weights:
        """The weights of these tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What N tokens are trained towards."""

    labels_N: Tensor
    ce_N: Tensor
    kl_N: Tensor
    rkl_N: Tensor
    entropy_N: Tensor
    teacher: SparseRows | DenseRows | None
    """None: no token has a weight on a divergence."""
    temperature: float = 1.0
    """Of both sides of a divergence; other than 1 only against a dense teacher."""
    live: Live | None = None
    """Decides all weights in the place of the four columns; never gives one on the entropy, whose gradient needs to be planned for."""

    @property
    def weights(self) -> Weights:
        return Weights(ce_N=self.ce_N, kl_N=self.kl_N, rkl_N=self.rkl_N, entropy_N=self.entropy_N)

    def to(self, device: torch.device) -> Targets:
        columns = {name: getattr(self, name).to(device) for name in ("labels_N", "ce_N", "kl_N", "rkl_N", "entropy_N")}
        return replace(self, **columns, teacher=self.teacher and self.teacher.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """What was measured per token, unweighted, in nats. Divergences are 0 without a teacher; entropies are None unless asked for."""

    ce_N: Tensor
    kl_N: Tensor
    rkl_N: Tensor
    entropy_N: Tensor | None
    top_entropy_N: Tensor | None = None
    weights: Weights | None = None
    """What each token was trained with; None where nothing was trained."""


def chunk_tokens(rows: int) -> int:
    """Tokens per chunk for a head of so many rows."""
    return max(16, min(1024, CHUNK_BYTES // (4 * rows)))


def token_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, *, shape: LogitShape, chunk: int | None = None
) -> tuple[Tensor, TokenValues]:
    """The weighted sum of all tokens' losses, differentiable in hidden, weight and bias, and each token's values.

    The caller divides by the step's normaliser (law 7): nothing here knows how many tokens other ranks or micro-batches have.
    """
    loss, ce_N, kl_N, rkl_N, entropy_N, *decided = _TokenLoss.apply(
        hidden_ND, weight_VD, bias_V, targets, shape, chunk or chunk_tokens(shape.rows)
    )  # pyright: ignore[reportGeneralTypeIssues]  (autograd functions are untyped)
    columns = dict(zip(("ce_N", "kl_N", "rkl_N", "entropy_N"), decided, strict=True))
    return loss, TokenValues(ce_N=ce_N, kl_N=kl_N, rkl_N=rkl_N, entropy_N=entropy_N, weights=Weights(**columns))


def measure(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, *, shape: LogitShape,
    wanted: frozenset[LiveField] = frozenset(),
) -> TokenValues:  # fmt: skip
    """Each token's values, with no gradient; the weights in `targets` do not matter."""
    size = chunk_tokens(shape.rows)
    asked = [name for name in ("entropy", "top_entropy") if name in wanted]
    columns: dict[str, list[Tensor]] = {name: [] for name in ("ce", "kl", "rkl", *asked)}
    with torch.no_grad():
        for start in range(0, len(hidden_ND), size):
            rows = slice(start, min(start + size, len(hidden_ND)))
            teacher = targets.teacher and targets.teacher.chunk(rows.start, rows.stop)
            logits_CV = shape.logits(hidden_ND[rows], weight_VD, bias_V)
            part = Chunk(logits_CV, targets.labels_N[rows], teacher, keep_logits=bool(asked), temperature=targets.temperature)
            for name, column in columns.items():
                column.append(part.value(name))
    empty = hidden_ND.new_zeros(0, dtype=torch.float32)
    found = {f"{name}_N": torch.cat([empty, *column]) for name, column in columns.items()}
    return TokenValues(**{"entropy_N": None, **found})


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, shape: LogitShape, size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        live = targets.live
        wants_entropy = live is None and bool((targets.entropy_N != 0).any())
        keep = wants_entropy or shape.softcap is not None or bool(live and live.fields & {"entropy", "top_entropy"})
        weights = targets.weights if live is None else _blank(hidden_ND)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        values = [hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32) for _ in range(4)]

        for start in range(0, len(hidden_ND), size):
            rows = slice(start, min(start + size, len(hidden_ND)))
            teacher = targets.teacher and targets.teacher.chunk(rows.start, rows.stop)
            logits_CV = shape.logits(hidden_ND[rows], weight_VD, bias_V)
            chunk = Chunk(logits_CV, targets.labels_N[rows], teacher, keep_logits=keep, temperature=targets.temperature)
            for column, value_C in zip(values, (chunk.ce_C, chunk.kl_C, chunk.rkl_C), strict=False):
                column[rows] = value_C
            given = weights.chunk(rows)
            if live is not None:
                decided = live.decide(rows, {name: chunk.value(name) for name in live.fields})
                for name in ("ce_N", "kl_N", "rkl_N"):
                    getattr(given, name).copy_(getattr(decided, name))
            entropy_grad_CV = None
            if wants_entropy:
                values[3][rows] = chunk.value("entropy")
                entropy_grad_CV = chunk.entropy_gradient(values[3][rows], given.entropy_N)
            grad_CV = chunk.gradient(given.ce_N, given.kl_N, given.rkl_N)
            if entropy_grad_CV is not None:
                grad_CV += entropy_grad_CV
            grad_CV = shape.back(grad_CV, chunk.logits_CV)
            if grad_bias_V is not None:
                grad_bias_V[: shape.rows] += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VD.dtype)
            grad_hidden_ND[rows] = grad_CV @ weight_VD[: shape.rows]
            _add_product(grad_weight_VD[: shape.rows], grad_CV, hidden_ND[rows])

        ce_N, kl_N, rkl_N, entropy_N = values
        loss = (weights.ce_N * ce_N).sum() + (weights.kl_N * kl_N).sum() + (weights.rkl_N * rkl_N).sum()
        if wants_entropy:
            loss = loss - (weights.entropy_N * entropy_N).sum()
        grad_bias_V = None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), grad_bias_V)
        columns = (weights.ce_N, weights.kl_N, weights.rkl_N, weights.entropy_N)
        ctx.mark_non_differentiable(ce_N, kl_N, rkl_N, entropy_N, *columns)
        return loss, ce_N, kl_N, rkl_N, entropy_N if wants_entropy else None, *columns

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


def _blank(hidden_ND: Tensor) -> Weights:
    columns = {f.name: hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32) for f in fields(Weights)}
    return Weights(**columns)
