"""Data files of an artifact that are not Arrow shards: written whole by somebody's function, hashed, and put under a unique name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from distft.errors import StoreError
from distft.store.digest import file_sha256
from distft.store.local import explained
from distft.store.location import Location
from distft.store.manifest import FileEntry

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a function that hashes as it writes says of its file."""

    sha256: str
    facts: dict[str, Any]


def put_file(
    folder: Location, stem: str, suffix: str, write: Callable[[Path], object], facts: dict[str, Any] | None = None
) -> FileEntry:
    """Lets `write` fill a scratch file, then moves or sends it to `data/STEM-UNIQUE.SUFFIX`. Nothing is left behind on failure."""

    def hashed(path: Path) -> Written:
        fill(path, write)
        return Written(sha256=file_sha256(path), facts=facts or {})

    return _put(folder, stem, suffix, hashed)


def put_hashed(folder: Location, stem: str, suffix: str, write: Callable[[Path], Written]) -> FileEntry:
    """As `put_file`, of a file that is not read back: whoever writes it knows its digest."""
    return _put(folder, stem, suffix, lambda path: fill(path, write))


def _put(folder: Location, stem: str, suffix: str, make: Callable[[Path], Written]) -> FileEntry:
    name = f"data/{stem}-{uuid4().hex}.{suffix}"
    path = folder.scratch(name)
    try:
        made = make(path)
        entry = FileEntry(name=name, size=path.stat().st_size, sha256=made.sha256, facts=made.facts)
        folder.upload(name, path)
    finally:
        path.unlink(missing_ok=True)
    return entry


def fill(path: Path, write: Callable[[Path], T]) -> T:
    """What `write(path)` returns; what the disk refuses becomes a StoreError, whoever says it."""
    from safetensors import SafetensorError

    try:
        with explained("write", path):
            return write(path)
    except SafetensorError as error:  # how safetensors tells of a full disk
        raise StoreError(
            f"{path} could not be written: {error}", where=str(path), help="Make room there, then run it again."
        ) from error
