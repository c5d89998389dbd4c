"""A training run at a glance, for a terminal: what the last step told, and where it goes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel as Box
from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"
REMEMBERED = 512
"""Steps, of which as many are drawn as there is room for."""
PARTS = {"ce": "CE", "kl": "KL(q‖p)", "rkl": "KL(p‖q)", "entropy": "entropy", "collision": "Σp²"}
TIMES = ("data", "forward", "backward", "update", "other")


class Panel:
    """Renders the figures that it was last told. Every figure but the loss may be missing."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.figures: Mapping[str, float] = {}
        self.losses: deque[float] = deque(maxlen=REMEMBERED)

    def take(self, figures: Mapping[str, float]) -> None:
        self.figures = figures
        if math.isfinite(figures.get("loss", math.nan)):
            self.losses.append(figures["loss"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, 120)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True, width=9)
        table.add_column(overflow="ellipsis", no_wrap=True)
        for name, text in self.lines(room=width - 16):
            table.add_row(name, text)
        title = f"{self.title}, step {self.figures.get('step', 0):,.0f}"
        yield Box(table, title=title, title_align="left", box=box.ROUNDED, width=width)

    def lines(self, room: int) -> Iterator[tuple[str, str]]:
        """Names and texts, each of which fits into so many columns where its figures are of a usual size."""
        told = self.figures
        if "loss" in told:
            said = f"{told['loss']:.4f} nats"
            yield "loss", f"{said}  {sparkline(list(self.losses)[-max(8, room - len(said) - 2) :])}"
        parts = [f"{name} {told[part]:.4f}" for part, name in PARTS.items() if told.get(f"share_{part}")]
        if parts:
            yield "parts", " · ".join(parts)
        if "drift" in told:
            allowed = f" of {told['drift_budget']:g} allowed" if "drift_budget" in told else ""
            at = f", measured after step {told['drift_step']:,.0f}" if "drift_step" in told else ""
            yield "drift", f"{told['drift']:.4f}{allowed}{at}"
        if "lr" in told and "grad_norm" in told:
            yield "optimizer", f"lr {told['lr']:.3g} · gradient norm {told['grad_norm']:.3g}"
        if "tokens_per_second" in told:
            yield "speed", f"{told['tokens_per_second']:,.0f} tokens/s{_arithmetic(told)}"
        seconds = told.get("seconds", 0.0)
        if seconds > 0:
            shares = (f"{name} {100 * told.get(f'{name}_seconds', 0.0) / seconds:.0f}" for name in TIMES)
            yield "time", f"{', '.join(shares)} % of {_seconds(seconds)}"
        kept = f"last checkpoint step {told['checkpoint']:,.0f}" if told.get("checkpoint") else "no checkpoint yet"
        yield "memory", f"{told['memory_bytes'] / 1e9:.2f} GB · {kept}" if told.get("memory_bytes") else kept


def sparkline(values: list[float]) -> str:
    """The lowest value at the bottom and the highest at the top; nothing of fewer than two."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if len(values) < 2:
        return ""
    top = len(BARS) - 1
    return "".join(BARS[round(top * (value - low) / (high - low)) if high > low else 0] for value in values)


def _arithmetic(told: Mapping[str, float]) -> str:
    flops, unit = told.get("model_flops_per_second", 0.0), "T"
    if flops < 1e11:
        flops, unit = 1000 * flops, "G"
    done = f" · {flops / 1e12:.3g} {unit}FLOP/s" if flops else ""
    return f" · MFU {100 * told['mfu']:.1f} %{done}" if "mfu" in told else done


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
