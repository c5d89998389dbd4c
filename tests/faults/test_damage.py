"""Bytes that are not those promised, and two that write at once: nothing wrong is used, and nothing right is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distft.store.location import open_location
from distft.store.manifest import read_manifest, verify_files
from tests.faults.test_bad_input import cut
from tests.helpers.runs import Bench


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: cut(path, 0.5), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("what", ["corpus/*/data/train-*", "teacher/*/data/part-*"])
def test_a_damaged_shard_is_not_trained_on(finished: Bench, what: str, damage: Callable[[Path], None]) -> None:
    damage(next(finished.store.glob(what)))
    done = finished.refused("train", "name=other", status=3, says=what.split("*")[-2].split("/")[-1])
    assert "remove the artifact's folder" in done.json["help"]
    assert not (finished.store / "runs" / "other" / "checkpoints").exists()


@pytest.mark.parametrize(
    "what", ["teacher/*/coverage/*.json", "teacher/*/IDENTITY.json", "corpus/*/MANIFEST.json", "teacher/*/parts/*.json"]
)
def test_a_damaged_manifest_is_no_manifest(finished: Bench, what: str) -> None:
    path = next(finished.store.glob(what))
    flip(path)
    verb = "score" if "parts" in what or "IDENTITY" in what else "train"
    if "parts" in what:
        next(finished.store.glob("teacher/*/coverage/*.json")).unlink()
    finished.refused(verb, "name=other", status=3, says="is not a sound manifest")


def test_a_deleted_part_is_scored_again(finished: Bench) -> None:
    next(finished.store.glob("teacher/*/coverage/*.json")).unlink()
    next(finished.store.glob("teacher/*/parts/*.json")).unlink()
    finished.refused("train", "name=other", status=3, says="of the corpus's 30 documents")
    assert finished.run("score").json["documents_scored"] > 0
    finished.run("train", "name=other")


def test_a_damaged_checkpoint_is_set_aside(finished: Bench) -> None:
    """Training goes on from the one before; what comes out is what would have come out."""
    loss = finished.run("train").json["loss"]
    flip(next(finished.store.glob("runs/first/checkpoints/step-00000012/data/rank-*")))
    finished.refused("export", "export.dtype=bfloat16", status=3, says="step 12 is damaged and was set aside: data/rank-")
    assert (finished.store / "runs/first/model/MANIFEST.json").exists(), "the model that was there still is"
    flip(next(finished.store.glob("runs/first/checkpoints/step-00000010/data/rank-*")))
    done = finished.refused("train", status=3, says="No checkpoint of this run is whole")
    assert "the bad one is set aside" in done.err
    done = finished.run("train")
    assert done.json["resumed_from"] is None
    assert done.json["loss"] == loss


def test_a_damaged_model_is_not_evaluated(finished: Bench) -> None:
    flip(finished.store / "runs/first/model/model.safetensors")
    finished.refused("evaluate", status=3, says="model.safetensors")


@pytest.mark.parametrize("verb", ["tokenize", "score"])
def test_two_that_build_the_same(bench: Bench, verb: str) -> None:
    if verb == "score":
        bench.run("tokenize")
    both = [bench.start(verb), bench.start(verb)]
    told = [process.wait() for process in both]
    assert [done.status for done in told] == [0, 0], told
    kind = "corpus" if verb == "tokenize" else "teacher"
    assert told[0].json[kind] == told[1].json[kind]
    assert told[0].json["documents"] == told[1].json["documents"] == 30 if kind == "corpus" else True
    folder = open_location(told[0].json[kind])
    if kind == "corpus":
        manifest = read_manifest(folder)
    else:
        [coverage] = folder.child("coverage").names()
        manifest = read_manifest(folder.child("coverage"), coverage)
    assert manifest is not None
    verify_files(folder, manifest)
    assert set(folder.child("data").names()) == {entry.name.removeprefix("data/") for entry in manifest.files}, (
        "something was left over"
    )
    if kind == "teacher":
        assert bench.run("train").json["steps"] == 12


def test_two_that_train_the_same(finished: Bench) -> None:
    """Both have the same bytes to write: whoever commits first, what is there is whole and right."""
    both = [finished.start("train", "name=twice"), finished.start("train", "name=twice")]
    told = [process.wait() for process in both]
    assert 0 in [done.status for done in told], told
    for done in told:
        assert done.status in (0, 3), done.err
        assert "Traceback" not in done.err
    assert finished.run("train", "name=twice").json["steps"] == 12
    finished.run("export", "name=twice")
    mine, theirs = (load_file(finished.store / f"runs/{name}/model/model.safetensors") for name in ("first", "twice"))
    assert all(mine[name].equal(theirs[name]) for name in mine)
    lines = (finished.store / "runs/twice/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
