"""Removes what no manifest names: data that was written by a build which died before it could commit it, or lost a race.

A running build has such data too, for the moment between a data file and its manifest. So nothing younger than a grace period goes,
and the order is what makes it safe: files are listed first, manifests read after that, and ages count to the listing. What a manifest
names by then stays, and what none names has been unnamed for the whole period. Manifests are never removed. Torch-free.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.store.location import Location
from distft.store.manifest import read_manifest

GRACE_SECONDS = 86_400.0
DATA = "data/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What was removed from one cache, or would be."""

    files: dict[str, int]
    """Data files that no manifest names, and their bytes."""
    unfinished: list[str]
    """What killed writers left under temporary names."""
    young: dict[str, int]
    """Unnamed data files that stay, because a running build may be about to name them."""


def prune(folder: Location, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False) -> Pruned:
    """Refuses to remove anything while a manifest of the cache cannot be read: what it names is not known then."""
    began = time.monotonic()
    data = [name for name in folder.names(recursive=True) if name.startswith(DATA)]
    named = _named(folder)
    files: dict[str, int] = {}
    young: dict[str, int] = {}
    for name in data:
        if name in named:
            continue
        try:
            age, size = folder.age(name) - (time.monotonic() - began), folder.size(name)
        except MissingArtifactError:  # its own builder, or another cleaner, was first
            continue
        if age < grace_seconds:
            young[name] = size
            continue
        files[name] = size
        if not dry_run:
            folder.delete(name)
    return Pruned(files=files, unfinished=folder.sweep(grace_seconds, dry_run=dry_run), young=young)


def _named(folder: Location) -> set[str]:
    """Every file that any manifest of the cache names. Whatever is not data has to be a manifest; none is passed over."""
    found: set[str] = set()
    for name in folder.names(recursive=True):
        if name.startswith(DATA):
            continue
        try:
            manifest = read_manifest(folder, name)
        except CorruptArtifactError as error:
            raise CorruptArtifactError(f"Nothing was removed: {error.problem}", where=error.where, help=error.help) from error
        if manifest is None:  # no part of distft removes manifests: a listing with another's bytes would cost data
            raise CorruptArtifactError(f"Nothing was removed: {name} was listed and is not there.", where=folder.url,
                                       help="Run it again.")  # fmt: skip
        found |= {entry.name for entry in manifest.files}
    return found
