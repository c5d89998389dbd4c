"""A calibration measures what scoring does, on documents from all over the corpus, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.corpus.reader import Document
from distft.errors import DistftError
from distft.store.location import open_location
from distft.teacher import build
from distft.teacher import calibrate as calibration
from distft.teacher.calibrate import CALIBRATION_DOCUMENTS, Calibration, calibrate, scorers
from distft.teacher.catalogue import figures
from distft.teacher.scorer import Scorer
from tests.helpers.runs import files
from tests.helpers.stores import Lab, lab, random_documents

DOCUMENTS = random_documents(50, seed=81)


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    return lab(tmp_path, documents=DOCUMENTS)


def measure(made: Lab) -> Calibration:
    return calibrate(made.run, made.model, made.model, made.corpus)


def read_by(made: Lab, monkeypatch: pytest.MonkeyPatch) -> list[list[Document]]:
    """The documents that the scorer is given, call by call."""
    seen: list[list[Document]] = []
    read = Scorer.read

    def spy(self: Scorer, documents: list[Document], *rest: Any) -> Any:
        seen.append(documents)
        return read(self, documents, *rest)

    monkeypatch.setattr(Scorer, "read", spy)
    measure(made)
    return seen


@pytest.mark.parametrize("policy", [{"kind": "topk"}, {"kind": "sample", "draws": 8}, {"kind": "none"}])
def test_a_token_takes_what_it_takes_in_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: dict[str, Any]) -> None:
    """To the byte, where the cache has the same documents in one part."""
    monkeypatch.setattr(build, "PARTS_AT_LEAST", 1)
    objective = {"kind": "sft_kl"} if policy["kind"] != "none" else {"kind": "stm"}
    made = lab(tmp_path, documents=DOCUMENTS[:CALIBRATION_DOCUMENTS], score={"distribution": policy}, objective=objective)
    found, scored = measure(made), figures(made.score().folder)
    assert scored["parts"] == 1
    assert (found.documents, found.tokens, found.scored_tokens) == (20, scored["tokens"], scored["scored_tokens"])
    assert (found.bytes, found.bytes_per_token) == (scored["bytes"], scored["bytes_per_token"])
    assert (found.device, found.workers) == ("cpu", 1)
    assert found.seconds > 0


def test_documents_are_spread_over_the_corpus(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [document.digest for document in DOCUMENTS]
    warm_up, measured = read_by(made, monkeypatch)
    places = [digests.index(document.digest) for document in measured]
    assert len(places) == CALIBRATION_DOCUMENTS
    assert places[0] <= 2
    assert places[-1] >= 47
    assert {after - before for before, after in pairwise(places)} == {2, 3}
    assert len(warm_up) == 1, "the first pass of a process is not the measure of the others"


def test_a_row_that_repeats_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab(tmp_path, documents=[*DOCUMENTS[:3]] * 4)
    assert len(read_by(made, monkeypatch)[1]) == 3


def test_nothing_is_left_behind(made: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = files(made.folder / "store")
    measure(made)
    assert files(made.folder / "store") == before
    assert list(scratch.iterdir()) == []
    assert open_location(made.run.store).child("teacher").folders() == []


def test_documents_that_cannot_be_read_do_not_count(
    made: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = Scorer._batch
    bad = DOCUMENTS[1].digest  # the first that is chosen

    def fail(self: Scorer, documents: list[Document]) -> Any:
        if bad in [document.digest for document in documents]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch(self, documents)

    monkeypatch.setattr(Scorer, "_batch", fail)
    found = measure(made)
    assert found.documents == CALIBRATION_DOCUMENTS - 1
    assert "1 of 20 documents cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(Scorer, "_batch", lambda self, documents: fail(self, [DOCUMENTS[1]]))
    with pytest.raises(DistftError, match="could read no document"):
        measure(made)


@pytest.mark.parametrize(
    ("score", "address", "gpus", "said"),
    [
        ({}, "local", 0, 1), ({}, "local", 4, 4), ({"workers": 2}, "local", 4, 2), ({"workers": 9}, "local", 4, 4),
        ({"workers": 2}, "local", 0, 2), ({"workers": 64}, "local", 0, 3), ({"workers": 64}, "auto", 0, 64), ({}, "auto", 4, 1),
    ],
)  # fmt: skip
def test_how_many_share_the_work(
    made: Lab, monkeypatch: pytest.MonkeyPatch, score: dict[str, Any], address: str, gpus: int, said: int
) -> None:
    monkeypatch.setattr(calibration, "device_count", lambda: gpus)
    monkeypatch.setattr(calibration.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert scorers(made.changed(score=score, cluster={"address": address}).run) == said


@pytest.mark.parametrize(("workers", "threads"), [("auto", 2), (1, 2), (3, 1)])
def test_a_scorer_beside_others_has_one_core(made: Lab, monkeypatch: pytest.MonkeyPatch, workers: Any, threads: int) -> None:
    seen = []
    batch = Scorer._batch

    def spy(self: Scorer, documents: list[Document]) -> Any:
        seen.append(torch.get_num_threads())
        return batch(self, documents)

    monkeypatch.setattr(Scorer, "_batch", spy)
    torch.set_num_threads(2)
    measure(made.changed(score={"workers": workers}))
    assert set(seen) == {threads}
    assert torch.get_num_threads() == 2


def test_totals_follow_from_what_was_measured() -> None:
    found = Calibration(
        documents=20, tokens=4_000, scored_tokens=1_000, bytes=60_000, seconds=8.0, device="cpu", workers=2
    )  # fmt: skip
    facts = found.facts((9_000_000, 2_000_000))
    assert (facts["tokens_per_second"], facts["bytes_per_token"]) == (500.0, 60.0)
    assert (facts["teacher_bytes"], facts["score_hours"]) == (120_000_000, 2.5)
    assert (facts["of_tokens"], facts["whole_corpus"]) == (9_000_000, True)
    facts = found.facts(None)
    assert (facts["teacher_bytes"], facts["score_hours"]) == (15_000_000, pytest.approx(1_000_000 / 1000 / 3600))
    assert (facts["of_tokens"], facts["whole_corpus"]) == (1_000_000, False)
