"""What a person sees while something takes its time."""

from __future__ import annotations

import time

import pytest

from distft import progress
from distft.progress import track, waiting


def test_waiting_is_told_once_it_takes_a_while(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("loading the model"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "WAITING_SECONDS", 0.01)
    with waiting("loading the model"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "loading the model ...\n"
    with pytest.raises(ValueError, match="as it was"), waiting("loading the model"):
        raise ValueError("as it was")


def test_what_was_done_before_counts_for_the_total_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with track("score", 30, "tokens", done=20) as meter:
        meter.advance(10)
    told = capsys.readouterr().err
    assert told.startswith("score: 30 of 30 tokens")
    assert "took 0:00" in told
