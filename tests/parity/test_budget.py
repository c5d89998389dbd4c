"""The drift budget on a real student: it ends where the user said, from whatever weight it starts, and resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.config.check import check_run
from distft.engine.local import LocalEngine
from distft.errors import ConfigError, CorruptArtifactError
from distft.stopping import Interrupted
from distft.train import loop
from distft.train.budget import OVER
from distft.train.identity import run_identity
from tests.helpers.stores import Lab, bits, differing, lab, random_documents

STEPS, EVERY = 75, 3
BUDGET = 0.3
"""Nats per token. Without a hold this run drifts to 0.9, held ten times as strongly as the run file says to 0.1."""


def budgeted(folder: Path, *, kl: float = 1.0, budget: float | None = BUDGET, **train: Any) -> Lab:
    """Drift is measured on documents that are trained on, too: what is random cannot be held elsewhere."""
    documents = random_documents(48, seed=1)
    objective = {"kind": "sft_kl", "kl": kl, "drift_budget": budget}
    made = lab(folder, documents=documents, heldout=documents[:24], objective=objective)
    settings = {"epochs": 20, "max_steps": STEPS, "drift_every_steps": EVERY, "lr": 1e-3, "warmup_steps": 15, **train}
    made = made.changed(train=settings)
    made.score()
    return made


def metrics(made: Lab) -> list[dict[str, Any]]:
    return [json.loads(line) for line in made.run_folder.read("metrics.jsonl").splitlines()]


@pytest.mark.parametrize("kl", [0.3, 3.0])
def test_drift_ends_at_the_budget_without_swinging(tmp_path: Path, kl: float) -> None:
    made = budgeted(tmp_path, kl=kl)
    result = made.train()
    lines = [line for line in metrics(made) if "drift" in line]
    assert len(lines) == STEPS // EVERY
    assert all(line["drift_budget"] == BUDGET for line in lines)
    assert lines[0]["kl_factor"] == 1.0
    assert max(line["drift"] for line in lines) <= 1.6 * BUDGET  # the first steps are taken before anything is measured
    assert all(0.8 * BUDGET <= line["drift"] <= 1.2 * BUDGET for line in lines[-8:]), [line["drift"] for line in lines]
    assert result["drift"] == lines[-1]["drift"]


def test_without_a_budget_it_drifts_much_further(tmp_path: Path) -> None:
    made = budgeted(tmp_path, kl=0.3, budget=None)
    assert made.train()["drift"] > 2 * BUDGET
    assert not any("kl_factor" in line for line in metrics(made))


def test_a_budget_that_cannot_be_met_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = budgeted(tmp_path, budget=1e-4, max_steps=60)
    made.train()
    told = capsys.readouterr().err
    assert told.count("Holding more strongly will not help: lower train.lr") == 1
    assert "above objective.drift_budget=0.0001" in told
    assert max(line["kl_factor"] for line in metrics(made) if "kl_factor" in line) == pytest.approx(256.0)


def test_a_run_goes_on_with_the_factor_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two measurements: weights, moments and factor are those of a run that was not."""
    straight = budgeted(tmp_path / "straight", max_steps=30)
    straight.train()
    stopped = budgeted(tmp_path / "stopped", max_steps=30)
    with monkeypatch.context() as patch:
        asked = iter([False] * 16)
        patch.setattr("distft.stopping.requested", lambda: next(asked, True))
        with pytest.raises(Interrupted):
            stopped.train()
    assert stopped.checkpoints().steps()[-1] == 16
    stopped.train()
    assert differing(bits(straight.restored()), bits(stopped.restored())) == []
    one, other = ([line for line in metrics(made) if "drift" in line] for made in (straight, stopped))
    assert [line["kl_factor"] for line in one] == [line["kl_factor"] for line in other]


def test_a_run_that_died_goes_on_from_its_last_periodic_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = budgeted(tmp_path / "straight", max_steps=30)
    straight.train()
    died = budgeted(tmp_path / "died", max_steps=30, checkpoint={"every_steps": 8})
    with monkeypatch.context() as patch:
        step, left = LocalEngine.train_step, iter(range(20))

        def dying(self: Any, *args: Any, **named: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return step(self, *args, **named)

        patch.setattr(LocalEngine, "train_step", dying)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            died.train()
    assert died.checkpoints().steps()[-1] == 16
    result = died.train()
    assert differing(bits(straight.restored()), bits(died.restored())) == []
    one, other = ([line for line in metrics(made) if "drift" in line] for made in (straight, died))
    assert [line["kl_factor"] for line in one] == [line["kl_factor"] for line in other]
    kept = one[-1]["drift"] <= OVER * BUDGET
    assert result["budget"] == {"nats": BUDGET, "drift": one[-1]["drift"], "kept": kept}
    assert died.train()["budget"] == result["budget"]  # there is nothing left to do


def test_a_checkpoint_without_the_control_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = budgeted(tmp_path, max_steps=30)
    with monkeypatch.context() as patch:
        asked = iter([False] * 16)
        patch.setattr("distft.stopping.requested", lambda: next(asked, True))
        plain = loop._facts
        patch.setattr(loop, "_facts", lambda loss, drifted, plan, _: plain(loss, drifted, plan, None))
        with pytest.raises(Interrupted):
            made.train()
    with pytest.raises(CorruptArtifactError, match="does not say where the drift budget's control was"):
        made.train()


def test_under_a_budget_what_is_measured_is_part_of_the_run(tmp_path: Path) -> None:
    """It decides what is learned; without a budget it does not."""
    made = budgeted(tmp_path)
    for budget, same in ((BUDGET, False), (None, True)):
        one, rarer = (
            made.changed(objective={"kind": "sft_kl", "drift_budget": budget}, train={"drift_every_steps": n}) for n in (3, 5)
        )
        assert (one.run_identity() == rarer.run_identity()) == same
        heldout = {**one.corpus.manifest.identity, "heldout": "other documents"}
        other = run_identity(one.run, one.model, corpus=heldout, teacher=one.run_identity()["teacher"])
        assert (one.run_identity() == other) == same


def test_a_run_that_would_measure_too_rarely_ends_before_it_begins(tmp_path: Path) -> None:
    """How many steps there are is known only now."""
    made = budgeted(tmp_path, max_steps=None, epochs=1, warmup_steps=2, drift_every_steps=1000)
    check_run(made.run, where="run.yaml")
    with pytest.raises(ConfigError, match=r"it is measured once in \d+ steps: make it at most"):
        made.train()
    assert made.checkpoints().steps() == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": {"kind": "sft", "drift_budget": 0.1}}, "sft has none with these settings: take sft_kl"),
        ({"train": {"drift_every_steps": None}}, "give data.heldout and train.drift_every_steps"),
    ],
)
def test_a_budget_that_nothing_controls_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_run(budgeted(tmp_path).changed(**changes).run, where="run.yaml")
