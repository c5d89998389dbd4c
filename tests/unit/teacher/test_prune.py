"""What goes and what must never go, on a disk and on S3."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distft.errors import CorruptArtifactError
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit
from distft.teacher import prune as module
from distft.teacher.identity import IDENTITY
from distft.teacher.prune import prune

HOUR = 3600.0


def put(folder: Location, name: str, data: bytes, tmp_path: Path) -> FileEntry:
    path = tmp_path / "scratch"
    path.write_bytes(data)
    folder.upload(name, path)
    return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def cache(store: Location, tmp_path: Path) -> Location:
    """A part, a coverage that alone names a file, and two files that nothing names."""
    folder = store.child("teacher", "a" * 16)
    commit(folder, Manifest(kind="teacher", identity={"a": 1}, files=()), IDENTITY)
    one, two = (put(folder, f"data/{name}.arrow", name.encode(), tmp_path) for name in ("part", "covered"))
    commit(folder, Manifest(kind="teacher-part", identity={"n": 1}, files=(one,)), "parts/one.json")
    commit(folder, Manifest(kind="teacher-coverage", identity={"n": 2}, files=(two,)), "coverage/two.json")
    for name in ("left", "lost"):
        put(folder, f"data/{name}.arrow", b"12345", tmp_path)
    return folder


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Lets the stores' clock run ahead."""
    ahead = SimpleNamespace(time=lambda: time.time() + seconds, sleep=time.sleep, monotonic=time.monotonic)
    monkeypatch.setattr("distft.store.local.time", ahead)
    monkeypatch.setattr("distft.store.s3.server_time", lambda reply: ahead.time())  # the server's, not this machine's


def test_nothing_young_goes(cache: Location) -> None:
    before = cache.names(recursive=True)
    done = prune(cache)
    assert done.files == {}
    assert done.young == {"data/left.arrow": 5, "data/lost.arrow": 5}
    assert cache.names(recursive=True) == before


def test_what_nothing_names_goes_after_the_grace(cache: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(cache.names(recursive=True))
    later(monkeypatch, 25 * HOUR)
    told = prune(cache, dry_run=True)
    assert told.files == {"data/left.arrow": 5, "data/lost.arrow": 5}
    assert set(cache.names(recursive=True)) == before
    assert prune(cache) == told
    assert before - set(cache.names(recursive=True)) == {"data/left.arrow", "data/lost.arrow"}
    assert prune(cache).files == {}


def test_each_file_has_its_own_age(cache: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ages = {"data/left.arrow": 23 * HOUR, "data/lost.arrow": 25 * HOUR}
    monkeypatch.setattr(type(cache), "age", lambda _, name: ages[name])
    assert list(prune(cache).files) == ["data/lost.arrow"]


def test_a_build_that_commits_while_this_runs_keeps_its_data(cache: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst moment: data has been listed, then its manifest appears. It is read after the listing, so it counts."""
    later(monkeypatch, 25 * HOUR)
    plain = module._named

    def committing(folder: Location) -> Any:
        entry = FileEntry(name="data/left.arrow", size=5, sha256="0" * 64)
        commit(folder, Manifest(kind="teacher-part", identity={"n": 3}, files=(entry,)), "parts/three.json")
        return plain(folder)

    monkeypatch.setattr(module, "_named", committing)
    assert list(prune(cache).files) == ["data/lost.arrow"]
    assert cache.exists("data/left.arrow")


@pytest.mark.parametrize("room", ["parts", "coverage", "elsewhere"])
def test_a_manifest_that_cannot_be_read_stops_everything(cache: Location, room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it names is not known: its data would look like nobody's."""
    later(monkeypatch, 25 * HOUR)
    cache.replace(f"{room}/damaged.json", b'{"format": "distft-manifest"')
    before = cache.names(recursive=True)
    with pytest.raises(CorruptArtifactError, match=r"Nothing was removed: .*damaged\.json"):
        prune(cache)
    assert cache.names(recursive=True) == before


def test_unfinished_files_go_after_the_grace(cache: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    folder: Any = cache
    grace = 24 * HOUR
    if cache.local("x") is None:
        folder._call("create_multipart_upload", Key=folder._key("data/torn"))
        grace = 0.0  # moto says that every upload began in 2010, a real server that this one began just now
    else:
        torn = cache.scratch("data/torn.arrow")
        torn.write_bytes(b"half")
        assert prune(cache).unfinished == []
        os.utime(torn, (time.time() - 25 * HOUR, time.time() - 25 * HOUR))
    told = prune(cache, grace_seconds=grace, dry_run=True).unfinished
    assert len(told) == 1
    assert prune(cache, grace_seconds=grace, dry_run=True).unfinished == told
    assert prune(cache, grace_seconds=grace).unfinished == told
    assert prune(cache, grace_seconds=grace).unfinished == []
