"""Shards on this machine's disk, as training reads them: verified, then written out of their stored form, once for all processes.

Copies stay for the next run. When the disk runs short, those that were used longest ago go; one that a process has mapped lives on
until that process ends. Whoever writes, maps or removes a shard's copy holds that shard's lock.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from threading import Event
from typing import TypeVar
from uuid import uuid4

import pyarrow as pa

from distft import ranks
from distft.errors import MissingArtifactError, StoreError
from distft.store.digest import file_sha256
from distft.store.local import explained, sync_file
from distft.store.location import Location
from distft.store.lock import exclusively
from distft.store.manifest import FileEntry, fetch
from distft.store.shards import open_shard, read_batches
from distft.teacher.encode import SCHEMA, PlainShard
from distft.teacher.planes import from_planes

T = TypeVar("T")

PLAIN, SEAL, LOCK, COMPRESSED = ".plain.arrow", ".plain.seal", ".plain.lock", "compressed"
FREE_SHARE = 0.1
"""Of the disk: what staging leaves to others, as far as it holds copies that nobody asked for just now."""
THREADS = 4
"""Shards that a machine's processes stage at once, together, and each at least one: a few batches in memory, and requests that do not
wait for one another."""
LITTER_SECONDS = 86_400.0
"""So long after the last write an unfinished file is one that its writer, killed since, has left."""

_UNFINISHED = re.compile(r"(\.|[0-9a-f]{64}\.plain\.arrow\.)[0-9a-f]{32}")
_LOCK = re.compile(r"([0-9a-f]{64})(\.plain)?\.lock")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def open_shards(folder: Location, entries: Sequence[FileEntry], staging: Path) -> list[PlainShard]:
    """All shards in their order, each staged and mapped before the next, a few at once. Ranks begin at different ones, so that those
    of a machine share the work instead of waiting for one another."""
    used = {_copy(entry, staging) for entry in entries}
    sweep(staging)
    first = ranks.rank() * len(entries) // ranks.size()
    order = [*range(first, len(entries)), *range(first)]
    failed = Event()

    def one(number: int) -> PlainShard:
        if failed.is_set():
            raise CancelledError  # told by the shard that failed, which began before this one
        try:
            return _mapped(folder, entries[number], staging, used)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max(1, THREADS // ranks.size())) as pool:
        shards = dict(zip(order, pool.map(one, order), strict=True))
    return [shards[number] for number in range(len(entries))]


def staged(folder: Location, entry: FileEntry, staging: Path) -> Path:
    """The shard, verified, then written uncompressed under its sha256. It may be removed as soon as somebody needs its room."""
    with _locked(entry, staging):
        return _staged(folder, entry, staging, {_copy(entry, staging)})


def stored_batches(folder: Location, entry: FileEntry, staging: Path) -> Iterator[pa.RecordBatch]:
    """The shard as it is stored, verified. What a remote store's file takes on this disk is given back as soon as it is mapped."""
    if folder.local(entry.name) is not None:
        yield from read_batches(fetch(folder, entry, staging / COMPRESSED))
        return

    def begin() -> tuple[pa.RecordBatch | None, Iterator[pa.RecordBatch]]:
        with _locked(entry, staging):
            try:
                batches = read_batches(_fetched(folder, entry, staging, ()))
                return next(batches, None), batches
            finally:
                _let_go(entry, staging)

    first, rest = _twice(begin)
    if first is not None:
        yield first
        yield from rest


def make_room(staging: Path, used: Collection[Path], *, share: float | None = None) -> list[Path]:
    """Removes copies while the disk has less than `share` (FREE_SHARE) left, those used longest ago first, and never one of `used` or
    one that is being written or mapped just now. Returns what it removed."""
    share = FREE_SHARE if share is None else share
    removed: list[Path] = []
    with suppress(OSError, StoreError):  # room is a courtesy; whoever needs it says so
        if _has_room(staging, share):
            return removed
        removed += sweep(staging, used)
        for path in sorted((path for path in staging.glob(f"*{PLAIN}") if path not in used), key=_last_used):
            if _has_room(staging, share):
                break
            lock = _beside(path, LOCK)
            with suppress(StoreError), exclusively(lock, wait=False) as free:
                if free:
                    for one in (_beside(path, SEAL), path, lock):
                        one.unlink(missing_ok=True)
                    removed.append(path)
    return removed


def sweep(staging: Path, used: Collection[Path] = ()) -> list[Path]:
    """Removes what killed processes left a day ago or more: unfinished files, stored forms that nobody needs once they are mapped, and
    the locks of shards that are gone."""
    removed: list[Path] = []
    kept = {path.name.removesuffix(PLAIN) for path in used}
    with suppress(OSError, StoreError):
        for folder in (staging, staging / COMPRESSED):
            for path in [Path(found) for found in os.scandir(folder)] if folder.is_dir() else []:
                with suppress(OSError, StoreError):
                    if time.time() - path.lstat().st_mtime >= LITTER_SECONDS and _swept(path, folder, kept):
                        removed.append(path)
    return removed


