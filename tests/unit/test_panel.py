"""The panel of a run, as a terminal shows it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from distft.cluster.desk import Advanced, Closed, Opened, _ToldMeter
from distft.cluster.train import _Run
from distft.panel import Panel, sparkline

FULL: dict[str, float] = {
    "step": 1234567, "loss": 1.23456789, "ce": 1.1, "share_ce": 1.0, "kl": 0.02, "share_kl": 0.5, "rkl": 0.0, "share_rkl": 0.0,
    "drift": 0.0123, "drift_step": 1234500, "drift_budget": 0.05, "lr": 1.234e-05, "grad_norm": 12.345,
    "tokens_per_second": 123456.7, "model_flops_per_second": 4.05e14, "mfu": 0.412, "seconds": 0.987, "data_seconds": 0.01,
    "forward_seconds": 0.3, "backward_seconds": 0.55, "update_seconds": 0.1, "other_seconds": 0.027, "memory_bytes": 71.2e9,
    "checkpoint": 1234500,
}  # fmt: skip


def shown(panel: Panel, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(panel)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_all_of_it_fits(width: int) -> None:
    panel = Panel("train first")
    for step in range(600):
        panel.take({**FULL, "loss": 2.0 - step / 600})
    text = shown(panel, width)
    assert max(len(line) for line in text.splitlines()) == min(width, 120)
    assert len(text.splitlines()) == 9
    for part in (
        "train first, step 1,234,567", "loss       1.0017 nats", "CE 1.1000 · KL(q‖p) 0.0200", "0.0123 of 0.05 allowed",
        "lr 1.23e-05 · gradient norm 12.3", "123,457 tokens/s · MFU 41.2 % · 405 TFLOP/s",
        "data 1, forward 30, backward 56, update 10, other 3 % of 987 ms", "71.20 GB · last checkpoint step 1,234,500",
    ):  # fmt: skip
        assert part in text
    assert "KL(p‖q)" not in text, "no token bears it"
    assert "…" not in text
    assert "▂▁" in text, "the loss has fallen"


def test_a_narrow_terminal_and_missing_figures_break_nothing() -> None:
    panel = Panel("train first")
    assert "no checkpoint yet" in shown(panel, 80)
    panel.take({"loss": 1.0})
    panel.take(FULL)
    assert max(len(line) for line in shown(panel, 30).splitlines()) == 30
    panel.take({"loss": float("nan")})
    assert "nan nats" in shown(panel, 80)


def test_trends() -> None:
    assert sparkline([]) == sparkline([1.0]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 7.0, 3.5]) == "▁█▅"


def test_figures_reach_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones of several steps, whatever bar they are replayed on."""
    told: list[Any] = []

    class Line:
        def tell(self, *events: Any) -> None:
            told.extend(events)

    meter = _ToldMeter(Line(), 0)  # pyright: ignore[reportArgumentType]
    meter.advance(1.0, "loss 2", figures={"loss": 2.0})
    meter.advance(1.0, "loss 1", figures={"loss": 1.0})
    meter.flush()
    assert told == [Advanced(0, 2.0, "loss 1", {"loss": 1.0})]

    class Bar:
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def advance(self, *given: Any) -> None:
            self.heard.append(given)

    bar = Bar()
    monkeypatch.setattr("distft.cluster.train.progress.track", lambda *_, **__: bar)
    run = _Run(None, 2, gpus=0, restarts=0)
    for event in (Opened(0, "train", 4.0, "steps", 0.0), *told, Advanced(0, 1.0, "what others say"), Closed(0)):
        run._take(event)
    assert bar.heard == [(2.0, "loss 1", {"loss": 1.0}), (1.0, "what others say", None)]
