"""Staged copies: verified, kept for the next run, and the oldest given up when the disk runs short."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path

import pytest

from distft.teacher import staging as room
from distft.teacher.staging import PLAIN, make_room
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
