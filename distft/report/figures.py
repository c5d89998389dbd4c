"""The pictures: what was gained against what it moved, and how training went there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distft.report import svg, words
from distft.report.svg import BOTTOM, LEFT, RIGHT, TOP, Scale

Style = Literal["noisy", "exact", "marked"]
"""noisy: drawn faintly as it is and boldly as its running mean; exact: as it is; marked: with a marker on each measurement."""

LARGE, SMALL = (440, 330), (340, 200)
"""Width and height in units of which a letter is twelve; the page shows a picture at about these sizes in pixels."""
MOST_POINTS = 400
"""A longer curve is drawn as the means of at most so many stretches of equal length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model in the two-axis picture; `place` is its run's place on the page, -1 the untouched model."""

    label: str
    place: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    said: str
    """Its numbers in words, shown on hover and read aloud."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    label: str
    place: int
    points: tuple[tuple[float, float], ...]


def tradeoff(points: Sequence[Point], *, baseline: float, x_label: str, unit: str, bounds: tuple[float, float] | None) -> str:
    """Drift to the right, score upwards. `bounds` are what a score cannot leave."""
    low = min(baseline, *(p.y if p.low is None else p.low for p in points))
    high = max(baseline, *(p.y if p.high is None else p.high for p in points))
    room = 0.12 * ((high - low) or abs(high) or 1.0)
    low, high = low - room, high + room
    if bounds:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    furthest = max([p.x for p in points] + [1e-6])
    x = Scale(-0.04 * furthest, 1.16 * furthest, LEFT, LARGE[0] - RIGHT)
    y = Scale(low, high, LARGE[1] - BOTTOM, TOP)
    x_ticks = [v for v in svg.ticks(0, x.high, 5) if v >= 0]
    parts = [svg.frame(x, y, x_label=x_label, x_ticks=x_ticks, y_ticks=svg.ticks(low, high, 6), unit=unit)]
    parts.append(svg.tag("line", x1=x.start, x2=x.end, y1=y(baseline), y2=y(baseline), class_="baseline"))
    taken = [
        (x(p.x) - 8, y(p.high if p.high is not None else p.y) - 8, x(p.x) + 8, y(p.low if p.low is not None else p.y) + 8)
        for p in points
    ]
    for point in points:
        bar = ""
        if point.low is not None and point.high is not None:
            bar = svg.tag("line", x1=x(point.x), x2=x(point.x), y1=y(point.low), y2=y(point.high), class_="bar")
            for end in (point.low, point.high):
                bar += svg.tag("line", x1=x(point.x) - 4, x2=x(point.x) + 4, y1=y(end), y2=y(end), class_="bar")
        label, box = _place(
            _short(point.label), x(point.x), y(point.y), taken, edge=(x.start, y.end, x.end, y.start), baseline=y(baseline)
        )
        taken.append(box)
        title = svg.tag("title", svg.escape(f"{point.label}: {point.said}"))
        parts.append(
            svg.tag("g", title + bar + svg.mark(point.place, x(point.x), y(point.y)) + label, class_=svg.series(point.place))
        )
    return svg.picture("".join(parts), *LARGE, "; ".join(f"{p.label}: {p.said}" for p in points))


def curves(drawn: Sequence[Curve], *, x_label: str, from_zero: bool, style: Style, described: str) -> str:
    """One line per run over the steps."""
    lines = [(curve, _thinned([p for p in curve.points if all(map(math.isfinite, p))])) for curve in drawn]
    values = [value for _, points in lines for _, value in points]
    steps = [step for _, points in lines for step, _ in points]
    if not values:
        return ""
    low, high = (min(0.0, min(values)) if from_zero else min(values)), max(values)
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    y = Scale(low if from_zero and low == 0 else low - room, high + room, SMALL[1] - BOTTOM, TOP)
    last = max(max(steps), min(steps) + 1)
    x = Scale(min(0, min(steps)), last, LEFT, SMALL[0] - RIGHT)
    x_ticks = [v for v in svg.ticks(x.low, x.high, 6) if v == round(v)]
    parts = [svg.frame(x, y, x_label=x_label, x_ticks=x_ticks, y_ticks=svg.ticks(y.low, y.high, 4))]
    for curve, points in lines:
        if not points:
            continue
        placed = [(x(step), y(value)) for step, value in points]
        smooth = _running_mean(placed) if style == "noisy" else placed
        content = svg.tag("title", svg.escape(curve.label))
        if smooth is not placed:
            content += svg.line(placed, 0, "raw")
        content += svg.line(smooth, curve.place, "mean")
        if style == "marked":
            for (step, value), (px, py) in zip(points, placed, strict=True):
                hover = svg.tag("title", svg.escape(f"{curve.label}, step {step:,.0f}: {words.drift(value)}"))
                content += svg.tag("g", hover + svg.mark(curve.place, px, py, 3.5))
        parts.append(svg.tag("g", content, class_=svg.series(curve.place)))
    return svg.picture("".join(parts), *SMALL, described)


def swatch(place: int) -> str:
    """A run's line and marker, for the legend."""
    drawn = svg.line([(1, 7), (39, 7)], place, "mean") + svg.mark(place, 20, 7, 4.5)
    return _inline(drawn, 40, place)


def dot(place: int) -> str:
    """A run's marker alone, for beside its name."""
    return _inline(svg.mark(place, 7, 7, 4.5), 14, place)


def _inline(drawn: str, width: int, place: int) -> str:
    group = svg.tag("g", drawn, class_=svg.series(place))
    return svg.tag("svg", group, viewBox=f"0 0 {width} 14", width=width, height=14, class_="swatch", aria_hidden="true")


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a twentieth of the curve, centred but at its ends; the points themselves where they are few."""
    reach = len(points) // 40
    if reach == 0:
        return points
    smooth = []
    for place, (x, _) in enumerate(points):
        window = points[max(0, place - reach) : place + reach + 1]
        smooth.append((x, sum(v for _, v in window) / len(window)))
    return smooth


Box = tuple[float, float, float, float]


def _place(label: str, x: float, y: float, taken: list[Box], *, edge: Box, baseline: float) -> tuple[str, Box]:
    """The label where it covers least: beside its marker, above or below it, clear of the edge and of the baseline."""
    width, best = 7.0 * len(label), None
    for dx, dy, anchor in ((11, 4, "start"), (-11, 4, "end"), (11, -9, "start"), (11, 18, "start"), (-11, -9, "end"), (-11, 18, "end"),
                           (0, -14, "middle"), (0, 24, "middle")):  # fmt: skip
        left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (left, y + dy - 11, left + width, y + dy + 4)
        covered = sum(_overlap(box, other) for other in taken)
        covered += 0.5 * _overlap(box, (edge[0], baseline - 2, edge[2], baseline + 2))
        covered += 4 * (width * 15 - _overlap(box, edge))
        if best is None or covered < best[0] - 1e-6:
            best = (covered, dx, dy, anchor, box)
    assert best is not None, "there are places to try"
    return svg.text(label, x + best[1], y + best[2], best[3], "name"), best[4]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _short(label: str) -> str:
    return label if len(label) <= 24 else f"{label[:23]}…"
