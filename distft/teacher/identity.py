"""What a teacher cache is and where its pieces lie; torch-free, for plans and errors.

`teacher/<id>/IDENTITY.json` says whose cache it is, `parts/*.json` are committed sets of documents, `coverage/*.json` say which parts
hold a corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from distft.config.schema import Score
from distft.corpus.reader import Document
from distft.store.location import Location
from distft.store.manifest import Manifest, read_manifest
from distft.store.model_folder import ModelFolder

FORMAT = "distft-teacher-3"
IDENTITY = "IDENTITY.json"
READERS = 16
"""Parts that are asked for at once where each is a request to a server."""


def teacher_identity(folder: ModelFolder, score: Score, dtype: str) -> dict[str, Any]:
    """What makes two caches the same: the teacher's bytes, what ids mean, the precision it ran in, and what is kept."""
    return {
        "format": FORMAT,
        "weights": folder.weights_identity(),
        "vocabulary": folder.tokenizer_identity()["vocabulary"],
        "dtype": dtype,
        "distribution": score.distribution.model_dump(),
        "positions": score.positions,
    }


def teacher_folder(store: Location, identity: dict[str, Any]) -> Location:
    return store.child("teacher", Manifest(kind="teacher", identity=identity, files=()).id)


def documents_key(digests: Iterable[str]) -> str:
    """Names a set of documents, whatever their order and number of copies."""
    return hashlib.sha256("\n".join(sorted(set(digests))).encode()).hexdigest()[:16]


def scored_positions(document: Document, positions: str) -> npt.NDArray[np.uint32]:
    """Which tokens of a document the teacher is asked about. Never token 0, which nothing predicts."""
    if positions == "all":
        return np.arange(1, len(document.tokens), dtype=np.uint32)
    return np.flatnonzero(document.supervised).astype(np.uint32)


def held_documents(parts: Iterable[Manifest]) -> set[str]:
    """The documents that some part has a row of."""
    return {digest for part in parts for digest in part.facts["digests"]}


def quarantined_documents(parts: Iterable[Manifest]) -> dict[str, str]:
    """The documents that the teacher could not read, and why. One that another part has a row of is none of them."""
    listed = list(parts)
    held = held_documents(listed)
    found = {digest: reason for part in listed for digest, reason in part.facts.get("quarantined", {}).items()}
    return {digest: reason for digest, reason in found.items() if digest not in held}


def is_whole(coverage: Manifest) -> bool:
    """Whether a coverage speaks of a corpus without a quarantined document: one that can be trained on."""
    return not coverage.facts.get("quarantined")


def read_parts(folder: Location) -> list[Manifest]:
    """All committed parts, in name order. A cache may have thousands, so whoever has read them passes them on."""
    parts = folder.child("parts")
    names = parts.names()
    read = partial(read_manifest, parts)
    if not names or parts.local(names[0]) is not None:
        return [part for part in map(read, names) if part is not None]
    with ThreadPoolExecutor(min(READERS, len(names))) as pool:
        return [part for part in pool.map(read, names) if part is not None]
