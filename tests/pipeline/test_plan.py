"""`plan` tells the truth at each stage, and leaves no trace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.runs import Bench, distft, files

ARTIFACTS = ("corpus", "teacher", "checkpoints", "model", "eval", "report")


def states(*found: str) -> dict[str, str]:
    return dict(zip(ARTIFACTS, found, strict=True))


def test_from_nothing_to_everything(bench: Bench) -> None:
    assert bench.plan() == states(*["missing"] * 6)
    assert not bench.store.exists(), "a plan writes nothing"
    there = ["missing"] * 6
    for place, verb in enumerate(("tokenize", "score", "train", "export", "evaluate", "report")):
        bench.run(verb)
        there[place] = "have"
        before = files(bench.folder)
        assert bench.plan() == states(*there)
        assert files(bench.folder) == before


def test_what_was_cut_off_is_partial(finished: Bench) -> None:
    store = finished.store
    [corpus] = (store / "corpus").iterdir()
    [teacher] = (store / "teacher").iterdir()
    [coverage] = (teacher / "coverage").iterdir()
    coverage.unlink()
    next((teacher / "parts").iterdir()).unlink()
    (store / "runs/first/checkpoints/step-00000012/MANIFEST.json").unlink()
    told = {status["artifact"]: status for status in finished.run("plan").json["artifacts"]}
    assert {name: status["state"] for name, status in told.items()} == states(
        "have", "partial", "partial", "stale", "stale", "stale"
    )
    assert "step 10 of 12" in told["checkpoints"]["note"]
    assert "checkpoint.step: 12 -> 10" in told["model"]["note"]
    (corpus / "MANIFEST.json").unlink()
    assert finished.plan()["corpus"] == "partial"
    finished.run("run")
    assert set(finished.plan().values()) == {"have"}


def test_what_was_made_from_something_else_is_stale(finished: Bench) -> None:
    told = {s["artifact"]: s for s in finished.run("plan", "data.max_tokens=20", "score.positions=all").json["artifacts"]}
    assert {name: status["state"] for name, status in told.items()} == states(
        "stale", "stale", "stale", "stale", "stale", "stale"
    )
    assert "max_tokens: 128 -> 20" in told["corpus"]["note"]
    assert "positions: supervised -> all" in told["teacher"]["note"]
    assert "corpus.max_tokens: 128 -> 20" in told["checkpoints"]["note"]


def test_a_setting_of_the_run_leaves_its_inputs(finished: Bench) -> None:
    assert finished.plan("train.lr=2e-3") == states("have", "have", "stale", "stale", "stale", "stale")
    assert finished.plan("export.dtype=bfloat16") == states("have", "have", "have", "stale", "stale", "stale")
    assert finished.plan("name=other") == states("have", "have", "missing", "missing", "missing", "missing")


def test_a_run_without_teacher_has_none_to_plan(bench: Bench) -> None:
    assert "teacher" not in bench.plan("objective.kind=sft", "data.heldout=null", "train.drift_every_steps=null")


def test_the_estimate_grows_with_what_is_known(bench: Bench) -> None:
    before = bench.run("plan").json["estimate"]
    assert before["score_hours"] is None
    assert before["parameters"] == sum(tensor.numel() for tensor in load_file(bench.model / "model.safetensors").values())
    bench.run("tokenize")
    after = bench.run("plan").json["estimate"]
    assert after["score_hours"] > 0
    assert after["train_hours"] > after["score_hours"]


def test_a_person_sees_every_default_and_what_to_do(bench: Bench) -> None:
    done = distft("plan", str(bench.file))
    assert done.out == ""
    for said in ("micro_batch_tokens: 96", "keep: 2", "(distft tokenize)", "known once the corpus is tokenised"):
        assert said in done.err


def test_a_plan_reads_a_store_that_it_may_not_write(finished: Bench) -> None:
    shutil.rmtree(finished.store / "runs")
    before = files(finished.store)
    assert finished.plan() == states("have", "have", "missing", "missing", "missing", "missing")
    assert files(finished.store) == before


@pytest.mark.parametrize("state", ["corpus", "model"])
def test_a_damaged_manifest_is_named(finished: Bench, state: str) -> None:
    folder = next((finished.store / "corpus").iterdir()) if state == "corpus" else finished.store / "runs/first/model"
    manifest: Path = folder / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"size", b"seize", 1))
    finished.refused("plan", status=3, says="MANIFEST.json is not a sound manifest")
