"""What a teacher cache says, as one digest: equal for two caches exactly when every document has the same in every column."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from distft.store.location import Location
from distft.store.manifest import read_manifest, verify_files
from distft.teacher.identity import documents_key, read_parts
from distft.teacher.prune import prune
from distft.teacher.rows import Row, rows


@dataclass(frozen=True)
class Contents:
    """A committed cache, read whole."""

    digest: str
    """sha256 over the sorted documents with all their columns, and the sorted documents of each coverage."""
    documents: Counter[str]
    """How often each is in a part. More than once is waste and not damage, as long as all say the same."""
    coverages: int


def contents(folder: Location, staging: Path) -> Contents:
    """Reads every part and every coverage; fails where a byte, a row or a promise is not as it should be."""
    documents: Counter[str] = Counter()
    columns: dict[str, bytes] = {}
    by_file: dict[str, list[str]] = {}
    for part in read_parts(folder):
        verify_files(folder, part)
        found = {row.digest: _columns(row) for entry in part.files for row in rows(folder, entry, staging)}
        assert set(found) == set(part.facts["digests"]), "a part holds what it says, and nothing else"
        assert part.facts.get("quarantined") or documents_key(found) == part.identity["documents"]
        by_file |= {entry.name: list(found) for entry in part.files}
        documents.update(found.keys())
        for digest, value in found.items():
            assert columns.setdefault(digest, value) == value, f"document {digest} is there twice and not the same"
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(name.encode() + columns[name])
    coverages = folder.child("coverage").names()
    for name in sorted(coverages):
        manifest = read_manifest(folder.child("coverage"), name)
        assert manifest is not None
        covered = {one for entry in manifest.files for one in by_file[entry.name]}
        assert manifest.facts["documents"] <= len(covered)
        digest.update("\n".join([name, manifest.identity["documents"], *sorted(covered)]).encode())
    return Contents(digest.hexdigest(), documents, len(coverages))


def nothing_left_over(folder: Location) -> bool:
    """Whether what `prune` takes, without a grace period, is all that no manifest names."""
    prune(folder, grace_seconds=-60)  # as if a minute had passed: servers tell the age of a file to the second
    named = {entry.name for part in read_parts(folder) for entry in part.files}
    return {f"data/{name}" for name in folder.child("data").names()} == named and folder.sweep(-60, dry_run=True) == []


def _columns(row: Row) -> bytes:
    digest = hashlib.sha256(str(row.tokens).encode())
    for field in sorted(fields(row.scores), key=lambda field: field.name):
        value = np.asarray(getattr(row.scores, field.name))
        digest.update(f"{field.name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return digest.digest()
