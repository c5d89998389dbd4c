"""Shards on this machine's disk, as training reads them: verified, then written out of their stored form, once for all processes.

Copies stay for the next run. When the disk runs short, those that were used longest ago go; one that a process has mapped lives on
until that process ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pyarrow as pa

from distft.store.digest import file_sha256, files_sha256
from distft.store.local import exclusively, explained
from distft.store.location import Location
from distft.store.manifest import FileEntry, fetch
from distft.store.shards import open_shard, read_batches
from distft.teacher.encode import SCHEMA
from distft.teacher.planes import from_planes

PLAIN = ".plain.arrow"
FREE_SHARE = 0.1
"""Of the disk: what staging leaves to others, as far as it holds copies that nobody asked for just now."""


def staged(folder: Location, entry: FileEntry, staging: Path) -> Path:
    """The shard, verified, then written uncompressed under its sha256, with the copy's own digest beside it. Of the ranks of a
    machine one does it while the others wait: between copy and digest, one would read the copy of another with the wrong seal."""
    target, seal = staging / f"{entry.sha256}{PLAIN}", staging / f"{entry.sha256}.plain.seal"
    with exclusively(staging / f"{entry.sha256}.plain.lock"):
        if not (target.exists() and seal.exists() and seal.read_text() == files_sha256([target])[target]):
            source = fetch(folder, entry, staging / "compressed")
            _write(source, target, seal)
            if source.is_relative_to(staging):  # brought here from S3, and of no more use
                source.unlink(missing_ok=True)
        with suppress(OSError):
            os.utime(seal)  # when it was used last; the copy's own times are part of what it is known by
    return target


def make_room(staging: Path, used: Collection[Path]) -> list[Path]:
    """Removes copies while the disk has less than FREE_SHARE left, those used longest ago first, and never one of `used`."""
    removed: list[Path] = []
    with suppress(OSError):  # room is a courtesy; whoever needs it says so
        copies = [path for path in staging.glob(f"*{PLAIN}") if path not in used]
        for path in sorted(copies, key=_last_used):
            usage = shutil.disk_usage(staging)
            if usage.free >= FREE_SHARE * usage.total:
                break
            for one in (path.with_name(path.name.replace(PLAIN, ".plain.seal")), path):
                one.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _last_used(path: Path) -> float:
    try:
        return path.with_name(path.name.replace(PLAIN, ".plain.seal")).stat().st_mtime
    except FileNotFoundError:
        return 0.0


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
        digest = file_sha256(partial)
        with explained("write", target.parent):
            os.replace(partial, target)
            seal.write_text(digest)
    finally:
        partial.unlink(missing_ok=True)
