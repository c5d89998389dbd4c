"""Which pictures the page has, made from the runs: the drawing itself is in `figures`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from distft.report import figures, words
from distft.report.data import RunData, Scored
from distft.report.figures import Curve, Point
from distft.report.results import Outcome, outcomes, score_interval
from distft.report.verdict import origin

UNTOUCHED = "untouched"
PART_CURVES = (
    ("loss", "Loss", "what was minimised, nats per token"),
    ("ce", "Cross-entropy", "on learned tokens, nats per token"),
    ("kl", "KL(teacher‖student)", "on held tokens, nats per token"),
    ("rkl", "KL(student‖teacher)", "on held tokens, nats per token"),
    ("entropy", "Entropy of the student", "nats per token"),
)
OPTIMIZER_CURVES = (("grad_norm", "Gradient norm", "before clipping"), ("lr", "Learning rate", "per step"),
              ("tokens_per_second", "Speed", "tokens per second"))  # fmt: skip


def place_of(runs: Sequence[RunData], run: RunData) -> int:
    """A run's place on the page, which gives it its colour and marker."""
    return next(i for i, other in enumerate(runs) if other is run)


def tradeoff(runs: Sequence[RunData], name: str) -> dict[str, str] | None:
    """Drift against the score (accuracy), or against the NLL that was saved; None where no run has both."""
    drawn = [o for o in outcomes(runs, name) if o.run.drift is not None]
    if not drawn:
        return None
    judged = drawn[0].task.kind == "generate"
    points = [_point(outcome, place_of(runs, outcome.run)) for outcome in drawn]
    starts = {(o.task.before.artifact, o.task.before.value): o.task.before for o in drawn}
    if all(run.own_teacher for run in runs):  # then the untouched model has no drift, by definition
        points = [*(_untouched(before) for before in starts.values()), *points]
    x_label = f"drift from {origin(runs)}, nats per token of held-out text"
    if not judged:
        return {
            "title": f"NLL saved on {name}", "unit": "nats per token; up is better",
            "svg": figures.tradeoff(points, baseline=0.0, bounds=None, unit="", x_label=x_label),
        }  # fmt: skip
    baseline, unit = 100 * drawn[0].task.before.value, f"{words.NARROW}%"
    return {
        "title": f"Right answers on {name}", "unit": f"of {drawn[0].task.after.count} questions",
        "svg": figures.tradeoff(points, baseline=baseline, bounds=(0.0, 100.0), unit=unit, x_label=x_label),
    }  # fmt: skip


def _point(outcome: Outcome, place: int) -> Point:
    assert outcome.run.drift is not None, "a point needs a drift"
    name, drift = outcome.run.name, outcome.run.drift.kl
    said = f"drift {words.drift(drift)}, "
    if outcome.task.kind == "generate":
        return _percent_point(outcome.task.after, label=name, place=place, drift=drift, said=said)
    span = outcome.gain_interval
    said += f"{words.signed(outcome.gain, 3)} nats per token saved"
    return Point(label=name, place=place, x=drift, y=outcome.gain, low=span and span.low, high=span and span.high, said=said)


def _untouched(before: Scored) -> Point:
    if before.kind == "generate":
        return _percent_point(before, label=UNTOUCHED, place=-1, drift=0.0, said="drift 0, ")
    return Point(label=UNTOUCHED, place=-1, x=0.0, y=0.0, said="drift 0; its own NLL is the zero line")


def _percent_point(scored: Scored, *, label: str, place: int, drift: float, said: str) -> Point:
    span = score_interval(scored)
    return Point(
        label=label, place=place, x=drift, y=100 * scored.value, low=span and 100 * span.low, high=span and 100 * span.high,
        said=said + words.percent(scored.value),
    )  # fmt: skip


def step_curves(runs: Sequence[RunData], kinds: Sequence[tuple[str, str, str]]) -> list[dict[str, str]]:
    found = []
    for key, title, unit in kinds:
        drawn = [Curve(label=run.name, place=i, points=_points(run, key)) for i, run in enumerate(runs)]
        drawn = [curve for curve in drawn if any(value for _, value in curve.points)]
        style = "noisy"
        if key == "lr":  # 0.000005 is hard to read: the axis counts in powers of ten
            power = math.floor(math.log10(max([value for curve in drawn for _, value in curve.points], default=1.0)))
            drawn = [replace(curve, points=tuple((step, value / 10.0**power) for step, value in curve.points)) for curve in drawn]
            style, unit = "exact", f"times 10{_superscript(power)}"
        drawing = figures.curves(drawn, x_label="step", from_zero=True, style=style, described=f"{title}, {unit}, by step")
        if drawing:
            found.append({"title": title, "unit": unit, "svg": drawing})
    return found


def drift_curves(runs: Sequence[RunData]) -> list[dict[str, str]]:
    found = []
    for key, title, unit, zero in (("drift", f"Drift from {origin(runs)}", "on held-out text, nats per token", True),
                                   ("heldout_nll", "NLL on held-out text", "nats per token", False)):  # fmt: skip
        drawn = []
        for place, run in enumerate(runs):
            measured = _points(run, key)
            start = 0.0 if key == "drift" else run.drift.teacher_nll if run.drift else None
            if measured and run.own_teacher and start is not None:  # the untouched model is its own teacher: known, not measured
                measured = ((0.0, start), *measured)
            drawn.append(Curve(label=run.name, place=place, points=measured))
        drawing = figures.curves(drawn, x_label="step", from_zero=zero, style="marked", described=f"{title}, {unit}, by step")
        if drawing:
            found.append({"title": title, "unit": unit, "svg": drawing})
    return found


def _points(run: RunData, key: str) -> tuple[tuple[float, float], ...]:
    """A quantity by step; a part of the loss only in steps where some token bore it, since its mean is empty elsewhere."""
    return tuple(
        (float(line["step"]), float(line[key]))
        for line in run.metrics if line.get(key) is not None and line.get(f"share_{key}", 1.0) > 0
    )  # fmt: skip


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