def _swept(path: Path, folder: Path, kept: Collection[str]) -> bool:
    """Removes an old file if it is litter; False where it is not, or in use."""
    if _UNFINISHED.fullmatch(path.name):
        path.unlink()
        return True
    named = _LOCK.fullmatch(path.name)
    if named is not None:
        copy = folder / f"{named[1]}{PLAIN if named[2] else ''}"
        with exclusively(path, wait=False) as free:
            gone = free and not copy.exists()
            if gone:
                path.unlink()
        return gone
    if folder.name == COMPRESSED and _DIGEST.fullmatch(path.name) and path.name not in kept:
        lock = folder.parent / f"{path.name}{LOCK}"
        with exclusively(lock, wait=False) as free:
            if free:
                path.unlink()
                if not _beside(lock, PLAIN).exists():
                    lock.unlink(missing_ok=True)
        return free
    return False


def _mapped(folder: Location, entry: FileEntry, staging: Path, used: Collection[Path]) -> PlainShard:
    """The shard, staged and mapped under one lock: nobody can remove it in between, and afterwards its map outlives its name."""

    def once() -> PlainShard:
        with _locked(entry, staging):
            return PlainShard.mapped(_staged(folder, entry, staging, used), where=folder.url)

    return _twice(once)


def _staged(folder: Location, entry: FileEntry, staging: Path, used: Collection[Path]) -> Path:
    """With the shard's lock held: between copy and seal, another would read the one with the wrong other."""
    target = _copy(entry, staging)
    seal = _beside(target, SEAL)
    if not _sealed(target, seal):
        make_room(staging, used)
        try:
            _with_room(lambda: _write(_fetched(folder, entry, staging, used), target, seal), staging, used)
        finally:
            if folder.local(entry.name) is None:
                _let_go(entry, staging)
    with suppress(OSError):
        os.utime(seal)  # when it was used last; the copy's own times are part of what it is known by
    return target


def _fetched(folder: Location, entry: FileEntry, staging: Path, used: Collection[Path]) -> Path:
    return _with_room(lambda: fetch(folder, entry, staging / COMPRESSED), staging, used)


def _let_go(entry: FileEntry, staging: Path) -> None:
    """Removes the stored form that was brought here, with its lock, unless another is about to use it."""
    lock = staging / COMPRESSED / f"{entry.sha256}.lock"
    with suppress(OSError, StoreError), exclusively(lock, wait=False) as free:
        if free:
            for path in (lock.with_suffix(""), lock):
                path.unlink(missing_ok=True)


def _with_room(write: Callable[[], T], staging: Path, used: Collection[Path]) -> T:
    """Tries once more on a full disk, when all that nobody uses has gone, here or by another thread: how much is missing, no disk or
    quota says."""
    try:
        return write()
    except StoreError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    make_room(staging, used, share=1.0)
    return write()


def _twice(attempt: Callable[[], T]) -> T:
    """Once more when a file is gone: the folder may be emptied at any time, and some mounts lock nothing."""
    try:
        return attempt()
    except MissingArtifactError:
        return attempt()


def _locked(entry: FileEntry, staging: Path) -> AbstractContextManager[bool]:
    return exclusively(staging / f"{entry.sha256}{LOCK}")


def _copy(entry: FileEntry, staging: Path) -> Path:
    return staging / f"{entry.sha256}{PLAIN}"


def _beside(path: Path, suffix: str) -> Path:
    """A shard's copy, seal or lock, by another of them."""
    return path.with_name(path.name.partition(".")[0] + suffix)


def _has_room(staging: Path, share: float) -> bool:
    usage = shutil.disk_usage(staging)
    return usage.free >= share * usage.total


def _last_used(path: Path) -> float:
    try:
        return _beside(path, SEAL).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sealed(target: Path, seal: Path) -> bool:
    """Whether the copy is as it was written: by the times of which its seal was made, else by its bytes."""
    try:
        digest, _, state = seal.read_text().partition(" ")
        before = _state(target)
        if state != before:
            if file_sha256(target) != digest or _state(target) != before:
                return False
            with suppress(OSError):  # another user's
                _seal(target, seal, digest)
    except (OSError, ValueError):
        return False
    return True


def _seal(target: Path, seal: Path, digest: str) -> None:
    """The copy's digest, and what tells that it is unchanged: nothing can be written to a file without its ctime changing."""
    partial = seal.with_name(f".{uuid4().hex}")
    try:
        partial.write_text(f"{digest} {_state(target)}")
        os.replace(partial, seal)
    finally:
        partial.unlink(missing_ok=True)


def _state(path: Path) -> str:
    seen = path.stat()
    return f"{seen.st_dev}:{seen.st_ino}:{seen.st_size}:{seen.st_mtime_ns}:{seen.st_ctime_ns}"


def _write(source: Path, target: Path, seal: Path) -> None:
    metadata = open_shard(source).schema.metadata
    partial = target.with_name(f"{target.name}.{uuid4().hex}")
    try:
        with (
            explained("write", target.parent),
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA.with_metadata(metadata)) as out,
        ):
            for batch in read_batches(source):
                out.write_batch(from_planes(batch, SCHEMA, where=str(source)).replace_schema_metadata(metadata))
        with explained("read", partial):
            sync_file(partial)  # or its times would outlive a power failure, and its bytes not
            digest = file_sha256(partial)
        with explained("write", target.parent):
            os.replace(partial, target)
            _seal(target, seal, digest)
    finally:
        partial.unlink(missing_ok=True)
