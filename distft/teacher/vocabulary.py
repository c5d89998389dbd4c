"""A vocabulary that is spread over ranks: each holds the head rows, and so the logits, of consecutive ids.

What the ranks tell each other are a few numbers per token: the label's logit, largest logit, sums, and the entries that are kept.
Logits of the whole vocabulary are never together anywhere. Every rank ends with the same numbers.

Shapes as in `distft.teacher.forward`; V is this rank's part, M counts kept entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distft.engine.world import World


class Scratch:
    """Room for [C, V] numbers that is used again for each block of tokens. malloc would put small results into the holes that large
    buffers leave, and ask for ever more memory."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def like(self, example_CV: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
        """A buffer of the example's shape, which holds until the next call with this dtype."""
        size = example_CV.numel()
        if kind not in self._held or len(self._held[kind]) < size:
            self._held[kind] = torch.empty(size, dtype=kind)
        return self._held[kind][:size].view(example_CV.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyShare:
    """This rank's part: the ids from `first` on. The ranks of the group hold ascending parts of one vocabulary."""

    first: int = 0
    group: World = field(default_factory=World)

    @property
    def _alone(self) -> bool:
        return self.group.size == 1

    def label_logits(self, logits_CV: Tensor, labels_C: Tensor) -> Tensor:
        """Those of the labels that are held here, and -inf for the others."""
        if self._alone:
            return logits_CV.gather(1, labels_C[:, None])
        place_C = labels_C - self.first
        here_C = (place_C >= 0) & (place_C < logits_CV.shape[1])
        found_C1 = logits_CV.gather(1, place_C.clamp(0, logits_CV.shape[1] - 1)[:, None])
        return found_C1.masked_fill(~here_C[:, None], -torch.inf)

    def largest(self, *columns_C1: Tensor) -> tuple[Tensor, ...]:
        """The largest of each over the ranks."""
        if self._alone:
            return columns_C1
        return self.group.max_(torch.cat(columns_C1, 1)).split(1, 1)

    def sums(self, *columns_C1: Tensor) -> tuple[Tensor, ...]:
        """The sum of each over the ranks. Counts are exact: float32 has all integers up to 2^24."""
        if self._alone:
            return columns_C1
        return self.group.sum_(torch.cat([column.float() for column in columns_C1], 1)).split(1, 1)

    def best(self, row_M: Tensor, place_M: Tensor, value_M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, ids and values of the k largest entries of each row over all ranks, in row order with ids ascending, from those that
        each rank found among its own."""
        if self._alone:
            return row_M, place_M, value_M
        row_M, id_M, value_M = (
            torch.cat(self.group.gather(column)) for column in (row_M, place_M + self.first, value_M)
        )  # fmt: skip
        order = _order(row_M, -value_M, id_M)
        row_M, id_M, value_M = row_M[order], id_M[order], value_M[order]
        start_M = torch.searchsorted(row_M, row_M)  # where the entry's row begins
        chosen = torch.arange(len(row_M), device=row_M.device) - start_M < k
        row_M, id_M, value_M = row_M[chosen], id_M[chosen], value_M[chosen]
        order = _order(row_M, id_M)
        return row_M[order], id_M[order], value_M[order]

    def own(self, row_M: Tensor, id_M: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Rows and places of the entries that are among this rank's `rows` ids."""
        if self._alone:
            return row_M, id_M
        here = (id_M >= self.first) & (id_M < self.first + rows)
        return row_M[here], id_M[here] - self.first

    def find(self, mass_CV: Tensor, points_CD: Tensor, scratch: Scratch | None = None) -> Tensor:
        """The ids at which the cumulative distribution first exceeds each of `points_CD` of its whole. Never one of mass 0."""
        summed_CV = scratch.like(mass_CV, torch.float64).copy_(mass_CV) if scratch else mass_CV.double()
        summed_CV.cumsum_(1)
        own_C1 = summed_CV[:, -1:]
        last = summed_CV.shape[1] - 1
        if self._alone:
            return torch.searchsorted(summed_CV, points_CD * own_C1, right=True).clamp_max(last)
        totals_CR = torch.cat(self.group.gather(own_C1), 1)
        ends_CR = totals_CR.cumsum(1)
        before_C1 = ends_CR[:, self.group.rank, None] - own_C1
        wanted_CD = points_CD * ends_CR[:, -1:]
        # A point belongs to the first rank whose end lies beyond it; rounding may leave one behind all, which is the last one's.
        holder_CD = torch.searchsorted(ends_CR, wanted_CD, right=True).clamp_max(self.group.size - 1)
        place_CD = torch.searchsorted(summed_CV, wanted_CD - before_C1, right=True).clamp_max(last)
        found_CD = torch.where(holder_CD == self.group.rank, place_CD + self.first, -1)
        return self.group.max_(found_CD)


WHOLE = VocabularyShare()
"""All of the vocabulary, on one rank."""


def _order(*keys_M: Tensor) -> Tensor:
    """The permutation that sorts by the first key, equal ones by the second, and so on."""
    order = torch.arange(len(keys_M[0]), device=keys_M[0].device)
    for key_M in reversed(keys_M):
        order = order[key_M[order].argsort(stable=True)]
    return order
