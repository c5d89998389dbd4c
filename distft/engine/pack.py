"""Documents into rows: which lie together, and what the row then looks like.

A pure function of the lengths, so that the same documents are packed alike everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distft.engine.base import PackedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each document of a batch lies in the flattened rows."""

    rows: int
    width: int
    starts: tuple[int, ...]
    """Place of document i's first token, for the documents in the order they were given."""
    ranks: int = 1
    """How many share each row: the first has its first `width / ranks` columns, and so on."""

    def owners(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which rank has each of these places of the flattened rows."""
        return places % self.width // (self.width // self.ranks)

    def own(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where its rank has it, among its own columns of the flattened rows."""
        columns = self.width // self.ranks
        return places // self.width * columns + places % columns


def batches_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Splits documents into batches of at most `budget` places, padding included; like lengths lie together, longest first (what
    does not fit in memory fails at once). A document longer than the budget has a batch of its own."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = bool(batches) and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def lay_out(lengths: Sequence[int], *, ranks: int = 1) -> Layout:
    """Best-fit decreasing into rows as wide as the longest document: no more attention than padding would cost, and hardly any
    padding. Rows that `ranks` share are up to ranks - 1 columns wider, so that each has as many."""
    width = -(-max(lengths) // ranks) * ranks
    starts, free = [0] * len(lengths), []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = [row for row, space in enumerate(free) if space >= length]
        if fitting:
            row = min(fitting, key=lambda r: (free[r], r))
        else:
            free.append(width)
            row = len(free) - 1
        starts[index] = row * width + width - free[row]
        free[row] -= length
    return Layout(rows=len(free), width=width, starts=tuple(starts), ranks=ranks)


def pack(documents: Sequence[npt.NDArray[np.uint32]], layout: Layout) -> PackedTokens:
    """The rows themselves. Padding repeats token 0 and continues the last document's positions; nothing before it sees it."""
    size = layout.rows * layout.width
    tokens, positions = np.zeros(size, np.int64), np.full(size, -1, np.int64)
    for document, start in zip(documents, layout.starts, strict=True):
        tokens[start : start + len(document)] = document
        positions[start : start + len(document)] = np.arange(len(document))
    rows = positions.reshape(layout.rows, layout.width)
    for row in rows:
        padding = int((row < 0).sum())
        if padding:
            row[-padding:] = row[-padding - 1] + 1 + np.arange(padding)
    return PackedTokens(
        tokens_RL=torch.from_numpy(tokens.reshape(layout.rows, layout.width)), positions_RL=torch.from_numpy(rows)
    )
