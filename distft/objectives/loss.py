"""The one loss: five weights per token in, loss and both gradients out, in a single chunked pass over the output head.

Per token t with hidden state h_t, logits z = shape(W h_t + b), p = softmax(z), label y, and a teacher's sparse distribution of kept
probabilities q_i and tail mass Q (all other tokens together):

    loss_t = ce*CE + kl*KL(q||p) + rkl*KL(p||q) - entropy*H(p) + collision*C(p)        C(p) = sum of p_v^2

Both KLs are over the k+1 categories {kept tokens, everything else}. By the data-processing inequality they are never above the
divergence over the whole vocabulary, never negative, and equal to it when every token is kept. A teacher whose hidden states and
head are at hand (`DenseRows`) is compared over the whole vocabulary, exactly.

How a chunk is computed stands in `objectives/chunk.py` and `objectives/whole.py`. Logits are never alive for more tokens than a
chunk's, and all buffers of a chunk together stay within BUFFER_BYTES; beside them there is the gradient of W, summed in float32. The
gradients of h and W are finished in the forward pass, so that a sharded engine gathers W once. The sum over chunks runs in a fixed
order: equal inputs give equal bits. Weights may follow from the student itself (`Targets.live`): they are decided chunk by chunk,
between value and gradient, and are constants to the gradient.

Shapes: N tokens, C of them in a chunk, V head rows, D hidden width, M kept teacher entries over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distft.objectives.chunk import Chunk
from distft.objectives.distributions import BLOCKS, DenseRows, LogitShape, SparseRows
from distft.objectives.treatment import LiveField
from distft.objectives.whole import WholeChunk

PARTS = ("ce", "kl", "rkl", "entropy", "collision")
"""The loss's five, and the order of their columns. A column of collisions is None where no token bears one: nearly always."""

CHUNK_BYTES = 1 << 27
"""Bytes of one [chunk, vocabulary] float32 buffer of scoring."""
BUFFER_BYTES = 1 << 29
"""Bytes of all buffers of one chunk of training, however many of them its weights and its teacher take (`buffers`)."""
LEAST_TOKENS, MOST_TOKENS = 16, 1024
"""Bounds of a chunk: below the first the output head would be read for next to nothing, above the second nothing is gained."""
WEIGHT_ROWS = 8_192
"""Rows of W whose gradient is made at a time where it is not summed in its own dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The five weights of N tokens."""

    ce_N: Tensor
    kl_N: Tensor
    rkl_N: Tensor
    entropy_N: Tensor
    collision_N: Tensor | None = None

    def chunk(self, rows: slice | Tensor) -> Weights:
        """Those of a run of tokens, or of those where a mask is true."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Weights(**{name: column[rows] for name, column in columns.items() if column is not None})


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
    collision_N: Tensor | None = None
    quadrant_N: Tensor | None = None
    """Which of `distft.objectives.quadrants` each is of, for what is told of a step; None: not asked for."""
    temperature: float = 1.0
    """Of both sides of a divergence, in values as in gradients; other than 1 only against a dense teacher. Any factor that makes up
    for a temperature is part of the weights."""
    live: Live | None = None
    """Decides all weights in the place of the columns; never gives one on entropy or collision, whose gradients need to be planned
    for."""

    @property
    def weights(self) -> Weights:
        return Weights(**{f"{part}_N": getattr(self, f"{part}_N") for part in PARTS})

    def to(self, device: torch.device) -> Targets:
        columns = {name: getattr(self, name) for name in ("labels_N", "quadrant_N", *(f"{part}_N" for part in PARTS))}
        moved = {name: column.to(device) for name, column in columns.items() if column is not None}
        return replace(self, **moved, teacher=self.teacher and self.teacher.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """What was measured per token, unweighted, in nats. Divergences are 0 without a teacher; entropies are None unless asked for, and
    so is the collision, which has no unit."""

    ce_N: Tensor
    kl_N: Tensor
    rkl_N: Tensor
    entropy_N: Tensor | None
    collision_N: Tensor | None = None
    top_entropy_N: Tensor | None = None
    weights: Weights | None = None
    """What each token was trained with; None where nothing was trained."""
    quadrant_N: Tensor | None = None
    """The targets' own."""


