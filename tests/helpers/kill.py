"""Builds an artifact again and again, and dies by SIGKILL at another place each time.

    python -m tests.helpers.kill local FOLDER | s3 S3_URL

Places are the calls that change what is stored: `os.*` on a disk, requests on S3; before each, after each, and within each write.
Attempt n works in `FOLDER/n`. A process is forked per attempt; its parent has neither threads nor connections.
Prints a JSON list of the places, the last of which is "finished".
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from distft.store.location import Location, open_location
from distft.store.manifest import Manifest, commit
from distft.store.shards import ShardWriter

SCHEMA = pa.schema([("token", pa.uint32())])
IDENTITY = {"made by": "the kill harness"}


def build(store: Location, *rows: int) -> Manifest:
    """A shard of two batches for each number of `rows`, and a manifest."""
    entries = []
    for shard, count in enumerate(rows):
        with ShardWriter(store, f"part-{shard}", SCHEMA, compression=None) as writer:
            for _ in range(2):
                writer.write(batch(count))
        entries.append(writer.entry)
    return commit(store, Manifest(kind="corpus", identity=IDENTITY, files=tuple(entries)))


def batch(rows: int) -> pa.RecordBatch:
    return pa.record_batch({"token": pa.array(np.arange(rows, dtype=np.uint32))}, schema=SCHEMA)


class Fate:
    """Dies at the `target`-th place that is passed."""

    def __init__(self, target: int, pipe: int) -> None:
        self.target, self.pipe, self.passed = target, pipe, 0

    def at(self, place: str) -> None:
        self.passed += 1
        if self.passed == self.target:
            REAL["write"](self.pipe, place.encode())
            os.kill(os.getpid(), signal.SIGKILL)


REAL: dict[str, Callable[..., Any]] = {
    name: getattr(os, name) for name in ("open", "write", "fsync", "link", "replace", "unlink", "mkdir")
}


def patch_os(fate: Fate) -> None:
    def patched(name: str, *args: Any, **kwargs: Any) -> Any:
        fate.at(f"before {name}")
        if name == "write":  # torn: half of it arrives
            descriptor, data = args
            half = len(data) // 2
            written = REAL["write"](descriptor, data[:half]) if half else 0
            fate.at("within write")
            return written + REAL["write"](descriptor, data[half:])
        result = REAL[name](*args, **kwargs)
        fate.at(f"after {name}")
        return result

    for name in REAL:
        setattr(os, name, functools.partial(patched, name))


def patch_s3(fate: Fate) -> None:
    from distft.store import s3

    s3.PART_BYTES = 5 << 20
    s3.TRANSFERS = 1
    real = s3.S3Location._call

    def patched(self: s3.S3Location, method: str, **request: Any) -> dict[str, Any]:
        fate.at(f"before {method}")
        result = real(self, method, **request)
        fate.at(f"after {method}")
        return result

    s3.S3Location._call = patched


def main(kind: str, place: str) -> None:
    batch(1)  # what is imported lazily is imported here, once, and not in every child
    if kind == "s3":
        import s3fs  # noqa: F401
    rows = (10, 10) if kind == "local" else (10, 700_000)
    places: list[str] = []
    while not places or places[-1] != "finished":
        attempt = len(places)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            store = open_location(f"{place}/{attempt}")
            (patch_os if kind == "local" else patch_s3)(Fate(attempt + 1, writer))
            build(store, *rows)
            REAL["write"](writer, b"finished")
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader) as told:
            where = told.read()
        if not where or (os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL):
            raise SystemExit(f"attempt {attempt} ended by itself: status {status}")
        places.append(where)
    sys.stdout.write(json.dumps(places))


if __name__ == "__main__":
    main(*sys.argv[1:])
