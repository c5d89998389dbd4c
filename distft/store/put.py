"""Data files of an artifact that are not Arrow shards: written whole by somebody's function, hashed, and put under a unique name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from distft.errors import StoreError
from distft.store.digest import file_sha256
from distft.store.local import explained
from distft.store.location import Location
from distft.store.manifest import FileEntry


def put_file(
    folder: Location, stem: str, suffix: str, write: Callable[[Path], object], facts: dict[str, Any] | None = None
) -> FileEntry:
    """Lets `write` fill a scratch file, then moves or sends it to `data/STEM-UNIQUE.SUFFIX`. Nothing is left behind on failure."""
    name = f"data/{stem}-{uuid4().hex}.{suffix}"
    path = folder.scratch(name)
    try:
        fill(path, write)
        entry = FileEntry(name=name, size=path.stat().st_size, sha256=file_sha256(path), facts=facts or {})
        folder.upload(name, path)
    finally:
        path.unlink(missing_ok=True)
    return entry


def fill(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(path)`; what the disk refuses becomes a StoreError, whoever says it."""
    from safetensors import SafetensorError

    try:
        with explained("write", path):
            write(path)
    except SafetensorError as error:  # how safetensors tells of a full disk
        raise StoreError(
            f"{path} could not be written: {error}", where=str(path), help="Make room there, then run it again."
        ) from error
