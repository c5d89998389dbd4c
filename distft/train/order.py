"""Which documents each step consumes: a function of (seed, epoch) and the corpus alone (law 8). Torch-free, for plans."""

from __future__ import annotations

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
    """The documents of every step of a run, by number. Holds one permutation per epoch and nothing of the documents."""

    def __init__(self, lengths: npt.NDArray[np.int64], train: Train) -> None:
        self._orders, self._ends = [], []
        self.total_steps = 0
        for epoch in range(train.epochs):
            order = epoch_order(len(lengths), seed=train.seed, epoch=epoch)
            ends = cut_steps(lengths[order], train.tokens_per_step)
            self._orders.append(order)
            self._ends.append(ends)
            self.total_steps += len(ends)
            if train.max_steps is not None and self.total_steps >= train.max_steps:
                self.total_steps = train.max_steps
                break

    def documents(self, step: int) -> npt.NDArray[np.int64]:
        """Rows of the corpus's training split for step 1 to total_steps."""
        index = step - 1
        for order, ends in zip(self._orders, self._ends, strict=True):
            if index < len(ends):
                return order[ends[index - 1] if index else 0 : ends[index]]
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
