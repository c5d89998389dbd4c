"""Everything that the page shows, as text and pictures in the page's order; the templates only lay it out."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from statistics import median
from typing import Any

from distft import __version__
from distft.report import figures, words
from distft.report.answers import answer_groups
from distft.report.data import RunData, Scored
from distft.report.pictures import OPTIMIZER_CURVES, PART_CURVES, UNTOUCHED, drift_curves, place_of, step_curves, tradeoff
from distft.report.results import outcomes, same_meter, same_start, score_interval, task_names
from distft.report.verdict import origin, verdict
from distft.store.manifest import differences, fingerprint

PARTS = {
    "ce": "cross-entropy", "kl": "KL(teacher‖student)", "rkl": "KL(student‖teacher)", "entropy": "entropy of the student",
    "collision": "Σp² of the student",
}  # fmt: skip


def view(runs: Sequence[RunData], title: str | None) -> dict[str, Any]:
    found = verdict(runs)
    tasks = task_names(runs)
    names = [run.name for run in runs]
    return {
        "title": title or (f"What {names[0]} learned, and what it kept" if len(runs) == 1 else f"Comparison of {words.listed(names)}"),
        "version": __version__,
        "several": len(runs) > 1,
        "verdict": found,
        "notes": [note for run in runs for note in run.missing] + _incomparable(runs, tasks),
        "legend": [{"swatch": figures.swatch(i), "name": run.name, "what": _objective(run)} for i, run in enumerate(runs)],
        "differing": _differing(runs),
        "origin": origin(runs),
        "tradeoffs": [picture for name in tasks if (picture := tradeoff(runs, name)) is not None],
        "results": [_result(runs, name) for name in tasks],
        "drifts": [_drift(i, run) for i, run in enumerate(runs)] if any(run.drift for run in runs) else [],
        "curves": [*step_curves(runs, PART_CURVES), *drift_curves(runs)],
        "shares": [row for i, run in enumerate(runs) for row in _shares(i, run)],
        "per_sequence": any(run.counts_sequences for run in runs),
        "answers": answer_groups(runs),
        "costs": [_cost(i, run) for i, run in enumerate(runs) if run.metrics],
        "optimizer": step_curves(runs, OPTIMIZER_CURVES),
        "configs": [{"name": run.name, "text": run.config_text.rstrip()} for run in runs],
        "fingerprints": [{"name": run.name, "rows": _fingerprints(run)} for run in runs],
        "commands": _commands(runs),
    }  # fmt: skip


def _objective(run: RunData) -> str:
    """`sft_kl, kl 1.0`: the objective's name, unless that is the run's name too, and its settings."""
    objective = run.get("objective", {})
    settings = [f"{key} {value}" for key, value in objective.items() if key != "kind"]
    kind = str(objective.get("kind", "unknown objective"))
    return ", ".join([*([] if kind == run.name else [kind]), *settings])


def _differing(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Which keys of the run files are not the same in all runs, with each run's value."""
    first = {key: value for key, value in runs[0].config.items() if key != "name"}
    keys = {d.field for run in runs[1:] for d in differences(first, {k: v for k, v in run.config.items() if k != "name"})}
    return [{"key": key, "values": [_value(run.get(key, "null")) for run in runs]} for key in sorted(keys)]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else words.said(value)


def _incomparable(runs: Sequence[RunData], tasks: list[str]) -> list[str]:
    notes = [
        f"Task {name}: the runs did not start from the same scores on the same items. Compare each with its own start only."
        for name in tasks if not same_start(outcomes(runs, name))
    ]  # fmt: skip
    if not same_meter(runs):
        notes.append(
            "Drift was not measured alike in these runs (another teacher, held-out text or truncation): do not compare it."
        )
    return notes


def _result(runs: Sequence[RunData], name: str) -> dict[str, Any]:
    found = outcomes(runs, name)
    judged, task = found[0].task.kind == "generate", found[0].task
    rows, seen = [], set()
    for outcome in found:
        start = outcome.task.before
        if (start.artifact, start.value) not in seen:
            seen.add((start.artifact, start.value))
            label = UNTOUCHED if same_start(found) else f"{UNTOUCHED}, before {outcome.run.name}"
            rows.append({"swatch": figures.dot(-1), "name": label, **_score(start), "gain": "", "gain_interval": ""})
        form = words.points if judged else lambda value: words.signed(value, 3)
        rows.append({
            "swatch": figures.dot(place_of(runs, outcome.run)), "name": outcome.run.name, **_score(outcome.task.after),
            "gain": form(outcome.gain), "gain_interval": words.interval(outcome.gain_interval, form),
        })  # fmt: skip
    unit = "right answers; higher is better" if judged else "NLL in nats per token; lower is better"
    return {"name": name, "unit": unit + (" (held-out text)" if task.held else ""), "judged": judged, "rows": rows,
            "gain_heading": "Gain" if judged else "Saved"}  # fmt: skip


def _score(scored: Scored) -> dict[str, str]:
    judged = scored.kind == "generate"
    form = words.percent if judged else words.nats
    count = f"{words.whole(scored.right)} of {words.whole(scored.count)}" if judged else words.whole(scored.count)
    return {"score": form(scored.value), "interval": words.interval(score_interval(scored), form), "count": count}


