"""What is stated of a corpus, by drivers that do not know of each other: a whole coverage is there to stay."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distft.store.local import LocalLocation
from distft.store.location import Location
from distft.store.manifest import Manifest, read_manifest
from distft.teacher import coverage
from distft.teacher.coverage import commit_coverage, read_coverage
from distft.teacher.identity import READERS, documents_key, is_whole, read_parts

WANTED = {"a": ("train", 0), "b": ("train", 1), "c": ("train", 2)}
STATED = f"{documents_key(WANTED)}.json"


def put(folder: Location, name: str, digests: str, quarantined: str = "") -> None:
    """A part of these documents, each a letter, without data."""
    facts = {
        "digests": list(digests), "quarantined": dict.fromkeys(quarantined, "out of memory"), "tokens": 0, "scored_tokens": 0,
        "entries": 0,
    }  # fmt: skip
    identity = {"documents": documents_key([*digests, *quarantined]), "teacher": "x"}
    assert folder.create(f"parts/{name}.json", Manifest(kind="teacher-part", identity=identity, files=(), facts=facts).to_json())


def stated(folder: Location) -> Manifest:
    found = read_manifest(folder.child("coverage"), STATED)
    assert found is not None
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return LocalLocation(tmp_path)


def test_a_whole_coverage_is_not_replaced_by_an_older_survey(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "one", "a", "bc")
    old = read_parts(folder)
    put(folder, "two", "bc")  # another driver, which had more memory
    assert not commit_coverage(folder, WANTED).quarantined
    monkeypatch.setattr(LocalLocation, "replace", lambda *_: pytest.fail("a whole coverage was replaced"))
    found = commit_coverage(folder, WANTED, old)
    assert (found.quarantined, found.held) == ({}, set(WANTED))
    assert is_whole(stated(folder))


def test_one_who_was_beaten_to_the_first_statement_says_what_stands(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "one", "a", "bc")
    old, plain = read_parts(folder), coverage.commit

    def late(*args: Any) -> Manifest:
        monkeypatch.setattr(coverage, "commit", plain)
        put(folder, "two", "bc")
        commit_coverage(folder, WANTED)
        return plain(*args)

    monkeypatch.setattr(coverage, "commit", late)
    assert not commit_coverage(folder, WANTED, old).quarantined
    assert is_whole(stated(folder))


def test_a_whole_coverage_survives_between_a_look_and_a_write(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "one", "a", "bc")
    assert commit_coverage(folder, WANTED).quarantined.keys() == {"b", "c"}
    put(folder, "two", "b")
    plain = LocalLocation.replace

    def late(self: LocalLocation, name: str, data: bytes) -> None:
        monkeypatch.setattr(LocalLocation, "replace", plain)
        put(folder, "three", "c")
        assert not commit_coverage(folder, WANTED).quarantined
        plain(self, name, data)

    monkeypatch.setattr(LocalLocation, "replace", late)
    assert not commit_coverage(folder, WANTED).quarantined
    assert is_whole(stated(folder))


def test_a_better_survey_replaces_and_the_same_one_does_not(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "one", "a", "bc")
    commit_coverage(folder, WANTED)
    put(folder, "two", "b")
    assert commit_coverage(folder, WANTED).quarantined.keys() == stated(folder).facts["quarantined"].keys() == {"c"}
    monkeypatch.setattr(LocalLocation, "replace", lambda *_: pytest.fail("there is nothing new to say"))
    assert commit_coverage(folder, WANTED).quarantined.keys() == {"c"}
    assert read_coverage(folder, WANTED) is None


def test_parts_that_were_read_are_not_read_again(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "one", "abc")
    parts = read_parts(folder)
    monkeypatch.setattr(coverage, "read_parts", lambda _: pytest.fail("they are read again"))
    assert commit_coverage(folder, WANTED, parts).held == set(WANTED)


class Far(LocalLocation):
    """As a server: each file is a request that takes a while."""

    at_once, most = 0, 0
    lock = threading.Lock()

    def child(self, *names: str) -> Far:
        return Far(super().child(*names).folder)

    def local(self, name: str) -> None:
        return None

    def read(self, name: str) -> bytes:
        with Far.lock:
            Far.at_once += 1
            Far.most = max(Far.most, Far.at_once)
        time.sleep(0.01 * (1 + hash(name) % 3))
        with Far.lock:
            Far.at_once -= 1
        return super().read(name)


def test_parts_of_a_far_store_are_asked_for_at_once(folder: Location, tmp_path: Path) -> None:
    for number in range(40):
        put(folder, f"{number:02}", f"{number:02}")
    assert [part.identity for part in read_parts(Far(tmp_path))] == [part.identity for part in read_parts(folder)]
    assert 4 < Far.most <= READERS
