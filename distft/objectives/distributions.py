"""What a loss is told of a teacher, and what a model does between its head and its softmax.

Shapes: N tokens, C of them in a chunk, V head rows, T the teacher's width, M kept teacher entries over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

LOWEST = -1e4
"""Smallest log-probability that is compared: some models give tokens that they never say a logit of -inf."""

BLOCKS = 16
"""Into so many blocks of rows a chunk is cut where a step needs room beside its buffers."""


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
        """The gradient through `logits`, in place. `logits_CV` is needed for soft-capping alone, and consumed."""
        if self.softcap is not None:
            assert logits_CV is not None, "soft-capping needs the logits again"
            grad_CV *= logits_CV.div_(self.softcap).square_().neg_().add_(1)
        if self.scale != 1.0:
            grad_CV *= self.scale
        return grad_CV


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

    def select(self, row_K: Tensor, held_K: Tensor) -> SparseRows:
        """The rows with these numbers, ascending; those that are not held say nothing."""
        chosen_N = torch.zeros_like(self.counts_N, dtype=torch.bool)
        chosen_N[row_K] = held_K
        kept_M = chosen_N.repeat_interleave(self.counts_N, output_size=len(self.ids_M))
        return SparseRows(
            ids_M=self.ids_M[kept_M], logprobs_M=self.logprobs_M[kept_M], counts_N=self.counts_N[row_K] * held_K,
            tail_N=torch.where(held_K, self.tail_N[row_K], 1.0),
        )  # fmt: skip

    def to(self, device: torch.device) -> SparseRows:
        return SparseRows(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


class DenseHead:
    """A teacher's output head, frozen."""

    def __init__(self, weight_VT: Tensor, bias_V: Tensor | None, shape: LogitShape) -> None:
        self.weight_VT, self.bias_V, self.shape = weight_VT, bias_V, shape
        self._elsewhere: DenseHead | None = None

    def to(self, device: torch.device) -> DenseHead:
        """The head on a device, moved there once however often it is asked for."""
        if self.weight_VT.device == device:
            return self
        if self._elsewhere is None or self._elsewhere.weight_VT.device != device:
            bias_V = None if self.bias_V is None else self.bias_V.to(device)
            self._elsewhere = DenseHead(self.weight_VT.to(device), bias_V, self.shape)
        return self._elsewhere

    def logprobs(self, hidden_CT: Tensor, temperature: float = 1.0) -> Tensor:
        """log q over the whole vocabulary, float32, in a fresh buffer; finite also where a model gives a token no chance."""
        logits_CV = self.shape.logits(hidden_CT, self.weight_VT, self.bias_V)
        if temperature != 1.0:
            logits_CV /= temperature
        for rows in blocks(len(logits_CV)):
            logits_CV[rows] -= logits_CV[rows].logsumexp(1, keepdim=True)
        return logits_CV.clamp_min_(LOWEST)


def blocks(rows: int) -> Iterator[slice]:
    """A chunk's rows a few at a time: what is made for a block is small beside a buffer of the chunk."""
    size = max(1, -(-rows // BLOCKS))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseRows:
    """A teacher's hidden states for N tokens, from which its head makes the whole distribution again."""

    hidden_NT: Tensor
    """Of the tokens that are held, in order, and of no others."""
    head: DenseHead
    held_N: Tensor | None = None
    """Which tokens are held; the others say nothing about p, and their divergences are 0. None: all are."""

    def chunk(self, start: int, stop: int) -> DenseRows:
        """Rows start to stop. Two syncs of the device a chunk, unless all are held."""
        if self.held_N is None:
            return DenseRows(hidden_NT=self.hidden_NT[start:stop], head=self.head)
        first = int(self.held_N[:start].sum())
        last = first + int(self.held_N[start:stop].sum())
        return DenseRows(hidden_NT=self.hidden_NT[first:last], head=self.head, held_N=self.held_N[start:stop])

    def select(self, row_K: Tensor, held_K: Tensor) -> DenseRows:
        """The rows with these numbers, ascending; those that are not held say nothing."""
        if self.held_N is not None:
            held_K = held_K & self.held_N[row_K]
        chosen_N = torch.zeros(len(self.hidden_NT if self.held_N is None else self.held_N), dtype=torch.bool, device=row_K.device)
        chosen_N[row_K] = held_K
        chosen = chosen_N if self.held_N is None else chosen_N[self.held_N]
        return DenseRows(hidden_NT=self.hidden_NT[chosen], head=self.head, held_N=held_K)

    def to(self, device: torch.device) -> DenseRows:
        held_N = None if self.held_N is None else self.held_N.to(device, non_blocking=True)
        return DenseRows(hidden_NT=self.hidden_NT.to(device, non_blocking=True), head=self.head.to(device), held_N=held_N)
