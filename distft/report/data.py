"""What is known of a run, read from its store: nothing here computes, and nothing is believed that can be verified.

A run is its `config.yaml`. Whatever else is missing is named in `missing`; whatever contradicts its manifest is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.store.digest import memo_path
from distft.store.location import Location
from distft.store.manifest import Manifest, fetch, read_manifest
from distft.train.record import newest_checkpoint, read_metrics

_EVALUATION = re.compile(r"(?:^|/)eval/([0-9a-f]{16})/[^/]")
_ROW = {"generate": {"prompt", "reference", "answer", "right"}, "nll": {"nll", "tokens"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What one model did on one task. `rows` are the items as evaluated, verified; None where their artifact is gone."""

    kind: Literal["generate", "nll"]
    value: float
    """Accuracy as a fraction, or nats per token."""
    count: int
    """Items, or documents."""
    artifact: str
    """The evaluation's id in the store; equal ids are the same model on the same items."""
    questions: str | None
    """Names the items and the way of asking: two scores can be compared when it is equal. None where the artifact is gone."""
    weights: frozenset[str]
    """sha256 of the weight files that were evaluated; empty where the artifact is gone."""
    rows: tuple[dict[str, Any], ...] | None

    @property
    def right(self) -> int:
        return round(self.value * self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    name: str
    kind: Literal["generate", "nll"]
    held: bool
    """Measured on the held-out documents: something to keep, not to gain."""
    before: Scored
    after: Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Nats per token on the held-out documents. Only `kl` is known where the run's log is all there is."""

    kl: float
    nll: float | None = None
    teacher_nll: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    name: str
    config: dict[str, Any]
    config_text: str
    """config.yaml as it stands in the store."""
    metrics: tuple[dict[str, Any], ...]
    tasks: tuple[TaskResult, ...]
    drift: Drift | None
    checkpoint: Manifest | None
    model: Manifest | None
    missing: tuple[str, ...]
    """What a reader should know before the numbers, a sentence each."""

    def get(self, dotted: str, default: Any = None) -> Any:
        """A value of the resolved config. Read without the schema: a page must be makeable from an older run file, too."""
        value: Any = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def own_teacher(self) -> bool:
        """Whether drift is measured from the untouched model itself."""
        return self.get("teacher.path") is None

    @property
    def counts_sequences(self) -> bool:
        """Whether the loss is a mean over sequences and no mean over tokens, so that shares in the log are tokens per sequence."""
        return (self.get("objective.kind"), self.get("objective.variant")) == ("eksft", "published_code")


def read_runs(store: Location, names: list[str]) -> list[RunData]:
    """The named runs, in that order, each once."""
    if not names:
        raise MissingArtifactError("No run was named.", where=store.url, help="Name at least one run of this store.")
    there = store.child("runs").folders()
    for name in names:
        if name not in there or not store.child("runs", name).exists("config.yaml"):
            listed = ", ".join(there[:20]) or "none"
            raise MissingArtifactError(f"There is no run {name!r} in this store. Runs here: {listed}.", where=store.url,
                                       help="Run `distft train` with that run's config first.")  # fmt: skip
    return [_run(store, name) for name in dict.fromkeys(names)]


def _run(store: Location, name: str) -> RunData:
    folder = store.child("runs", name)
    text = folder.read("config.yaml").decode(errors="replace")
    config = _parsed(folder, "config.yaml", lambda: yaml.safe_load(text))
    summary: dict[str, Any] = {}
    if folder.child("eval").exists("summary.json"):
        evaluated = folder.child("eval")
        summary = _parsed(evaluated, "summary.json", lambda: json.loads(evaluated.read("summary.json")))
    metrics, newest = read_metrics(folder), newest_checkpoint(folder.child("checkpoints"))
    checkpoint = newest[1] if newest else None
    model = read_manifest(folder.child("model"))
    try:
        heldout = (config.get("data") or {}).get("heldout")
        kinds = {task["name"]: task for task in (config.get("evaluate") or {}).get("tasks") or ()}
        tasks = tuple(
            _task(store, folder, task, both, held=heldout is not None and kinds.get(task, {}).get("source") == heldout)
            for task, both in (summary.get("scores") or {}).items()
        )
        drift = _drift(summary, checkpoint, metrics)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(folder.child("eval"), "summary.json", error) from error
    missing = _missing(name, summary=summary, tasks=tasks, metrics=metrics, drift=drift, checkpoint=checkpoint, model=model)
    return RunData(
        name=name, config=config, config_text=text, metrics=tuple(metrics), tasks=tasks, drift=drift, checkpoint=checkpoint,
        model=model, missing=tuple(missing),
    )  # fmt: skip


def _task(store: Location, folder: Location, name: str, both: dict[str, Any], *, held: bool) -> TaskResult:
    before, after = (_scored(store, folder, name, both[label]) for label in ("before", "after"))
    asked = {scored.questions for scored in (before, after)} - {None}
    if before.kind != after.kind or len(asked) > 1:
        raise CorruptArtifactError(f"Task {name}: before and after were not asked the same.", where=f"{folder.url}/eval/summary.json",
                                   help="Run `distft evaluate` with this run's config again.")  # fmt: skip
    return TaskResult(name=name, kind=before.kind, held=held, before=before, after=after)


def _scored(store: Location, folder: Location, task: str, claimed: dict[str, Any]) -> Scored:
    """One score of the summary, checked against the evaluation that it came from. The summary's path serves to find that
    artifact in this store, wherever the store lies now; its bytes are those that its own manifest promises."""
    kind = claimed["kind"]
    if kind not in ("generate", "nll"):
        raise ValueError(f"task {task} has the kind {kind!r}")
    value, count = float(claimed["accuracy" if kind == "generate" else "nll"]), int(claimed["count"])
    if count < 1 or not math.isfinite(value):
        raise ValueError(f"task {task} has the score {value} over {count} items")
    found = _EVALUATION.search(str(claimed.get("items", "")))
    manifest = read_manifest(store.child("eval", found[1])) if found else None
    if found is None or manifest is None:
        return Scored(kind=kind, value=value, count=count, artifact=found[1] if found else "", questions=None,
                      weights=frozenset(), rows=None)  # fmt: skip
    where = store.child("eval", found[1])
    facts = {key: claimed.get(key) for key in manifest.facts}
    if manifest.kind != "evaluation" or manifest.id != found[1] or facts != manifest.facts:
        raise CorruptArtifactError(
            f"Task {task}: the summary says {facts}, the evaluation {manifest.facts}.", where=f"{folder.url}/eval/summary.json",
            help="Run `distft evaluate` with this run's config again: it writes the summary anew.",
        )  # fmt: skip
    entry = manifest.files[0]
    lines = fetch(where, entry, memo_path().parent / "staging").read_text(encoding="utf-8").split("\n")
    rows = tuple(json.loads(line) for line in lines if line)
    if len(rows) != count or not all(_ROW[kind] <= row.keys() for row in rows):
        raise CorruptArtifactError(f"{entry.name} has {len(rows)} rows; {count} with {sorted(_ROW[kind])} were expected.",
                                   where=where.url, help="Remove that folder and run `distft evaluate` again.")  # fmt: skip
    identity = manifest.identity
    return Scored(
        kind=kind, value=value, count=count, artifact=found[1], rows=rows,
        questions=json.dumps([identity.get("settings"), identity.get("items")], sort_keys=True),
        weights=frozenset(identity["model"]["weights"]["files"].values()),
    )  # fmt: skip


def _drift(summary: dict[str, Any], checkpoint: Manifest | None, metrics: list[dict[str, Any]]) -> Drift | None:
    """The exported model's, else the newest checkpoint's, else the log's last."""
    figures = summary.get("drift") or (checkpoint.facts.get("drift") if checkpoint else None)
    if figures:
        return Drift(kl=float(figures["kl"]), nll=float(figures["nll"]), teacher_nll=float(figures["teacher_nll"]),
                     tokens=int(figures["tokens"]))  # fmt: skip
    logged = [line["drift"] for line in metrics if line.get("drift") is not None]
    return Drift(kl=float(logged[-1])) if logged else None


def _missing(
    name: str, *, summary: dict[str, Any], tasks: tuple[TaskResult, ...], metrics: list[dict[str, Any]], drift: Drift | None,
    checkpoint: Manifest | None, model: Manifest | None,
) -> list[str]:  # fmt: skip
    notes = []
    if not metrics:
        notes.append(f"{name} has no training log yet: there are no curves and no costs.")
    if checkpoint is None:
        notes.append(f"{name} has no committed checkpoint.")
    else:
        step, total = checkpoint.identity.get("step"), checkpoint.facts.get("total_steps")
        if total is not None and step != total:
            notes.append(f"{name} is not finished: its newest checkpoint is step {step} of {total}.")
    if not summary:
        verb = "distft evaluate" if model else "distft export, then distft evaluate"
        notes.append(f"{name} was not evaluated, so what it learned is not known. Run {verb} with its config.")
    elif not tasks:
        notes.append(f"{name} was evaluated on no task (evaluate.tasks is empty).")
    if drift is None:
        notes.append(f"{name} has no measured drift: its run file has no data.heldout, or training has not come that far.")
    if model and checkpoint and (model.identity.get("checkpoint") or {}).get("step") != checkpoint.identity.get("step"):
        was = (model.identity.get("checkpoint") or {}).get("step")
        notes.append(
            f"{name}: the exported model is of step {was}, the newest checkpoint of step {checkpoint.identity.get('step')}."
        )
    exported = {entry.sha256 for entry in model.files} if model else set()
    for task in tasks:
        if task.before.rows is None or task.after.rows is None:
            notes.append(
                f"{name}, task {task.name}: the items are no longer in the store, so intervals and answers are left out."
            )
        elif exported and not task.after.weights <= exported:
            notes.append(
                f"{name}, task {task.name}: the scores are of other weights than the exported ones. Run distft evaluate again."
            )
    return notes


def _parsed(folder: Location, name: str, parse: Callable[[], Any]) -> dict[str, Any]:
    try:
        document = parse()
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise _unreadable(folder, name, error) from error
    if not isinstance(document, dict):
        raise _unreadable(folder, name, TypeError(f"it holds a {type(document).__name__}, not a mapping"))
    return document


def _unreadable(folder: Location, name: str, error: Exception) -> CorruptArtifactError:
    return CorruptArtifactError(f"{name} cannot be read: {type(error).__name__}: {error}"[:300], where=f"{folder.url}/{name}",
                                help="Remove that file and run its stage again.")  # fmt: skip
