"""One part of a cache while it is written: what stands when another was first, and what is left when something goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.corpus.reader import Document
from distft.errors import StoreError
from distft.store.local import LocalLocation
from distft.store.location import Location
from distft.teacher import part
from distft.teacher.forward import score_documents
from distft.teacher.identity import documents_key, held_documents, quarantined_documents, read_parts
from distft.teacher.part import PartWriter, Row, next_name
from distft.teacher.prune import prune
from distft.teacher.scores import Scores
from tests.helpers.stores import loaded, random_documents, run_config, shared_model

DOCUMENTS = random_documents(6, seed=90)
NAME = documents_key(one.digest for one in DOCUMENTS)


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return LocalLocation(tmp_path / "cache")


@pytest.fixture(scope="module")
def scored() -> list[Row]:
    model = shared_model()
    places = [np.flatnonzero(one.supervised).astype(np.uint32) for one in DOCUMENTS]
    distribution = run_config(Path("unused"), model).score.distribution
    return list(zip(DOCUMENTS, score_documents(loaded(model), [d.tokens for d in DOCUMENTS], places, distribution), strict=True))


def written(folder: Location, rows: list[Row], quarantined: list[Document], name: str = NAME) -> bool:
    with PartWriter(folder, name) as writer:
        writer.add(rows)
        return writer.commit({one.digest: "out of memory" for one in quarantined}, {})


def data_files(folder: Location) -> list[str]:
    return folder.child("data").names()


def test_of_two_with_the_same_documents_the_first_stands(folder: Location, scored: list[tuple[Document, Scores]]) -> None:
    assert written(folder, scored, [])
    assert not written(folder, scored, [])
    assert not written(folder, scored[1:], DOCUMENTS[:1]), "one that read less adds nothing"
    assert (len(read_parts(folder)), len(data_files(folder))) == (1, 1)


def test_what_was_read_is_not_lost_to_one_who_could_not(folder: Location, scored: list[tuple[Document, Scores]]) -> None:
    """Two drivers at once, on machines of different memory: the smaller one was first."""
    assert written(folder, scored[2:], DOCUMENTS[:2])
    assert written(folder, scored, [])
    assert folder.child("parts").names() == [f"{NAME}-2.json", f"{NAME}.json"]
    assert held_documents(read_parts(folder)) == {one.digest for one in DOCUMENTS}
    assert not quarantined_documents(read_parts(folder))
    assert not written(folder, scored, []), "the second has all"
    assert len(data_files(folder)) == 2
    assert prune(folder, grace_seconds=0).files == {}


def test_names_of_further_parts() -> None:
    assert [next_name(NAME), next_name(f"{NAME}-2"), next_name(f"{NAME}-9")] == [f"{NAME}-2", f"{NAME}-3", f"{NAME}-10"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, StoreError])
def test_what_waits_is_not_written_when_it_is_thrown_away(
    folder: Location, scored: list[tuple[Document, Scores]], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is in the queue nor what is put together for a record batch."""
    encoded: list[Any] = []
    plain = PartWriter._write

    def write(self: PartWriter, rows: list[Row]) -> None:
        encoded.append(rows)
        plain(self, rows)

    monkeypatch.setattr(PartWriter, "_write", write)

    def stopped() -> None:
        with PartWriter(folder, NAME) as writer:
            writer.add(scored)
            raise error("stop")

    with pytest.raises(error):
        stopped()
    assert encoded == []
    assert folder.names(recursive=True) == []
    assert written(folder, scored, [])
    assert len(encoded) == 1


def test_data_whose_manifest_failed_stays_until_it_is_pruned(
    folder: Location, scored: list[tuple[Document, Scores]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(part, "commit", fail)
        with pytest.raises(StoreError, match="no answer"):
            written(folder, scored, [])
    assert (read_parts(folder), len(data_files(folder))) == ([], 1)
    assert len(prune(folder, grace_seconds=-1).files) == 1
