"""Damage that verify finds and names, from a flipped byte to a row about other tokens."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distft.corpus.reader import Document
from distft.errors import CorruptArtifactError
from distft.store.manifest import read_manifest
from distft.teacher.catalogue import find_cache
from distft.teacher.rows import Documents, rows
from distft.teacher.verify import row_problems, verify_cache
from tests.helpers.caches import Change, changed, only_cache, rewrite
from tests.helpers.stores import Lab, lab, random_documents

DOCUMENTS = random_documents(24, seed=64, shortest=6)


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    made = lab(tmp_path, documents=DOCUMENTS, heldout=random_documents(4, seed=65))
    made.score()
    return made


def verify(made: Lab, *, with_corpus: bool = True) -> dict[str, object]:
    cache = find_cache(str(_folder(made)), "")
    return verify_cache(cache, Documents(made.store if with_corpus else None, made.staging), made.staging / "verify")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """For tests that only read."""
    made = lab(tmp_path_factory.mktemp("unchanged"), documents=DOCUMENTS)
    made.score()
    return made


def _folder(made: Lab) -> Path:
    [folder] = (made.folder / "store" / "teacher").iterdir()
    return folder


def refused(made: Lab, *told: str, with_corpus: bool = True) -> str:
    with pytest.raises(CorruptArtifactError) as caught:
        verify(made, with_corpus=with_corpus)
    for part in told:
        assert part in caught.value.problem
    assert "distft score" in caught.value.help
    return caught.value.problem


def altered(made: Lab, change: Change) -> str:
    return rewrite(only_cache(made.store), made.staging, change)


def test_a_sound_cache(made: Lab) -> None:
    found = verify(made)
    files = list(_folder(made).rglob("*.arrow"))
    assert (found["files"], found["bytes"]) == (len(files), sum(path.stat().st_size for path in files))
    assert (found["documents"], found["compared_with_corpus"], found["corpora_covered"]) == (28, 28, 1)
    assert found["scored_tokens"] == sum(
        int(d.supervised.sum()) for split in ("train", "heldout") for d in made.corpus.documents(split)
    )
    assert verify(made, with_corpus=False)["compared_with_corpus"] == 0
    assert not list((made.staging / "verify").iterdir())


@pytest.mark.parametrize("policy", [{"kind": "none"}, {"kind": "topk", "k": 4, "min_prob": 0.0}, {"kind": "sample", "draws": 7}])
@pytest.mark.parametrize("positions", ["supervised", "all"])
def test_a_sound_cache_of_another_policy(tmp_path: Path, policy: dict[str, object], positions: str) -> None:
    made = lab(tmp_path, documents=DOCUMENTS, score={"distribution": policy, "positions": positions})
    made.score()
    assert verify(made)["compared_with_corpus"] == 24


@pytest.mark.parametrize("place", [0, 700, -1])
def test_a_flipped_byte_is_named(made: Lab, place: int) -> None:
    path = sorted((_folder(made) / "data").iterdir())[3]
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    told = refused(made, "1 problem in", f"data/{path.name}: sha256 ")
    assert told.count("data/") == 1


def test_all_damage_is_told_at_once(made: Lab) -> None:
    missing, cut, *_ = sorted((_folder(made) / "data").iterdir())
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    refused(made, "2 problems", f"data/{missing.name}: missing", f"data/{cut.name}: {cut.stat().st_size} bytes, not ")


def test_a_damaged_manifest_is_named(made: Lab) -> None:
    path = next((_folder(made) / "parts").iterdir())
    path.write_bytes(path.read_bytes().replace(b'"scored_tokens": ', b'"scored_tokens": 1'))
    refused(made, f"parts/{path.name}", "its own sha256 does not fit")


def test_a_lost_part_is_missed_by_the_coverage(made: Lab) -> None:
    next((_folder(made) / "parts").iterdir()).unlink()
    refused(made, "coverage/", "which no part names")


def test_a_coverage_that_promises_too_much(made: Lab) -> None:
    folder = find_cache(str(_folder(made)), "").folder
    [name] = folder.child("coverage").names()
    old = read_manifest(folder.child("coverage"), name)
    assert old is not None
    folder.replace(f"coverage/{name}", replace(old, files=old.files[1:]).to_json())
    refused(made, f"coverage/{name}: ", "documents are in none of its files")
    refused(made, f"coverage/{name}: ", "documents are in none of its files", with_corpus=False)


def test_a_foreign_part_and_a_renamed_folder_are_named(made: Lab) -> None:
    folder = _folder(made)
    shutil.move(folder, folder.with_name("0" * 16))
    refused(made, f"it is of cache {folder.name}, and lies in a folder of another name")


def test_the_repair_that_the_message_names_works(made: Lab) -> None:
    path = sorted((_folder(made) / "data").iterdir())[0]
    path.write_bytes(b"x")
    refused(made, path.name)
    for manifest in (_folder(made) / "parts").iterdir():
        if path.name.encode() in manifest.read_bytes():
            manifest.unlink()
    for coverage in (_folder(made) / "coverage").iterdir():
        coverage.unlink()
    assert 0 < made.score().documents_scored < 28
    assert verify(made)["documents"] == 28


# --- rows that are whole, and wrong ----------------------------------------------------------------------------------


def test_a_row_of_another_digest_is_found(made: Lab) -> None:
    name = altered(made, lambda row: replace(row, digest="0" * 32))
    refused(made, f"{name}: row 0 is of document {'0' * 32}, and the manifest lists ", with_corpus=False)


def test_counts_that_differ_from_the_manifest_are_found(made: Lab) -> None:
    refused(made, altered(made, lambda row: replace(row, tokens=row.tokens + 1)), "tokens in its files, and", with_corpus=False)


def test_positions_of_other_tokens_are_found_beside_the_corpus(made: Lab) -> None:
    """Shifted by one, the row is sound in itself where there is room."""
    name = altered(made, lambda row: replace(changed(positions=lambda p: p + 1)(row), tokens=row.tokens + 1))
    refused(made, f"{name}: document ", "or others")


def test_labels_of_other_tokens_are_found_beside_the_corpus(tmp_path: Path) -> None:
    """Positions are right, the labels' column is shifted by one: what was kept of the label gives it away."""
    made = lab(tmp_path, documents=DOCUMENTS, score={"distribution": {"kind": "topk", "k": 280, "min_prob": 0.0}})
    made.score()
    name = altered(made, changed(label_logprob=lambda x: np.roll(x, 1)))
    refused(made, f"{name}: document ", "the row is about other tokens")
    verify(made, with_corpus=False)


