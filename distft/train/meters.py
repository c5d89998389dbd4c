"""What a step cost: its time and where that went, arithmetic, memory. These are of the machine; what was learned is in `metrics`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distft.engine.base import StepValues
from distft.train.flops import Arithmetic

MACHINE = frozenset({
    "time", "seconds", "data_seconds", "forward_seconds", "backward_seconds", "update_seconds", "other_seconds", "tokens_per_second",
    "model_flops_per_second", "mfu", "memory_bytes",
})  # fmt: skip
"""Keys of a line that another run of the same step need not repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meters:
    """Measures steps of a model on some devices, which together do `peak` operations a second at most; None where nobody knows."""

    arithmetic: Arithmetic
    peak: float | None

    def line(
        self, values: StepValues, *, lengths: npt.NDArray[np.int64], headed: float, seconds: float, waited: float
    ) -> dict[str, float]:
        """Part of the step's line. Its documents have these lengths, over all ranks; `waited` of its `seconds` went by before they
        were there.

        Times are the leading rank's. It has its documents only when all have theirs, so the slowest feed shows in `data_seconds`."""
        spent, speed = values.spent, self.arithmetic.flops(lengths, headed) / max(seconds, 1e-9)
        line = {
            "time": time.time(), "seconds": seconds, "data_seconds": waited, "forward_seconds": spent.forward,
            "backward_seconds": spent.backward, "update_seconds": spent.update,
            "other_seconds": max(0.0, seconds - waited - spent.total), "model_flops_per_second": speed, "memory_bytes": values.memory,
        }  # fmt: skip
        return line if self.peak is None else {**line, "mfu": speed / self.peak}
