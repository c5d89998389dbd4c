"""What a run of `score` would pay for, said before it is paid: a new cache beside one that is nearly the same is seldom meant.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from distft.errors import MissingArtifactError, StaleArtifactError
from distft.progress import say
from distft.store.location import Location
from distft.store.manifest import read_manifest
from distft.store.nearest import nearest
from distft.teacher.identity import IDENTITY, held_documents, quarantined_documents, read_parts, teacher_folder


def before_scoring(store: Location, identity: dict[str, Any], wanted: Collection[str], *, reuse_only: bool) -> None:
    """Says in which fields the nearest cache differs, where none fits. With `reuse_only` it refuses what would have to be scored."""
    folder = teacher_folder(store, identity)
    if read_manifest(folder, IDENTITY) is None:
        other = nearest(store.child("teacher"), identity, IDENTITY)
        if reuse_only:
            raise StaleArtifactError(
                f"score.reuse_only is set, and no teacher cache fits this config. {other or 'The store has none.'}", where=store.url,
                help="Undo the change, or set score.reuse_only=false to score all documents anew.",
            )  # fmt: skip
        if other is not None:
            say(f"score: a new teacher cache begins, {folder.url}. {other}")
        return
    if reuse_only:
        parts = read_parts(folder)
        tried = held_documents(parts) | quarantined_documents(parts).keys()
        missing = sum(digest not in tried for digest in wanted)
        if missing:
            raise MissingArtifactError(
                f"score.reuse_only is set, and {missing:,} of {len(wanted):,} documents are not in the cache.", where=folder.url,
                help="Set score.reuse_only=false to score those, and no others.",
            )  # fmt: skip
