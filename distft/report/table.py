"""The comparison for a terminal: what a person understands at once, and the rows that a program reads."""

from __future__ import annotations

from typing import Any

from distft.report import words
from distft.report.data import RunData, read_runs
from distft.report.results import Outcome, outcomes, score_interval, task_names
from distft.store.location import Location

LONGEST_NAME = 40
_PLAIN = str.maketrans({words.MINUS: "-", words.NARROW: " "})


def comparison_rows(store: Location, runs: list[str]) -> list[dict[str, Any]]:
    """One object per run, of JSON values: `target_nll` and `accuracy` are those of the first task of each kind, `tasks` has all."""
    return [_row(run) for run in read_runs(store, runs)]


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """A few aligned lines: before -> after per run and task, drift, and which way is better."""
    tasks: dict[str, dict[str, Any]] = {}
    for row in rows:
        tasks |= {name: task for name, task in row["tasks"].items() if name not in tasks}
    names = sorted(tasks, key=lambda name: tasks[name]["held"])
    columns = [["run", "", *(_short(row["run"]) for row in rows), ""]]
    for name in names:
        judged = tasks[name]["kind"] == "generate"
        cells = [_before_after(row["tasks"].get(name)) for row in rows]
        heading = [name, "right answers"] if judged else [f"NLL of {name}", "nats per token"]
        columns.append([*heading, *cells, "higher is better" if judged else "lower is better"])
    drifts = ["not measured" if row["drift"] is None else words.drift(row["drift"]) for row in rows]
    columns.append(["drift, held-out text", "nats per token", *drifts, "lower is better; 0: unchanged"])
    wide = [max(map(len, column)) for column in columns]
    lines = [
        "   ".join(cell.ljust(width) for cell, width in zip(line, wide, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return "\n".join(lines).translate(_PLAIN)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _before_after(task: dict[str, Any] | None) -> str:
    if task is None:
        return "not evaluated"
    if task["kind"] == "generate":
        return f"{words.percent(task['before'])} -> {words.percent(task['after'])} of {task['count']}"
    return f"{words.nats(task['before'])} -> {words.nats(task['after'])}"


def _row(run: RunData) -> dict[str, Any]:
    tasks = {name: _task(outcomes([run], name)[0]) for name in task_names([run])}
    return {
        "run": run.name,
        "objective": run.get("objective.kind"),
        "steps": run.metrics[-1]["step"] if run.metrics else 0,
        "target_nll": _first(tasks, "nll"),
        "accuracy": _first(tasks, "generate"),
        "drift": run.drift.kl if run.drift else None,
        "tasks": tasks,
        "missing": list(run.missing),
    }


def _task(outcome: Outcome) -> dict[str, Any]:
    task, span, gained = outcome.task, score_interval(outcome.task.after), outcome.gain_interval
    return {
        "kind": task.kind, "held": task.held, "count": task.after.count, "before": task.before.value, "after": task.after.value,
        "after_interval": [span.low, span.high] if span else None,
        "gain": outcome.gain, "gain_interval": [gained.low, gained.high] if gained else None,
    }  # fmt: skip


def _first(tasks: dict[str, dict[str, Any]], kind: str) -> dict[str, Any] | None:
    for name, task in tasks.items():
        if task["kind"] == kind and not task["held"]:
            return {"task": name, **{key: task[key] for key in ("before", "after", "count")}}
    return None
