"""Staged copies: verified, kept for the next run, and the oldest given up when the disk runs short."""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distft.errors import CorruptArtifactError, StoreError
from distft.store.digest import file_sha256
from distft.store.local import LocalLocation
from distft.store.lock import exclusively
from distft.store.manifest import FileEntry
from distft.store.shards import VERSION, VERSION_KEY
from distft.teacher import staging as room
from distft.teacher.cache import Places
from distft.teacher.encode import COLUMNS, SCHEMA, PlainShard, to_batch
from distft.teacher.identity import read_parts
from distft.teacher.rows import find_row, rows
from distft.teacher.scores import Scores
from distft.teacher.staging import PLAIN, SEAL, make_room, sweep
from tests.helpers.caches import only_cache
from tests.helpers.stores import Lab, lab, random_documents

Usage = namedtuple("Usage", "total used free")


def copies(made: Lab) -> set[Path]:
    return set(made.staging.glob(f"*{PLAIN}"))


def test_the_oldest_copies_go_when_the_disk_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab(tmp_path, documents=random_documents(40, seed=1))
    made.score()
    made.cache()
    mine = sorted(copies(made))
    assert len(mine) > 3
    for age, path in enumerate(mine):
        os.utime(path.with_name(path.name.replace(PLAIN, ".plain.seal")), (1000 - age, 1000 - age))
    free = iter([5, 5, 5, 50])
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(100, 0, next(free)))
    assert make_room(made.staging, mine[-1:]) == [mine[-2], mine[-3]], "oldest first, and none that is used"
    assert copies(made) == set(mine) - {mine[-2], mine[-3]}
    monkeypatch.undo()
    made.cache()
    assert copies(made) == set(mine), "what is wanted again is made again"


def test_what_a_process_has_mapped_lives_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab(tmp_path, documents=random_documents(10, seed=2))
    made.score()
    cache = made.cache()
    before = [cache.scores(document).ids.tolist() for document in made.corpus.documents("train")]
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(100, 99, 1))
    make_room(made.staging, [])
    assert copies(made) == set()
    assert [cache.scores(document).ids.tolist() for document in made.corpus.documents("train")] == before


def test_with_room_nothing_goes(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=random_documents(10, seed=2))
    made.score()
    made.cache()
    mine = copies(made)
    assert make_room(made.staging, []) == [] or not mine, "this disk is nearly full"


OLD = "0" * 64
"""A shard of an older run, by its sha256."""


def old_copy(staging: Path) -> Path:
    staging.mkdir(exist_ok=True)
    (staging / f"{OLD}.plain.seal").write_text("a seal")
    copy = staging / f"{OLD}{PLAIN}"
    copy.write_bytes(b"a copy")
    return copy