def _drift(place: int, run: RunData) -> dict[str, str]:
    found = run.drift
    row = {"swatch": figures.dot(place), "name": run.name}
    if found is None:
        return {**row, "drift": "not measured", "kept": "", "before": "", "after": "", "tokens": ""}
    full = found.nll is not None and found.teacher_nll is not None
    return {
        **row, "drift": words.drift(found.kl), "kept": words.percent(math.exp(-found.kl)),
        "before": words.nats(found.teacher_nll) if full and found.teacher_nll is not None else "",
        "after": words.nats(found.nll) if full and found.nll is not None else "",
        "tokens": words.whole(found.tokens) if found.tokens else "",
    }  # fmt: skip


def _shares(place: int, run: RunData) -> list[dict[str, Any]]:
    """What part of the normaliser's tokens each treatment took, over the whole run, and its extremes over steps; tokens per sequence
    where the normaliser counts those, of which no bar can be drawn."""
    rows, form = [], _per_sequence if run.counts_sequences else words.percent
    for part, title in PARTS.items():
        lines = [{f"share_{part}": 0.0, **line} for line in run.metrics]  # of a rare part a step without it says nothing
        values = [float(line[f"share_{part}"] or 0.0) for line in lines]
        if not any(values):
            continue
        counted = [line.get("normaliser", line["tokens"]) for line in lines]
        mean = sum(v * n for v, n in zip(values, counted, strict=True)) / sum(counted)
        rows.append({
            "swatch": figures.dot(place), "name": run.name, "part": title, "place": place, "mean": form(mean),
            "low": form(min(values)), "high": form(max(values)),
            "width": None if run.counts_sequences else f"{100 * min(1.0, mean):.2f}",
            **_start_and_end(lines, part),
        })  # fmt: skip
    return rows


def _per_sequence(tokens: float) -> str:
    return f"{words.number(tokens, 1)} per sequence"


def _start_and_end(lines: list[dict[str, Any]], part: str) -> dict[str, str]:
    """The part's mean in the first and in the last tenth of the run, in nats per token that bears it."""
    values = [float(line[part]) for line in lines if line.get(part) is not None and line[f"share_{part}"] > 0]
    tenth = max(1, len(values) // 10)
    if not values:
        return {"start": "", "end": ""}
    return {"start": words.nats(sum(values[:tenth]) / tenth), "end": words.nats(sum(values[-tenth:]) / tenth)}


def _cost(place: int, run: RunData) -> dict[str, str]:
    lines = run.metrics
    total = run.checkpoint.facts.get("total_steps") if run.checkpoint else None
    steps = words.whole(lines[-1]["step"]) + (f" of {words.whole(total)}" if total not in (None, lines[-1]["step"]) else "")
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in lines if line.get("tokens_per_second"))
    return {
        "swatch": figures.dot(place), "name": run.name, "steps": steps, "tokens": words.whole(sum(line["tokens"] for line in lines)),
        "epochs": words.number(float(lines[-1].get("epoch", 0.0)), 2), "speed": words.whole(median(speeds)) if speeds else "",
        "time": words.clock(seconds), "lr": f"{max(line['lr'] for line in lines):.2g}" if all("lr" in line for line in lines) else "",
    }  # fmt: skip


def _fingerprints(run: RunData) -> list[tuple[str, str]]:
    """What identifies the run: digests of bytes and settings, no paths."""
    rows: list[tuple[str, str]] = []
    if run.checkpoint:
        identity = run.checkpoint.identity.get("run")
        rows.append(("run identity", fingerprint("run", identity if isinstance(identity, dict) else {})))
        rows.append(("checkpoint", f"step {run.checkpoint.identity.get('step')}, content {run.checkpoint.content_digest}"))
        rows += _flat("", identity) if isinstance(identity, dict) else []
    if run.model:
        rows.append(("exported model", run.model.content_digest))
        rows += [(f"exported model, {entry.name}", entry.sha256) for entry in run.model.files]
    for task in run.tasks:
        rows.append((f"evaluation of {task.name}, before", task.before.artifact))
        rows.append((f"evaluation of {task.name}, after", task.after.artifact))
    return rows


def _flat(prefix: str, tree: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flat(f"{prefix}{key}.", value)
        elif value is not None:
            rows.append((f"{prefix}{key}", _value(value)))
    return rows


def _commands(runs: Sequence[RunData]) -> str:
    """How to make it again, from the run files below."""
    lines = ["# each run file is printed in full under 'Exact configuration'"]
    lines += [f"distft run {shlex.quote(run.name + '.yaml')}" for run in runs]
    if len(runs) > 1:
        lines += [
            "", "# this page", "python - <<'END'", "from distft.report.page import write_report",
            "from distft.store.location import open_location",
            f"store = open_location({runs[0].get('store', './store')!r})",
            f"print(write_report(store, {[run.name for run in runs]!r}, page=store))", "END",
        ]  # fmt: skip
    else:
        lines += ["", "# this page alone", f"distft report {shlex.quote(runs[0].name + '.yaml')}"]
    return "\n".join(lines)
