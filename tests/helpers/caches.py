"""Teacher caches made on purpose: half there; or sound in every byte, and wrong, or twice there, in what their rows say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.store.location import Location
from distft.store.manifest import Manifest, commit, read_manifest
from distft.store.shards import ShardWriter
from distft.teacher import part as writing
from distft.teacher.encode import SCHEMA, to_batch
from distft.teacher.forward import Scores
from distft.teacher.identity import documents_key, read_parts
from distft.teacher.planes import stored_schema, to_planes
from distft.teacher.rows import Row, rows

Change = Callable[[Row], Row]


def only_cache(store: Location) -> Location:
    """The folder of a store's one cache."""
    [name] = store.child("teacher").folders()
    return store.child("teacher", name)


class Killed(BaseException):
    """Stands for a process that is no more."""


@contextmanager
def killed_after(parts: int) -> Iterator[list[Manifest]]:
    """Kills the build within, which must live so long, when it would commit one part more than these; yields those it committed."""
    plain, committed = writing.commit, list[Manifest]()

    def commit(folder: Location, manifest: Manifest, name: str) -> Manifest:
        if manifest.kind == "teacher-part":
            if len(committed) == parts:
                raise Killed
            committed.append(manifest)
        return plain(folder, manifest, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "commit", commit)
        with pytest.raises(Killed):
            yield committed


def rewrite(folder: Location, staging: Path, change: Change, *, every: bool = False) -> str:
    """Puts the rows of the first part anew, or of `every` one, all changed, in files and manifests that are sound in themselves. The
    coverage, which names the old files, goes. Returns the name of the last part that was changed."""
    names = folder.child("parts").names()
    for name in names if every else names[:1]:
        part = read_manifest(folder.child("parts"), name)
        assert part is not None
        changed = [change(row) for entry in part.files for row in rows(folder, entry, staging)]
        folder.replace(f"parts/{name}", replace(part, files=(_written(folder, changed),)).to_json())
    for coverage in folder.child("coverage").names():
        folder.delete(f"coverage/{coverage}")
    return f"parts/{names[-1 if every else 0]}"


def join_two_parts(folder: Location, staging: Path) -> None:
    """A third part with all documents of the first two, as two builders that raced would leave it."""
    parts = read_parts(folder)[:2]
    both = [row for part in parts for entry in part.files for row in rows(folder, entry, staging)]
    digests = [row.digest for row in both]
    facts: dict[str, Any] = {key: sum(part.facts[key] for part in parts) for key in ("tokens", "scored_tokens", "entries")}
    identity = {**parts[0].identity, "documents": documents_key(digests)}
    joined = Manifest(
        kind="teacher-part", identity=identity, files=(_written(folder, both),), facts={**facts, "digests": digests}
    )
    commit(folder, joined, f"parts/{identity['documents']}.json")


def changed(**columns: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A change of whole columns of a row."""

    def change(row: Row) -> Row:
        given = {f.name: getattr(row.scores, f.name) for f in fields(Scores)}
        return replace(row, scores=Scores(**{**given, **{name: to(given[name]) for name, to in columns.items()}}))

    return change


def _written(folder: Location, made: list[Row]) -> Any:
    with ShardWriter(folder, "made-on-purpose", stored_schema(SCHEMA)) as writer:
        writer.write(
            to_planes(to_batch([row.digest for row in made], [row.tokens for row in made], [row.scores for row in made]))
        )
    return writer.entry
