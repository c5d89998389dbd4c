"""How benches compare two ways: CPU seconds of one thread, A and B by turns in one process, the median of the rounds' ratios.

A ratio of neighbours in time cancels what else the machine does; its spread says how far to trust it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

ROUNDS = 15


@dataclass(frozen=True)
class Ratio:
    """CPU seconds of both (medians), and what B costs in units of A: median, first and third quartile."""

    one: float
    two: float
    median: float
    low: float
    high: float

    def row(self, name: str) -> str:
        return f"{name:<44}{self.one * 1e3:>10.1f}{self.two * 1e3:>10.1f}{self.median:>9.3f}   {self.low:.3f} to {self.high:.3f}"


HEADER = f"{'':<44}{'A, ms':>10}{'B, ms':>10}{'B / A':>9}   middle half"


def compare(one: Callable[[], object], two: Callable[[], object], *, rounds: int = ROUNDS) -> Ratio:
    """Runs both by turns, whoever was first being second next; the first round warms up and is not counted."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        pair = {}
        for run in (one, two) if turn % 2 else (two, one):
            start = time.process_time()
            run()
            pair[run] = time.process_time() - start
        times.append((pair[one], pair[two]))
    counted = times[1:]
    ratios = [b / a for a, b in counted]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(statistics.median(a for a, _ in counted), statistics.median(b for _, b in counted), median, low, high)
