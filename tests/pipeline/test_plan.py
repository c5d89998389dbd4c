"""`plan` tells the truth at each stage, and leaves no trace."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distft.store.location import open_location
from distft.store.manifest import read_manifest
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


def test_a_teacher_that_training_would_refuse_is_partial(bench: Bench) -> None:
    """A copy of the head that is gone, and a document that could not be read."""
    config = bench.config()
    config["score"] = {"distribution": {"kind": "hidden"}}
    bench.write(config)
    bench.run("tokenize")
    place = Path(bench.run("score").json["teacher"])
    assert bench.plan()["teacher"] == "have"
    (place / "HEAD.json").unlink()
    [told] = [one for one in bench.run("plan").json["artifacts"] if one["artifact"] == "teacher"]
    assert (told["state"], told["verb"]) == ("partial", "score")
    assert "without the copy of the teacher's head" in told["note"]
    assert bench.run("score").json["documents_scored"] == 0
    assert bench.plan()["teacher"] == "have"
    [stated] = (place / "coverage").iterdir()
    manifest = read_manifest(open_location(str(stated.parent)), stated.name)
    assert manifest is not None
    stated.write_bytes(replace(manifest, facts=manifest.facts | {"quarantined": {"0" * 32: "out of memory"}}).to_json())
    assert bench.plan()["teacher"] == "partial"


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


def test_measured_bytes_replace_the_estimate(bench: Bench) -> None:
    """The cache's own, and for a new one those of another with the same policy."""
    before = bench.run("plan").json["estimate"]
    assert (before["basis"], before["teacher_bytes"]) == ("estimated", None)
    bench.run("tokenize")
    estimated = bench.run("plan").json["estimate"]
    scored = bench.run("score").json
    name = Path(scored["teacher"]).name
    after = bench.run("plan").json["estimate"]
    assert (after["basis"], after["teacher_bytes_per_token"]) == (f"cache {name}", scored["bytes_per_token"])
    size = sum(path.stat().st_size for path in Path(scored["teacher"]).rglob("*.arrow"))
    assert after["teacher_bytes"] == size
    assert estimated["teacher_bytes"] == pytest.approx(estimated["teacher_bytes_per_token"] * scored["tokens_scored"], abs=1)
    assert f"(from cache {name})" in distft("plan", str(bench.file)).err
    assert bench.run("plan", "model.dtype=bfloat16").json["estimate"]["basis"] == f"cache {name}"
    assert bench.run("plan", "score.positions=all").json["estimate"]["basis"] == "estimated"


def test_a_calibration_measures_and_leaves_nothing(bench: Bench) -> None:
    """Before there is a corpus on the first rows, afterwards on documents from all of it; the plan's estimate is what was measured."""
    keys = {"documents", "tokens", "scored_tokens", "seconds", "tokens_per_second", "bytes_per_token", "teacher_bytes", "score_hours",
            "device"}  # fmt: skip
    first = bench.run("plan", "--calibrate")
    found = first.json["calibration"]
    assert keys <= found.keys()
    distinct = len({json.dumps(row) for row in bench.rows()[:20]})
    assert (found["documents"], found["whole_corpus"], found["device"]) == (distinct, False, "cpu")
    assert "calibrate: model reads" in first.err
    assert not bench.store.exists(), "a plan writes nothing"
    bench.run("tokenize")
    before = files(bench.folder)
    result = bench.run("plan", "--calibrate").json
    found, told = result["calibration"], result["estimate"]
    assert files(bench.folder) == before
    assert found["whole_corpus"]
    assert told["basis"] == f"measured on {found['documents']} documents"
    assert (told["teacher_bytes_per_token"], told["teacher_bytes"]) == (found["bytes_per_token"], found["teacher_bytes"])
    assert result["artifacts"] == bench.run("plan").json["artifacts"]
    scored = bench.run("score").json
    assert found["teacher_bytes"] == pytest.approx(found["bytes_per_token"] * scored["tokens_scored"], abs=1)
    assert bench.run("plan", "--calibrate").json["estimate"]["basis"] == told["basis"], "what was asked for now comes first"
    person = distft("plan", str(bench.file), "--calibrate").err
    assert all(part in person for part in ("# calibration: ", "are scored (", "tokens/s in", "the whole corpus", "with 1 scorer"))


def test_there_must_be_something_to_calibrate(bench: Bench) -> None:
    bench.refused("plan", "--calibrate", "objective.kind=sft", "data.heldout=null", "train.drift_every_steps=null", status=2,
                  says="nothing to calibrate")  # fmt: skip


def test_a_calibration_of_a_broken_teacher_says_so(bench: Bench) -> None:
    path = bench.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": -1.0}))
    assert bench.run("plan").json["estimate"]["basis"] == "estimated", "without the flag no model is loaded"
    assert "NaN" in (told := bench.run("plan", "--calibrate", status=2).json["error"]) or "finite" in told
    assert not bench.store.exists()


def test_another_vocabulary_is_told_id_by_id(bench: Bench) -> None:
    """As many tokens, and two ids swapped: nothing but their meaning tells them apart."""
    other = bench.folder / "other"
    shutil.copytree(bench.model, other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    first, second = vocabulary[one], vocabulary[two]
    vocabulary[one], vocabulary[two] = second, first
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": second + 5, "content": "<extra>"})
    path.write_text(json.dumps(tokenizer))
    bench.run("tokenize")
    for verb in ("plan", "score"):
        done = bench.refused(verb, f"teacher.path={other}", status=2, says="different vocabularies")
        assert done.json["error"].splitlines()[1:] == [
            f"2 of the {len(vocabulary)} ids that both have mean another token:",
            "  id: teacher's token / model's token",
            f"  {first}: {two!r} / {one!r}",
            f"  {second}: {one!r} / {two!r}",
            f"1 id is only in the teacher: {second + 5}",
        ]


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