def scored(tmp_path: Path, documents: int = 40) -> Lab:
    made = lab(tmp_path, documents=random_documents(documents, seed=1))
    made.score()
    return made


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are as if elsewhere: nothing of theirs is a path here."""
    monkeypatch.setattr(LocalLocation, "local", lambda self, name: None)


def test_room_is_made_before_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scored(tmp_path)
    old = old_copy(made.staging)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(100, 0, 5 if old.exists() else 50))
    write, present = room._write, []
    monkeypatch.setattr(room, "_write", lambda *paths: (present.append(old.exists()), write(*paths))[1])
    made.cache()
    assert present
    assert not any(present)
    assert len(copies(made)) == len(present), "its own copies stay, however short the disk is"


@pytest.mark.parametrize("removable", [True, False])
def test_a_full_disk_is_tried_again_when_older_copies_have_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removable: bool
) -> None:
    """By a real ENOSPC, on a disk that says it has a tenth left, as one with a quota does."""
    made = scored(tmp_path, 6)
    old = old_copy(made.staging)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(100, 0, 50))
    sink = pa.OSFile
    monkeypatch.setattr(room.pa, "OSFile", lambda path, mode: sink("/dev/full" if old.exists() else path, mode))
    with exclusively(made.staging / f"{OLD}.plain.lock") if not removable else nullcontext():
        if removable:
            made.cache()
            assert not old.exists()
        else:
            with pytest.raises(StoreError, match="no space left"):
                made.cache()
            assert old.exists(), "another process is about to map it"


def test_nobody_removes_a_copy_between_staging_and_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scored(tmp_path)
    mapped, there = PlainShard.mapped, []

    def while_another_makes_room(path: Path, *, where: str) -> PlainShard:
        make_room(made.staging, [], share=1.0)
        there.append(path.exists())
        return mapped(path, where=where)

    monkeypatch.setattr(PlainShard, "mapped", while_another_makes_room)
    cache = made.cache()
    assert there
    assert all(there)
    assert len([cache.scores(document) for document in made.corpus.documents("train")]) == 40


@pytest.mark.parametrize("suffix", [PLAIN, SEAL])
def test_a_copy_that_vanishes_is_made_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    made = scored(tmp_path)
    mapped, gone = PlainShard.mapped, []

    def after_a_cleaner(path: Path, *, where: str) -> PlainShard:
        if path not in gone:
            gone.append(path)
            path.with_name(path.name.replace(PLAIN, suffix)).unlink()
        return mapped(path, where=where)

    monkeypatch.setattr(PlainShard, "mapped", after_a_cleaner)
    for _ in range(2):
        cache = made.cache()
        assert len([cache.scores(document) for document in made.corpus.documents("train")]) == 40
    assert copies(made) == set(gone)


def test_copies_are_known_without_reading_them_or_the_memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scored(tmp_path)
    made.cache()
    monkeypatch.setattr(room, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    made.cache()
    monkeypatch.undo()
    read: list[Path] = []
    monkeypatch.setattr(room, "file_sha256", lambda path: (read.append(path), file_sha256(path))[1])
    for copy in copies(made):
        copy.touch()
    made.cache()
    assert set(read) == copies(made), "what may have changed is read, and is as it was"
    made.cache()
    assert len(read) == len(copies(made))


def test_shards_are_staged_at_once_and_ranks_begin_at_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scored(tmp_path)
    names = [entry.sha256 for entry in made.cache().coverage.files]
    mine = copies(made)
    assert len(mine) > 3
    for path in mine:
        path.unlink()
    write, meeting = room._write, threading.Barrier(min(4, len(mine)), timeout=20)
    waited = iter(range(min(4, len(mine))))

    def together(*paths: Path) -> None:
        if next(waited, None) is not None:
            meeting.wait()
        write(*paths)

    monkeypatch.setattr(room, "_write", together)
    made.cache()
    assert copies(made) == mine
    monkeypatch.setattr(room, "THREADS", 1)
    for rank, first in ((0, 0), (1, len(names) // 2)):
        order: list[str] = []
        monkeypatch.setattr(
            room, "_staged", lambda _, entry, *rest, seen=order: (seen.append(entry.sha256), pytest.fail("seen"))[1]
        )
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(pytest.fail.Exception):
            made.cache()
        assert order[0] == names[first]


def test_an_error_in_one_shard_does_not_wait_for_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scored(tmp_path)
    monkeypatch.setattr(room, "THREADS", 1)
    tried: list[str] = []

    def broken(folder: object, entry: FileEntry, *rest: object) -> Path:
        tried.append(entry.sha256)
        time.sleep(0.2)
        raise CorruptArtifactError("broken")

    monkeypatch.setattr(room, "_staged", broken)
    with pytest.raises(CorruptArtifactError, match="broken"):
        made.cache()
    assert len(tried) == 1


@pytest.mark.usefixtures("remote")
def test_nothing_that_was_fetched_stays(tmp_path: Path) -> None:
    made = scored(tmp_path)
    folder = only_cache(made.store)
    parts = read_parts(folder)
    entries = [entry for part in parts for entry in part.files]
    assert sum(1 for entry in entries for _ in rows(folder, entry, made.staging)) == 40
    next(rows(folder, entries[0], made.staging))  # and no more
    digest = parts[0].facts["digests"][0]
    assert find_row(folder, digest, made.staging).digest == digest
    assert list((made.staging / "compressed").iterdir()) == []
    cache = made.cache()
    assert cache.scores(made.corpus.document("train", 3)) is not None
    assert list((made.staging / "compressed").iterdir()) == []


def test_a_local_stores_own_files_stay(tmp_path: Path) -> None:
    """Also in a store that lies below the staging folder."""
    made = scored(tmp_path)
    folder = only_cache(made.store)
    before = folder.names(recursive=True)
    for part in read_parts(folder):
        for entry in part.files:
            list(rows(folder, entry, tmp_path))
    made.cache()
    assert folder.names(recursive=True) == before


def test_what_killed_processes_left_goes_after_a_day(tmp_path: Path) -> None:
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    one, two, three, held = ("1" * 64, "2" * 64, "3" * 64, "4" * 64)
    unique = "a" * 32
    litter = [compressed / one, compressed / f"{one}.lock", compressed / f".{unique}", tmp_path / f"{one}{PLAIN}.{unique}",
              tmp_path / f"{one}.plain.lock", tmp_path / f".{unique}", tmp_path / f"{two}.lock"]  # fmt: skip
    kept = [tmp_path / f"{three}{PLAIN}", tmp_path / f"{three}.plain.seal", tmp_path / f"{three}.plain.lock", tmp_path / three,
            tmp_path / f"{three}.lock", compressed / held, tmp_path / f"{held}.plain.lock", tmp_path / "notes.txt"]  # fmt: skip
    for path in [*litter, *kept]:
        path.write_bytes(b"x")
    assert sweep(tmp_path) == [], "all of it may be in use"
    for path in [*litter, *kept]:
        os.utime(path, (1, 1))
    with exclusively(tmp_path / f"{held}.plain.lock"):
        sweep(tmp_path)
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(kept)


def test_making_room_takes_the_litter_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compressed").mkdir()
    left = tmp_path / "compressed" / OLD
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(100, 99, 1))
    assert make_room(tmp_path, []) == [left]


def no_tokens() -> Scores:
    columns: dict[str, Any] = {name: np.zeros(0, kind.to_pandas_dtype()) for name, kind in COLUMNS.items()}
    return Scores(**columns)


def test_a_document_costs_every_rank_a_few_bytes(tmp_path: Path) -> None:
    """Beyond what is mapped: its digest, shard and row."""
    documents, path = 64 * 100, tmp_path / "shard"
    metadata = {VERSION_KEY: VERSION}
    one = no_tokens()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA.with_metadata(metadata)) as out:
        for start in range(0, documents, 64):
            names = [f"{n * n:032x}" for n in range(start, start + 64)]
            out.write_batch(to_batch(names, [300] * 64, [one] * 64).replace_schema_metadata(metadata))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        shard = PlainShard.mapped(path, where="here")
        places = Places([shard])
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 40 * documents
    assert shard.read(100)[:2] == (f"{100 * 100:032x}", 300)
    assert places[f"{100 * 100:032x}"] == (0, 100)


def test_places_are_those_of_a_dictionary(tmp_path: Path) -> None:
    """Also of digests that end or begin with zeros; of a document that is there twice, the first place."""
    random = np.random.default_rng(0)
    names = [random.bytes(16).hex() for _ in range(500)] + ["00" * 16, "00" * 15 + "01", "01" + "00" * 15, "ff" * 16]
    none = no_tokens()

    def shard(digests: list[str]) -> PlainShard:
        return PlainShard(pa.Table.from_batches([to_batch(digests, [1] * len(digests), [none] * len(digests))]), where="here")

    shards = [shard(names[:200]), shard([]), shard(names[150:])]
    places, expected = Places(shards), {}
    for number, digests in enumerate((names[:200], [], names[150:])):
        for row, digest in enumerate(digests):
            expected.setdefault(digest, (number, row))
    assert dict(places) == expected
    assert len(places) == len(expected)
    assert all(digest not in places for digest in ("", "zz", "00", "ab" * 16, "00" * 14 + "0100", "00" * 17))
    assert places.absent([*names, "ab" * 16, "02" + "00" * 15]) == 2
    assert Places([]).absent(names[:3]) == 3
    with pytest.raises(CorruptArtifactError, match="32 hex digits"):
        Places([shard(["a"])])
