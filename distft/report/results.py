"""From what was read to what it means: scores with their intervals, gains, and which runs can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distft.report import intervals
from distft.report.data import RunData, Scored, TaskResult
from distft.report.intervals import Interval


@dataclass(frozen=True)
class Outcome:
    """One run on one task. Gains are such that up is better: accuracy gained, or nats per token of NLL saved."""

    run: RunData
    task: TaskResult

    @property
    def gain(self) -> float:
        change = self.task.after.value - self.task.before.value
        return change if self.task.kind == "generate" else -change

    @cached_property
    def item_gains(self) -> list[float] | None:
        """What each item adds to the gain, in item order; None where the items are gone."""
        before, after = self.task.before.rows, self.task.after.rows
        if before is None or after is None:
            return None
        if self.task.kind == "generate":
            return [float(a["right"]) - float(b["right"]) for b, a in zip(before, after, strict=True)]
        return [b["nll"] - a["nll"] for b, a in zip(before, after, strict=True)]

    @cached_property
    def gain_interval(self) -> Interval | None:
        before, after = self.task.before.rows, self.task.after.rows
        if before is None or after is None:
            return None
        if self.task.kind == "generate":
            return intervals.accuracy_gain([bool(row["right"]) for row in before], [bool(row["right"]) for row in after])
        return intervals.per_token(self.item_gains or [], [row["tokens"] for row in after])

    @property
    def clear(self) -> bool:
        """Whether the change, up or down, is more than another draw of items would explain."""
        return self.gain_interval is not None and not self.gain_interval.holds(0.0)


def score_interval(scored: Scored) -> Interval | None:
    if scored.rows is None:
        return None
    if scored.kind == "generate":
        return intervals.wilson(sum(bool(row["right"]) for row in scored.rows), scored.count)
    return intervals.per_token([row["nll"] for row in scored.rows], [row["tokens"] for row in scored.rows])


def task_names(runs: Sequence[RunData]) -> list[str]:
    """Every task that any run was evaluated on: what is to be gained first, in the run files' order."""
    found = {task.name: task.held for run in runs for task in run.tasks}
    return sorted(found, key=found.__getitem__)


def outcomes(runs: Sequence[RunData], task: str) -> list[Outcome]:
    return [Outcome(run, result) for run in runs for result in run.tasks if result.name == task]


def target(runs: Sequence[RunData]) -> str | None:
    """The task that the verdict speaks of: the first with answers to judge, else the first that is not held-out text."""
    kinds = {task.name: task for run in reversed(runs) for task in reversed(run.tasks)}
    ordered = [kinds[name] for name in task_names(runs) if not kinds[name].held]
    judged = [task.name for task in ordered if task.kind == "generate"]
    return (judged or [task.name for task in ordered] or [None])[0]


def same_start(found: Sequence[Outcome]) -> bool:
    """Whether the same untouched model was asked the same: only then can gains be set against each other."""
    return len({(o.task.before.artifact, o.task.before.value) for o in found}) <= 1


def same_meter(runs: Sequence[RunData]) -> bool:
    """Whether drift was measured from the same teacher, on the same held-out tokens, with the same truncation."""

    def meter(run: RunData) -> Any:
        assert run.drift is not None
        where = None if run.drift.teacher_nll is None else (round(run.drift.teacher_nll, 6), run.drift.tokens)
        return where, repr(run.get("score.distribution")), repr(run.get("teacher")), repr(run.get("model.path"))

    return len({meter(run) for run in runs if run.drift is not None}) <= 1


def reference(found: Sequence[Outcome]) -> Outcome:
    """What the others are measured against: plain fine-tuning where there is one run of it, else the run that drifted most."""
    plain = [o for o in found if o.run.get("objective.kind") == "sft"]
    if len(plain) == 1:
        return plain[0]
    return max(found, key=lambda o: o.run.drift.kl if o.run.drift else float("-inf"))
