"""Which documents each step consumes: a function of (seed, epoch) and the corpus alone (law 8). Torch-free, for plans."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from distft.config.schema import Train


def epoch_order(documents: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of one epoch. Philox keyed by (seed, epoch): any epoch is reached without drawing those before it."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(documents)


def cut_steps(lengths: npt.NDArray[np.int64], tokens_per_step: int) -> npt.NDArray[np.int64]:
    """Where steps end in a sequence of documents: each takes documents while their tokens fit, and at least one."""
    ends, total, start = [], np.cumsum(lengths), 0
    while start < len(lengths):
        before = total[start - 1] if start else 0
        start = max(start + 1, int(np.searchsorted(total, before + tokens_per_step, side="right")))
        ends.append(start)
    return np.array(ends, np.int64)


class StepPlan:
    """The documents of every step of a run, by number. Of each epoch it keeps where steps end, and of two the order: all that a corpus
    of many millions of documents costs, however many epochs there are."""

    def __init__(self, lengths: npt.NDArray[np.int64], train: Train) -> None:
        self._documents, self._seed = len(lengths), train.seed
        self._order = lru_cache(maxsize=2)(self._draw)  # the epoch that is trained, and the next one, which is being read
        self._ends: list[npt.NDArray[np.int64]] = []
        self.total_steps = 0
        for epoch in range(train.epochs):
            ends = cut_steps(lengths[self._order(epoch)], train.tokens_per_step)
            self._ends.append(ends)
            self.total_steps += len(ends)
            if train.max_steps is not None and self.total_steps >= train.max_steps:
                self.total_steps = train.max_steps
                break

    def documents(self, step: int) -> npt.NDArray[np.int64]:
        """Rows of the corpus's training split for step 1 to total_steps."""
        index = step - 1
        for epoch, ends in enumerate(self._ends):
            if index < len(ends):
                return self._order(epoch)[ends[index - 1] if index else 0 : ends[index]]
            index -= len(ends)
        raise IndexError(step)

    def epoch(self, step: int) -> float:
        """How many epochs are over after this step."""
        index = step
        for number, ends in enumerate(self._ends):
            if index <= len(ends):
                return number + index / len(ends)
            index -= len(ends)
        return float(len(self._ends))

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        return epoch_order(self._documents, seed=self._seed, epoch=epoch)
