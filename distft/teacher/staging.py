"""Shards on this machine's disk, as training reads them: verified, then written out of their stored form, once for all processes."""

from __future__ import annotations

import os
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


def staged(folder: Location, entry: FileEntry, staging: Path) -> Path:
    """The shard, verified, then written uncompressed under its sha256, with the copy's own digest beside it. Of the ranks of a
    machine one does it while the others wait: between copy and digest, one would read the copy of another with the wrong seal."""
    target, seal = staging / f"{entry.sha256}.plain.arrow", staging / f"{entry.sha256}.plain.seal"
    with exclusively(staging / f"{entry.sha256}.plain.lock"):
        if not (target.exists() and seal.exists() and seal.read_text() == files_sha256([target])[target]):
            _write(fetch(folder, entry, staging / "compressed"), target, seal)
    return target


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
