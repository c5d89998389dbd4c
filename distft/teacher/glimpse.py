"""Some documents of a corpus as the teacher saw them, for whoever wants a picture in seconds and loads no torch.

A cache is made of files, and a file is read whole. So where all of them are too much, files are taken that lie evenly over the corpus,
and of these, documents that do.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distft.corpus.reader import Corpus, Document
from distft.errors import CorruptArtifactError
from distft.progress import track
from distft.store.location import Location
from distft.teacher.identity import read_parts, scored_positions
from distft.teacher.rows import rows
from distft.teacher.scores import Scores

SHOWN_FROM_BYTES = 4 << 20
"""From how much on reading has a progress bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glimpse:
    """Documents of a split with the teacher's word on their supervised tokens, in the split's order; a row that occurs twice does so
    here."""

    documents: list[tuple[Document, Scores]]
    held: int
    """How many rows of the split the cache holds."""
    rows: int
    """How many the split has."""


def glimpse(
    folder: Location, corpus: Corpus, staging: Path, *, positions: str, split: str = "train", documents: int, tokens: int, bytes: int
) -> Glimpse:  # fmt: skip
    """Reads all of the split that the cache in `folder` holds, or an even spread of about so many documents, supervised tokens and
    bytes of files at most. What is read is verified, and checked against the corpus."""
    digests = corpus.digests(split)
    parts = read_parts(folder)
    serves: dict[str, int] = {}
    for number, part in enumerate(parts):
        for digest in part.facts["digests"]:
            serves.setdefault(digest, number)
    held = [row for row, digest in enumerate(digests) if digest in serves]
    used = list(dict.fromkeys(serves[digests[row]] for row in held))
    sizes = {number: sum(entry.size for entry in parts[number].files) for number in used}
    total = sum(sizes.values())
    if total > bytes:
        used = [used[at] for at in spread(len(used), max(1, len(used) * bytes // total))]
    reachable = set(used)
    chosen = [row for row in held if serves[digests[row]] in reachable]
    supervised = int(corpus.supervised_counts(split)[chosen].sum()) if chosen else 0
    limit = min(documents, len(chosen) if supervised <= tokens else max(1, len(chosen) * tokens // supervised))
    chosen = [chosen[at] for at in spread(len(chosen), limit)]

    wanted = {digests[row] for row in chosen}
    found: dict[str, Scores] = {}
    entries = [entry for number in used for entry in parts[number].files]
    size = sum(entry.size for entry in entries)
    with track("tokens", size, "bytes") if size >= SHOWN_FROM_BYTES else nullcontext() as meter:
        for entry in entries:
            for row in rows(folder, entry, staging):
                if row.digest in wanted and row.digest not in found:
                    found[row.digest] = row.scores
            if meter is not None:
                meter.advance(entry.size)
    seen = [_checked(corpus.document(split, row), found, positions, folder) for row in chosen]
    return Glimpse(documents=seen, held=len(held), rows=len(digests))


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spread."""
    return list(range(count)) if count <= limit else [(2 * n + 1) * count // (2 * limit) for n in range(limit)]


def _checked(document: Document, found: dict[str, Scores], positions: str, folder: Location) -> tuple[Document, Scores]:
    scores = found.get(document.digest)
    if scores is None or not np.array_equal(scores.positions, scored_positions(document, positions)):
        problem = "is in no file of the part that lists it" if scores is None else "has a row that is about other tokens"
        raise CorruptArtifactError(
            f"Document {document.digest} {problem}.", where=folder.url, help="Run `distft cache verify` on it."
        )
    return document, scores.select(document.supervised[scores.positions.astype(np.int64)])
