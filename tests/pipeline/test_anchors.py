"""Annotated anchors from the file to the loss: they are learned, the rest is held, and the teacher is not asked again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from distft.corpus.reader import Corpus
from distft.store.location import open_location
from tests.helpers.runs import Bench

LWF: dict[str, Any] = {"kind": "lwf", "anchors": "given", "alpha": 4.0, "beta": 1.0}


def annotate(bench: Bench, lines: list[dict[str, Any]]) -> None:
    """Writes the annotation, and makes the run file learn by it."""
    path = bench.folder / "anchors.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = bench.config()
    config["data"]["train"]["anchors"] = str(path)
    bench.write(config | {"objective": LWF})


def sums(bench: Bench) -> list[dict[str, Any]]:
    """The sum of each answer of the even rows, by its place."""
    lines = []
    for number, row in enumerate(bench.rows(), start=1):
        answer = row["messages"][1]["content"]
        start = len("The answer is ")
        if number % 2 == 0:
            anchor = {"message": 2, "start": start, "end": len(answer) - 1, "text": answer[start:-1]}
            lines.append({"row": number, "anchors": [anchor]})
    return lines


@pytest.mark.parametrize("normalise", ["token_mean", "group_mean"])
def test_anchors_alone_are_learned_and_nothing_is_scored_again(finished: Bench, normalise: str) -> None:
    annotate(finished, sums(finished))
    told = finished.run("tokenize").json
    assert finished.run("score", "score.reuse_only=true").json["documents_scored"] == 0
    folder = open_location(str(finished.store)).child("corpus", told["corpus"].rpartition("/")[2])
    documents = list(Corpus.open(folder, finished.folder / "staging").documents("train"))
    assert [bool(one.anchors.any()) for one in documents] == [row % 2 == 1 for row in range(24)]
    finished.run("train", "name=annotated", f"objective.normalise={normalise}", "train.epochs=1")
    lines = [json.loads(line) for line in (finished.store / "runs" / "annotated" / "metrics.jsonl").read_text().splitlines()]
    supervised = sum(int(one.supervised.sum()) for one in documents)
    anchors = sum(int(one.anchors.sum()) for one in documents)
    shares = {part: sum(line[f"share_{part}"] for line in lines) / len(lines) for part in ("ce", "kl")}
    assert 0 < shares["ce"] < 1
    assert np.isclose(shares["kl"], 1)  # c = 0.999 leaves a thousandth of the teacher in each anchor
    assert "does not look at the anchors" not in finished.run("plan", "name=annotated").err
    assert "objective.kind=sft does not look at the anchors" in finished.run("plan", "objective.kind=sft").err
    [own, *_] = finished.run("plan", "name=annotated", f"objective.normalise={normalise}").json["tokens"]["objectives"]
    assert np.isclose(own["treatments"]["learned"]["tokens"], anchors / supervised)
    assert np.isclose(own["treatments"]["held"]["tokens"], 1 - anchors / supervised)


def test_another_annotation_is_another_run(finished: Bench) -> None:
    annotate(finished, sums(finished))
    finished.run("tokenize")
    finished.run("train", "name=annotated", "train.epochs=1")
    annotate(finished, sums(finished)[:-1])
    finished.refused("train", "name=annotated", "train.epochs=1", status=3, says="train.anchors")
    finished.run("tokenize")
    finished.refused("train", "name=annotated", "train.epochs=1", status=3, says="anchors")


def test_a_plan_finds_a_bad_annotation_before_anything_is_spent(bench: Bench) -> None:
    annotate(bench, [{"row": 1, "anchors": [{"start": 3, "end": 1}]}])
    bench.refused("plan", status=2, says="the anchor ends at character 1 and starts at 3")
    annotate(bench, [{"row": 99, "anchors": [{"message": 2, "start": 0, "end": 1}]}])
    bench.refused("tokenize", status=2, says="there is no row 99 in data.train, which has 24 rows")
    (bench.folder / "anchors.jsonl").unlink()
    bench.refused("plan", status=2, says="Check data.train.anchors")
