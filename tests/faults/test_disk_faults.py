"""Disks that are full, read-only, or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distft.errors import DistftError, MissingArtifactError, StoreError
from distft.store.location import Location, open_location
from distft.store.manifest import read_manifest
from distft.store.shards import ShardWriter
from tests.helpers.kill import REAL, SCHEMA, batch, build


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own; skips where this user may not mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def everything_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_full_disk_leaves_nothing_that_is_not_whole(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        store = open_location(str(disk))
        with pytest.raises(StoreError, match="no space left") as told:
            build(store, 1_000_000)
        assert "Free some space" in told.value.help
        assert everything_below(disk) == []
        with pytest.raises(StoreError, match="no space left"):
            store.create("large", bytes(2 << 20))
        with pytest.raises(StoreError, match="no space left"):
            store.replace("large", bytes(2 << 20))
        (tmp_path / "large").write_bytes(bytes(2 << 20))
        with pytest.raises(StoreError, match="no space left"):
            store.upload("large", tmp_path / "large")
        assert everything_below(disk) == []
        assert build(store, 10, 10) == read_manifest(store), "with space again, the same store goes on"


def test_upload_from_another_file_system_copies(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        (tmp_path / "file").write_bytes(b"payload")
        store = open_location(str(disk))
        store.upload("data/file", tmp_path / "file")
        assert store.read("data/file") == b"payload"
        assert everything_below(disk) == [disk / "data" / "file"]


@pytest.mark.parametrize("call", ["write", "fsync", "link", "open"])
def test_no_space_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The same as on a full disk, at each single call in turn, for machines where none can be mounted."""
    nth = 0
    for nth in range(1, 100):
        seen = 0

        def full(*args: Any, nth: int = nth, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return REAL[call](*args, **kwargs)

        folder = tmp_path / str(nth)
        store = open_location(str(folder))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            problem = _problem_of(lambda store=store: build(store, 10, 10))
        if problem is None:
            assert seen < nth, "an error was swallowed"
            break
        assert "no space left" in problem
        assert [path for path in everything_below(folder) if path.name.startswith(".")] == []
        assert all(path.stat().st_size > 0 for path in everything_below(folder))
        manifest = read_manifest(store)
        assert manifest is None or len(manifest.files) == 2
    assert nth > 3


def _problem_of(work: Callable[[], object]) -> str | None:
    try:
        work()
    except StoreError as told:
        return told.problem
    return None


def _writes(store: Location, source: Path) -> list[Callable[[], object]]:
    return [
        store.check_writable, lambda: store.create("a/b", b"x"), lambda: store.replace("a/b", b"x"),
        lambda: store.upload("a/b", source), lambda: build(store, 1, 1),
    ]  # fmt: skip


def _refused(store: Location, source: Path, says: str) -> None:
    source.write_bytes(b"x")
    for write in _writes(store, source):
        with pytest.raises(StoreError, match=says) as told:
            write()
        assert told.value.help
        assert told.value.where


def test_a_read_only_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        store = open_location(str(disk))
        _refused(store, tmp_path / "source", "read-only")
        assert store.names() == []


def test_a_store_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for below in ("file", "file/store"):
        store = open_location(str(tmp_path / below))
        _refused(store, tmp_path / "source", "a file stands where a folder should be")
        assert not store.exists("x")
        with pytest.raises(MissingArtifactError):
            store.read("x")


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> Any:  # permission bits do not bind root, who runs tests in containers
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    _refused(open_location(str(tmp_path)), tmp_path / "source", "permission denied")


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    with pytest.raises(StoreError) as told:
        open_location(str(tmp_path)).check_writable()
    assert "hard links" in told.value.help
    assert everything_below(tmp_path) == []


def test_an_exception_in_a_writer_leaves_nothing(tmp_path: Path) -> None:
    store = open_location(str(tmp_path))
    writer = ShardWriter(store, "x", SCHEMA)

    def stopped() -> None:
        with writer:
            writer.write(batch(1))
            raise DistftError("stop")

    with pytest.raises(DistftError, match="stop"):
        stopped()
    assert everything_below(tmp_path) == []
    assert not hasattr(writer, "entry")
