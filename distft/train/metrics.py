"""`metrics.jsonl`: a line per step, for people and plots.

`loss` is what was minimised. `ce`, `kl`, `rkl` and `entropy` are unweighted means in nats over the tokens that bear that weight,
`normaliser` is what the loss was divided by: as many tokens or, for a rule that counts those, sequences. `share_*` is how many tokens
bear the weight for each that it counts: above 1 where a held prompt is longer than its answer, and tokens per sequence where it counts
sequences. `mass_*` is what the part adds to the loss, in nats, and all add up to it; an entropy's is below 0 where entropy is
rewarded, and above where a negative weight punishes it. `collision`, which has no unit, is there only in steps where a token bears its
weight.

Where the objective reads the teacher, `tokens_QUADRANT` says which share of a step's supervised tokens is of each of the four kinds of
`distft.objectives.quadrants`, with and without a weight, and `mass_QUADRANT` what they add to the loss; a held prompt is of none.

What a step cost stands beside that (`distft.train.meters`): `tokens_per_second`; `seconds`, which are `data_seconds` (until all ranks
had their documents), `forward_seconds` (the output head's gradients included), `backward_seconds`, `update_seconds` and
`other_seconds`; `model_flops_per_second` and, of devices whose peak is known, `mfu` (`distft.train.flops` has the formula);
`memory_bytes`, the most that the fullest rank's accelerator held in this step, or that rank's process ever; and `time`, in seconds
since 1970, when the step was over. `drift` and `heldout_nll` are there in steps after which they were measured, and cost no step's
time.

A resumed run drops the lines after its checkpoint and goes on. Whoever follows the log (TensorBoard's events, services) is given its
lines, and nothing else: the log is the truth.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

from distft.engine.base import StepValues
from distft.objectives.quadrants import QUADRANTS
from distft.store.local import explained
from distft.store.location import Location
from distft.train.record import METRICS, read_metrics

REMOTE_EVERY_SECONDS = 30.0
"""An object store has no append: the file is put whole, so often and at checkpoints."""

Ending = Literal["finished", "stopped", "failed"]
"""Stopped is what someone asked for: such a run is to go on some day."""


class Follower(Protocol):
    """Shows the log elsewhere."""

    def start(self, lines: Sequence[dict[str, Any]]) -> None:
        """With the lines that a resumed run goes on from."""
        ...

    def add(self, line: dict[str, Any]) -> None: ...

    def flush(self) -> None:
        """Before a checkpoint."""
        ...

    def close(self, ending: Ending) -> None: ...


class MetricsLog:
    """Write inside a `with` block: followers are let go at its end."""

    def __init__(
        self, folder: Location, *, after_step: int, last_step: int | None = None, followers: Sequence[Follower] = ()
    ) -> None:
        self.folder, self.last_step, self.followers = folder, last_step, followers
        self.lines = [line for line in read_metrics(folder) if line["step"] <= after_step]
        self._put_at = 0.0
        self.flush()

    def __enter__(self) -> MetricsLog:
        for follower in self.followers:
            follower.start(self.lines)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ending = self._ending(kind)
        for follower in self.followers:
            follower.close(ending)

    def _ending(self, kind: type[BaseException] | None) -> Ending:
        if kind is None:
            return "finished"
        if not issubclass(kind, KeyboardInterrupt):
            return "failed"
        # Asked to stop in its last step, it has nothing left to go on with: nobody would ever close it.
        complete = self.last_step is not None and bool(self.lines) and self.lines[-1]["step"] >= self.last_step
        return "finished" if complete else "stopped"

    def add(self, line: dict[str, Any]) -> None:
        self._write(line)
        for follower in self.followers:
            follower.add(line)

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        path = self.folder.local(METRICS)
        if path is not None:
            with explained("write", path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        elif time.monotonic() - self._put_at > REMOTE_EVERY_SECONDS:
            self._put()

    def flush(self) -> None:
        self._put()
        for follower in self.followers:
            follower.flush()

    def _put(self) -> None:
        self._put_at = time.monotonic()
        self.folder.replace(METRICS, "".join(json.dumps(line) + "\n" for line in self.lines).encode())


def step_line(
    step: int, values: StepValues, *, normaliser: float, tokens: int, kinds: Sequence[float], lr: float, seconds: float
) -> dict[str, Any]:
    """`kinds`: how many of the step's tokens are of each of QUADRANTS; all 0 where no teacher was asked."""
    line: dict[str, Any] = {"step": step, "loss": values.loss}
    counts = {part: count for part, count in values.counts.items() if part != "collision" or count}
    for part, count in counts.items():
        line[part] = values.sums[part] / count if count else 0.0
    for part, count in counts.items():
        line[f"share_{part}"] = count / normaliser
    line |= {f"mass_{part}": values.masses[part] for part in counts}
    if known := sum(kinds):
        line |= {f"tokens_{name}": count / known for name, count in zip(QUADRANTS, kinds, strict=True)}
        line |= {f"mass_{name}": mass for name, mass in zip(QUADRANTS, values.quadrants, strict=True)}
    line |= {"normaliser": normaliser, "tokens": tokens}
    return {**line, "lr": lr, "grad_norm": values.grad_norm, "tokens_per_second": tokens / max(seconds, 1e-9)}
