"""Documents as record batches, and the count of what became of their rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distft.corpus.chat import Dropped, Encoded
from distft.corpus.files import Row
from distft.store.digest import document_digest

SUPERVISED, ANCHOR = 1, 2
"""Bits of a flag. An anchor is supervised. Digests do not know of anchors: the teacher's scores are the same with and without."""
SCHEMA = pa.schema(
    [
        ("digest", pa.string()),
        ("tokens", pa.list_(pa.uint32())),
        ("flags", pa.list_(pa.uint8())),
        ("file", pa.string()),
        ("row", pa.uint64()),
    ]
)

NAMES_KEPT = 20


@dataclass(slots=True)
class Tally:
    """What became of some rows."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    anchor_tokens: int = 0
    annotated: int = 0
    """Documents with an anchor."""
    longest: int = 0
    truncated: int = 0
    altered: int = 0
    """Documents in which the template rewrote or dropped a part of an assistant's content."""
    unended: int = 0
    """Documents with a supervised turn that no token ends."""
    dropped: int = 0
    dropped_names: list[str] = field(default_factory=list)
    shortest_prompt: int | None = None
    """Of the documents that were dropped because their prompt fills `max_tokens`."""

    def add(self, other: Tally) -> None:
        for name in ("rows", "documents", "tokens", "supervised_tokens", "anchor_tokens", "annotated", "truncated", "altered",
                     "unended", "dropped"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.dropped_names = (self.dropped_names + other.dropped_names)[:NAMES_KEPT]
        prompts = [prompt for prompt in (self.shortest_prompt, other.shortest_prompt) if prompt is not None]
        self.shortest_prompt = min(prompts, default=None)

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def tabulate(chunk: list[Row], results: list[Encoded | Dropped]) -> tuple[pa.RecordBatch, Tally]:
    """The documents of a chunk in the order of its rows; those that were dropped are in the tally alone."""
    tally = Tally(rows=len(chunk))
    kept: list[tuple[Row, Encoded]] = []
    for row, result in zip(chunk, results, strict=True):
        if isinstance(result, Dropped):
            names = [f"{row.name}:{row.number} ({result.reason})"]
            tally.add(Tally(dropped=1, dropped_names=names, shortest_prompt=result.prompt_tokens))
            continue
        kept.append((row, result))
        tally.add(
            Tally(
                documents=1,
                tokens=len(result.tokens),
                supervised_tokens=int(result.supervised.sum()),
                anchor_tokens=int(result.anchored.sum()),
                annotated=int(result.anchored.any()),
                longest=len(result.tokens),
                truncated=int(result.truncated),
                altered=int(result.altered),
                unended=int(result.unended),
            )
        )
    offsets = pa.array(np.cumsum([0, *(len(document.tokens) for _, document in kept)]), pa.int32())
    tokens = np.concatenate([np.empty(0, np.uint32), *(document.tokens for _, document in kept)])
    flags = np.concatenate([np.empty(0, np.uint8), *(_flags(document) for _, document in kept)])
    columns = [
        pa.array([document_digest(document.tokens, document.supervised) for _, document in kept], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(tokens, pa.uint32())),
        pa.ListArray.from_arrays(offsets, pa.array(flags, pa.uint8())),
        pa.array([row.name for row, _ in kept], pa.string()),
        pa.array([row.number for row, _ in kept], pa.uint64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA), tally


def _flags(document: Encoded) -> npt.NDArray[np.uint8]:
    return document.supervised * np.uint8(SUPERVISED) | document.anchored * np.uint8(ANCHOR)