def test_a_label_that_was_not_kept_cannot_be_likely(made: Lab) -> None:
    refused(made, altered(made, changed(label_logprob=lambda x: x * 0)), "the row is about other tokens")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed(label_logprob=lambda x: x + 40), "a label's log-probability"),
        (changed(label_logprob=lambda x: x * np.float32(np.nan)), "a label's log-probability"),
        (changed(entropy=lambda x: -x - 1), "an entropy"),
        (changed(tail=lambda x: x + 2), "a tail"),
        (changed(tail=lambda x: x * 0), "do not sum to 1"),
        (changed(ids=lambda x: x[::-1]), "ids do not ascend"),
        (changed(logprobs=lambda x: x + np.float16(9)), "a kept log-probability"),
        (changed(logprobs=lambda x: x - np.float16(1)), "do not sum to 1"),
        (changed(positions=lambda x: x * 0), "positions do not ascend"),
        (changed(positions=lambda x: x + 1000), "positions do not ascend"),
    ],
)
def test_what_cannot_be_true_of_a_row(unchanged: Lab, change: Change, problem: str) -> None:
    made = unchanged
    folder = find_cache(str(_folder(made)), "").folder
    name = folder.child("parts").names()[0]
    part = read_manifest(folder.child("parts"), name)
    assert part is not None
    row = next(iter(rows(folder, part.files[0], made.staging)))
    document: Document | None = Documents(made.store, made.staging).get(row.digest)
    assert document is not None
    assert row_problems(row, document, made.identity()) == []
    assert any(problem in told for told in row_problems(change(row), document, made.identity()))
