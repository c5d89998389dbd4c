"""What a list of caches says, and which cache a person means."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError, UserInputError
from distft.store.location import open_location
from distft.store.manifest import Manifest, commit
from distft.teacher.catalogue import cache_folders, find_cache, list_caches
from distft.teacher.identity import IDENTITY
from distft.teacher.tell import list_text
from tests.helpers.stores import Lab, lab, random_documents, write_corpus

DOCUMENTS, HELDOUT = random_documents(20, seed=61), random_documents(4, seed=62)


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    made = lab(tmp_path, documents=DOCUMENTS, heldout=HELDOUT)
    made.score()
    return made


def test_a_cache_in_figures(made: Lab) -> None:
    [entry] = list_caches(made.store)
    cache = made.cache()
    scores = [cache.scores(one) for one in (*DOCUMENTS, *HELDOUT)]
    assert entry["cache"] == cache.folder.url
    assert entry["cache"].endswith(f"/teacher/{entry['id']}")
    assert (entry["documents"], entry["tokens"]) == (24, sum(len(one) for one in (*DOCUMENTS, *HELDOUT)))
    assert (entry["scored_tokens"], entry["entries"]) == (sum(len(s.positions) for s in scores), sum(len(s.ids) for s in scores))
    size = sum(path.stat().st_size for path in (made.folder / "store" / "teacher").rglob("*.arrow"))
    assert (entry["bytes"], entry["bytes_per_token"]) == (size, size / entry["scored_tokens"])
    assert entry["teacher"] == {key: made.identity()[key] for key in ("weights", "vocabulary", "dtype")}
    assert entry["policy"] == {key: made.identity()[key] for key in ("distribution", "positions")}
    assert (entry["corpora_covered"], entry["runs"], entry["problem"]) == (1, [], None)
    assert 0 <= entry["age_seconds"] < 600
    assert abs(time.mktime(time.strptime(entry["created"], "%Y-%m-%dT%H:%M:%SZ")) - time.timezone - time.time()) < 600
    assert max(len(line) for line in list_text({"store": "x", "caches": [entry]}).splitlines()) <= 100


def test_which_runs_used_a_cache(made: Lab) -> None:
    """Those that were trained against it, and those whose drift was measured with it; not the runs of another policy."""
    short = {"max_steps": 1, "warmup_steps": 0}
    made.changed(train=short).train()
    plain = Lab(made.folder, made.run.model_copy(update={"name": "plain"}), made.model, made.corpus)
    plain = plain.changed(objective={"kind": "sft"}, train=short)
    plain.train()
    other = made.changed(score={"distribution": {"kind": "none"}}, objective={"kind": "stm", "tau": 1e9}, train=short)
    other = replace(other, run=other.run.model_copy(update={"name": "masked"}))
    assert [entry["runs"] for entry in list_caches(made.store)] == [["plain", "run"]]
    other.score()
    other.train()
    (made.store.child("runs", "hurt")).create("config.yaml", b"{")
    found = {entry["policy"]["distribution"]["kind"]: entry["runs"] for entry in list_caches(made.store)}
    assert found == {"topk": ["plain", "run"], "none": ["masked"]}


def test_growth_adds_up_and_a_second_corpus_is_covered(made: Lab) -> None:
    grown = replace(made, corpus=write_corpus(made.store, made.staging, train=[*DOCUMENTS, *random_documents(3, seed=63)]))
    grown.score()
    [entry] = list_caches(made.store)
    assert (entry["documents"], entry["corpora_covered"]) == (27, 2)


def test_a_damaged_cache_does_not_hide_the_others(made: Lab) -> None:
    folder = Path(made.cache().folder.url)
    shutil.copytree(folder, folder.with_name("0" * 16))
    part = next((folder.with_name("0" * 16) / "parts").iterdir())
    part.write_bytes(part.read_bytes().replace(b'"tokens": ', b'"tokens": 1'))
    (folder.with_name("f" * 16)).mkdir()
    found = {entry["id"]: entry for entry in list_caches(made.store)}
    assert len(found) == 3
    assert found[folder.name]["problem"] is None
    assert part.name in found["0" * 16]["problem"]
    assert IDENTITY in found["f" * 16]["problem"]
    text = list_text({"store": "x", "caches": [*found.values()]})
    assert text.count("PROBLEM") == text.count("cannot be read") == 2
    assert [one.url.rpartition("/")[2] for one in cache_folders(made.store)] == ["0" * 16, folder.name]


def test_an_empty_store(tmp_path: Path) -> None:
    assert list_caches(open_location(str(tmp_path / "nothing"))) == []
    assert "no teacher cache" in list_text({"store": "x", "caches": []})


def test_a_cache_by_its_place_and_by_its_id(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made.cache().folder
    name = folder.url.rpartition("/")[2]
    monkeypatch.chdir(made.folder)
    for text in (folder.url, f"store/teacher/{name}/", name, name[:3]):
        found = find_cache(text, "./store")
        assert (found.folder, found.id, found.store) == (folder, name, made.store)
    shutil.copytree(folder.url, made.folder / "copy")
    assert find_cache("./copy", "./elsewhere").store is None


def test_a_cache_that_is_not_one(made: Lab) -> None:
    folder, store = Path(made.cache().folder.url), made.store.url
    for text, problem in ((store, "no teacher cache in this folder"), ("abc0", f"begins with abc0. Caches here: {folder.name}")):
        with pytest.raises(MissingArtifactError, match=problem):
            find_cache(text, store)
    with pytest.raises(MissingArtifactError, match="Caches here: none"):
        find_cache("abc0", f"{store}-elsewhere")
    shutil.copytree(folder, folder.with_name(folder.name[:-1] + "x"))
    with pytest.raises(UserInputError, match="2 caches begin with"):
        find_cache(folder.name[:4], store)


def test_another_format_or_kind_is_refused(made: Lab) -> None:
    teachers = made.store.child("teacher")
    commit(teachers.child("1" * 16), Manifest(kind="teacher", identity={"format": "distft-teacher-1"}, files=()), IDENTITY)
    commit(teachers.child("2" * 16), Manifest(kind="corpus", identity={"format": "distft-teacher-2"}, files=()), IDENTITY)
    with pytest.raises(StaleArtifactError, match="distft-teacher-1"):
        find_cache("1" * 16, made.store.url)
    with pytest.raises(CorruptArtifactError, match="A corpus where a teacher cache should be"):
        find_cache("2" * 16, made.store.url)
    problems = {entry["id"][0]: entry["problem"] for entry in list_caches(made.store) if entry["id"][0] in "12"}
    assert "distft-teacher-1" in problems["1"]
    assert json.dumps(list_caches(made.store))
