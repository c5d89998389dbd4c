"""Small SVG pictures by hand: a scale, its ticks, a frame. Colours are the page's CSS variables, so one picture serves a light and
a dark page; text stays text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 44

DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKS = ("circle", "square", "triangle", "diamond")
COLOURS = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] of a quantity to [start, end] of the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; attribute names are written with `_` for `-`. `content` is markup already."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>"


def text(content: str, x: float, y: float, anchor: str = "start", class_: str = "") -> str:
    return tag("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside [low, high], at steps of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The same number of decimals on all, as few as tell them apart."""
    for decimals in range(9):
        if all(abs(round(v, decimals) - v) < 1e-9 * max(1.0, abs(v)) for v in values):
            return [f"{v:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") for v in values]
    return [f"{v:.3g}" for v in values]


def frame(x: Scale, y: Scale, *, x_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float], unit: str = "") -> str:
    """Grid lines, tick labels and the label of the horizontal axis; that of the vertical one stands above the picture, as text."""
    lines = [tag("line", x1=x.start, x2=x.end, y1=y(v), y2=y(v), class_="grid") for v in y_ticks]
    lines += [
        text(f"{label}{unit}", x.start - 7, y(v) + 4, "end", "tick")
        for v, label in zip(y_ticks, tick_labels(y_ticks), strict=True)
    ]
    for value, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        lines.append(tag("line", x1=x(value), x2=x(value), y1=y.start, y2=y.start + 4, class_="axis"))
        lines.append(text(label, x(value), y.start + 17, "middle", "tick"))
    lines.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    lines.append(text(x_label, (x.start + x.end) / 2, y.start + 36, "middle", "label"))
    return "".join(lines)


def picture(content: str, width: int, height: int, described: str) -> str:
    return tag("svg", content, viewBox=f"0 0 {width} {height}", role="img", aria_label=described, class_="plot")


def series(place: int) -> str:
    """The class that gives a run its colour; -1 is the untouched model."""
    return "run-none" if place < 0 else f"run-{place % COLOURS}"


def mark(place: int, x: float, y: float, size: float = 5.0) -> str:
    """The run's marker: shape as well as colour, for those who cannot tell the colours apart."""
    if place < 0:
        return tag("circle", cx=x, cy=y, r=size, class_="mark hollow")
    shape = MARKS[_style(place) % len(MARKS)]
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=size, class_="mark")
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
    }[shape]
    return tag("path", d=_path([(x + size * dx, y + size * dy) for dx, dy in corners], closed=True), class_="mark")


def _style(place: int) -> int:
    """Moves on by one with each round of the colours, so that the first 32 runs all look different."""
    return place + place // COLOURS


def line(points: Sequence[tuple[float, float]], place: int, class_: str) -> str:
    return tag("path", d=_path(points), class_=class_, stroke_dasharray=DASHES[_style(place) % len(DASHES)] or "none")


def _path(points: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    return "M" + "L".join(f"{_value(x)} {_value(y)}" for x, y in points) + ("Z" if closed else "")


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return escape(str(value), quote=True)
