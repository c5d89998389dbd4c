"""A writer that is killed anywhere leaves a whole artifact or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft.store.location import Location, open_location
from distft.store.manifest import fetch, read_manifest, verify_files
from distft.store.shards import read_shard
from tests.helpers.kill import REAL, build

REPOSITORY = Path(__file__).parents[2]


def killed_everywhere(kind: str, url: str) -> list[str]:
    command = [sys.executable, "-m", "tests.helpers.kill", kind, url]
    done = subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_what_is_left(store: Location, finished: bool, staging: Path) -> bool:
    """Whether an artifact is committed; every file that has its final name is whole either way."""
    for name in store.names(recursive=True):
        if name.endswith(".arrow"):
            path = store.local(name)
            if path is None:
                staging.mkdir(exist_ok=True)
                path = staging / name.rpartition("/")[2]
                store.download(name, path)
            assert read_shard(path).num_rows > 0
        else:
            assert name == "MANIFEST.json"
    manifest = read_manifest(store)
    if manifest is not None:
        verify_files(store, manifest)
        assert len(manifest.files) == 2
    assert manifest is not None or not finished
    return manifest is not None


def test_killed_at_every_step_on_a_disk(tmp_path: Path) -> None:
    places = killed_everywhere("local", str(tmp_path))
    for place in ("open", "write", "fsync", "link", "unlink", "mkdir"):
        assert {f"before {place}", "within write" if place == "write" else f"after {place}"} <= set(places)
    assert len(places) > 60
    left = []
    for attempt, place in enumerate(places):
        store = open_location(f"{tmp_path}/{attempt}")
        left.append(check_what_is_left(store, place == "finished", tmp_path / "staging"))
        again = build(store, 10, 10)  # the same command goes on in the same place
        verify_files(store, again)
        for entry in again.files:
            assert read_shard(fetch(store, entry, tmp_path)).num_rows == 20
        store.sweep(older_than_seconds=0)
        assert [path for path in (tmp_path / str(attempt)).rglob("*") if path.name.startswith(".")] == []
    assert left.index(True) > 50, "the manifest is the last thing that is written"
    assert all(left[left.index(True) :])


def test_killed_at_every_request_on_s3(s3_url: str, tmp_path: Path) -> None:
    places = killed_everywhere("s3", s3_url)
    for request in ("put_object", "create_multipart_upload", "upload_part", "complete_multipart_upload"):
        assert {f"before {request}", f"after {request}"} <= set(places)
    left = [
        check_what_is_left(open_location(f"{s3_url}/{attempt}"), place == "finished", tmp_path / str(attempt))
        for attempt, place in enumerate(places)
    ]
    assert [place for place, whole in zip(places, left, strict=True) if whole] == ["after put_object", "finished"]
    store = open_location(f"{s3_url}/{places.index('before complete_multipart_upload')}")
    verify_files(store, build(store, 10, 10))


def test_nothing_is_named_before_it_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL leaves the page cache alone, a power cut does not: so the order of fsyncs is checked by itself."""
    dirty: set[int] = set()  # inodes of files and folders with changes that a power cut would undo
    named: list[str] = []

    def patched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = REAL[name](*args, **kwargs)
            if name == "write":
                dirty.add(os.fstat(args[0]).st_ino)
            elif name == "fsync":
                dirty.discard(os.fstat(args[0]).st_ino)
            elif name == "mkdir":
                dirty.add(Path(args[0]).parent.stat().st_ino)
            elif name in ("link", "replace"):
                target = Path(args[1])
                assert target.stat().st_ino not in dirty, f"{target} was named before its bytes were durable"
                if target.name == "MANIFEST.json":
                    assert not dirty, "the manifest was named before all that it names was durable"
                dirty.add(target.parent.stat().st_ino)
                named.append(target.name)
            return result

        return call

    for name in REAL:
        monkeypatch.setattr(os, name, patched(name))
    store = open_location(str(tmp_path / "new" / "store"))
    build(store, 10, 10)
    assert not dirty
    store.replace("log", b"line")
    assert not dirty
    assert [name.split("-")[0] for name in named] == ["part", "part", "MANIFEST.json", "log"]
