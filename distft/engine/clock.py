"""Where the time of a step goes on this rank, without making a device wait for it.

On CUDA the passes are queued, and the processor is long ahead of them: marks are events in the queue, read once when the step is over.
Elsewhere work is done when its call returns, and a mark is the time of day.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

Part = Literal["forward", "backward", "update"]
PARTS: tuple[Part, ...] = ("forward", "backward", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds of one step on this rank; they add up to the step from its first mark to its last.

    The output head's gradients are made in the forward pass, together with the loss, so `forward` holds most of what the head costs.
    `update` is summing gradients over ranks, their norm, clipping and the optimizer; ZeRO-3 sums over ranks as it goes back, within
    `backward`, as it gathers weights within both passes."""

    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.update


class StepClock:
    """Call `start`, then `lap(part)` wherever a part ends, then `read`. A part may have any number of laps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[Part | None, Any]] = []

    def start(self) -> None:
        """Forgets a step that was never read: one that failed."""
        self._marks = [(None, self._mark())]

    def lap(self, part: Part) -> None:
        """What came since the last mark was of this part."""
        self._marks.append((part, self._mark()))

    def read(self) -> Spent:
        """Waits for the device, which has then done all that it was given."""
        last = self._marks[-1][1]
        if self.device.type == "cuda":
            last.synchronize()
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, mark) in zip(self._marks, self._marks[1:], strict=False):
            assert part is not None, "only the first mark ends nothing"
            spent[part] += before.elapsed_time(mark) / 1000 if self.device.type == "cuda" else mark - before
        return Spent(**spent)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