def chunk_tokens(rows: int) -> int:
    """Tokens per chunk of scoring, for a head of so many rows."""
    return max(LEAST_TOKENS, min(MOST_TOKENS, CHUNK_BYTES // (4 * rows)))


def buffers(shape: LogitShape, *, dense: bool, half: bool) -> float:
    """How many [chunk, vocabulary] float32 buffers are alive at a time: the logits, which become their gradient; the teacher's, where
    hidden states are kept; the logits again where a soft cap needs them; half of one where products are rounded; blocks of rows."""
    return 1 + dense + (shape.softcap is not None) + 0.5 * half + 6 / BLOCKS


def loss_chunk(shape: LogitShape, teacher: SparseRows | DenseRows | None, dtype: torch.dtype) -> int:
    """Tokens per chunk of training."""
    count = buffers(shape, dense=isinstance(teacher, DenseRows), half=dtype != torch.float32)
    return max(LEAST_TOKENS, min(MOST_TOKENS, int(BUFFER_BYTES / (4 * count * shape.rows))))


def token_loss(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, *, shape: LogitShape, chunk: int | None = None
) -> tuple[Tensor, TokenValues]:
    """The weighted sum of all tokens' losses, differentiable in hidden, weight and bias, and each token's values.

    The caller divides by the step's normaliser (law 7): nothing here knows how many tokens other ranks or micro-batches have.
    """
    loss, *told = _TokenLoss.apply(
        hidden_ND, weight_VD, bias_V, targets, shape, chunk or loss_chunk(shape, targets.teacher, hidden_ND.dtype)
    )  # pyright: ignore[reportGeneralTypeIssues]  (autograd functions are untyped)
    names = [f"{part}_N" for part in PARTS]
    values, decided = (dict(zip(names, half, strict=True)) for half in (told[: len(names)], told[len(names) :]))
    return loss, TokenValues(**values, weights=Weights(**decided), quadrant_N=targets.quadrant_N)


def measure(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, *, shape: LogitShape,
    wanted: frozenset[LiveField] = frozenset(), chunk: int | None = None,
) -> TokenValues:  # fmt: skip
    """Each token's values, with no gradient; the weights in `targets` do not matter."""
    size = chunk or loss_chunk(shape, targets.teacher, hidden_ND.dtype)
    asked = wanted & {"entropy", "top_entropy", "collision"}
    columns: dict[str, list[Tensor]] = {name: [] for name in ("ce", "kl", "rkl", *sorted(asked))}
    with torch.no_grad():
        for rows in _chunks(len(hidden_ND), size):
            part = _compare(shape.logits(hidden_ND[rows], weight_VD, bias_V), targets, rows, asked)
            for name, column in columns.items():
                column.append(part.value(name))
            del part  # its buffers, before those of the next
    empty = hidden_ND.new_zeros(0, dtype=torch.float32)
    found = {f"{name}_N": torch.cat([empty, *column]) for name, column in columns.items()}
    return TokenValues(**{"entropy_N": None, **found})


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _compare(logits_CV: Tensor, targets: Targets, rows: slice, asked: frozenset[str]) -> Chunk | WholeChunk:
    """A chunk in the buffer of its logits."""
    teacher, labels_C = targets.teacher and targets.teacher.chunk(rows.start, rows.stop), targets.labels_N[rows]
    if isinstance(teacher, DenseRows):
        return WholeChunk(logits_CV, labels_C, teacher, asked=asked, temperature=targets.temperature)
    assert targets.temperature == 1.0 or teacher is None, "what a cache left out cannot be softened"
    return Chunk(logits_CV, labels_C, teacher, asked=asked)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, shape: LogitShape, size: int
    ) -> tuple[Tensor | None, ...]:
        """The loss, each of PARTS' values, and each of PARTS' weights."""
        live = targets.live
        wants_entropy = live is None and bool((targets.entropy_N != 0).any())
        wants_collision = live is None and targets.collision_N is not None
        planned = [part for part, wanted in (("entropy", wants_entropy), ("collision", wants_collision)) if wanted]
        weights = targets.weights if live is None else _blank(hidden_ND)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        values = {name: hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32) for name in (*PARTS[:3], *planned)}
        asked = frozenset(planned) if live is None else live.fields

        for rows in _chunks(len(hidden_ND), size):
            logits_CV = shape.logits(hidden_ND[rows], weight_VD, bias_V)
            seen_CV = logits_CV.clone() if shape.softcap is not None else None
            chunk = _compare(logits_CV, targets, rows, asked)
            for name, column in values.items():
                column[rows] = chunk.value(name)
            given = weights.chunk(rows)
            if live is not None:
                decided = live.decide(rows, {name: chunk.value(name) for name in live.fields})
                for name in ("ce_N", "kl_N", "rkl_N"):
                    getattr(given, name).copy_(getattr(decided, name))
            bonus_C, spread_C = given.entropy_N if wants_entropy else None, given.collision_N if wants_collision else None
            grad_CV = shape.back(chunk.gradient(given.ce_N, given.kl_N, given.rkl_N, bonus_C, spread_C), seen_CV)
            del logits_CV, seen_CV, chunk  # the buffers, before those of the next chunk
            if grad_bias_V is not None:
                grad_bias_V[: shape.rows] += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VD.dtype)
            grad_hidden_ND[rows] = grad_CV @ weight_VD[: shape.rows]
            _add_product(grad_weight_VD[: shape.rows], grad_CV, hidden_ND[rows])
            del grad_CV

        loss = (weights.ce_N * values["ce"]).sum() + (weights.kl_N * values["kl"]).sum() + (weights.rkl_N * values["rkl"]).sum()
        if wants_entropy:
            loss = loss - (weights.entropy_N * values["entropy"]).sum()
        if weights.collision_N is not None:
            loss = loss + (weights.collision_N * values["collision"]).sum()
        grad_bias_V = None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), grad_bias_V)
        columns = [getattr(weights, f"{part}_N") for part in PARTS]
        ctx.mark_non_differentiable(*values.values(), *(column for column in columns if column is not None))
        return loss, *(values.get(part) for part in PARTS), *columns

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
    """total += grad^T hidden, summed in float32 whatever the inputs are. What each chunk adds is rounded to the inputs' dtype, for a
    few rows of the head at a time: whole, it would be as large as the head."""
    if grad_CV.dtype == torch.float32:
        total_VD.addmm_(grad_CV.T, hidden_CD)
        return
    for start in range(0, len(total_VD), WEIGHT_ROWS):
        rows = slice(start, start + WEIGHT_ROWS)
        total_VD[rows] += grad_CV[:, rows].T @ hidden_CD


def _blank(hidden_ND: Tensor) -> Weights:
    """Weights of 0, but for the collision, which nobody decides here."""
    ce_N, kl_N, rkl_N, entropy_N = (hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32) for _ in range(4))
    return Weights(ce_N=ce_N, kl_N=kl_N, rkl_N=rkl_N, entropy_N=entropy_N)
