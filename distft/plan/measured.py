"""What need not be estimated: how much the teacher has to read, once there is a corpus, and what a token takes in the caches that are
there. Torch-free."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distft.corpus.reader import Corpus
from distft.errors import CorruptArtifactError
from distft.store.location import Location
from distft.store.manifest import read_manifest
from distft.teacher.catalogue import cache_folders, figures
from distft.teacher.identity import IDENTITY, teacher_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the teacher reads of a corpus: each document once, however many rows hold it."""

    digests: frozenset[str]
    tokens: int
    scored_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of the documents that are trained on."""

    tokens: int
    """Of one epoch."""
    longest: int
    share_rows: bool
    """Whether two of them can lie in one row, which is as wide as the longest document of a batch."""

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64]) -> Lengths:
        shortest = np.sort(lengths)[:2]
        longest = int(lengths.max(initial=0))
        return cls(tokens=int(lengths.sum()), longest=longest, share_rows=len(shortest) == 2 and int(shortest.sum()) <= longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """Bytes of a scored token in the cache, and how they are known."""

    amount: float
    basis: str
    """`estimated`, `measured on N documents`, or `cache ID`."""


def reading(corpus: Corpus, positions: str) -> Reading:
    sizes: dict[str, tuple[int, int]] = {}
    for split in corpus.splits:
        lengths = corpus.lengths(split)
        scored = lengths - 1 if positions == "all" else corpus.supervised_counts(split)  # nothing predicts token 0
        sizes.update(zip(corpus.digests(split), zip(lengths.tolist(), scored.tolist(), strict=True), strict=True))
    return Reading(
        digests=frozenset(sizes),
        tokens=sum(tokens for tokens, _ in sizes.values()),
        scored_tokens=sum(scored for _, scored in sizes.values()),
    )


def bytes_in_store(store: Location, identity: dict[str, Any]) -> TokenBytes | None:
    """Of this very cache, where it has parts; else of the one with the same policy that says most: first of the same teacher, then of
    most tokens. None where no cache has parts."""
    own = _figures(teacher_folder(store, identity))
    if own is not None:
        return own[1]
    found = []
    for folder in cache_folders(store):
        with suppress(CorruptArtifactError):  # `distft cache list` names it; a plan can do without
            other = read_manifest(folder, IDENTITY)
            if other is not None and _same_policy(other.identity, identity) and (told := _figures(folder)) is not None:
                found.append((other.identity.get("weights") == identity["weights"], *told))
    return max(found, key=lambda one: one[:2])[2] if found else None


def _figures(folder: Location) -> tuple[int, TokenBytes] | None:
    """Scored tokens of a cache, and what each takes."""
    told = figures(folder)
    if not told["scored_tokens"]:
        return None
    return told["scored_tokens"], TokenBytes(amount=told["bytes_per_token"], basis=f"cache {folder.url.rpartition('/')[2]}")


def _same_policy(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a token takes as much in both. A hidden state is as wide as its teacher, so that only the same one compares."""
    fields = ["format", "distribution", "positions"]
    if other["distribution"]["kind"] == "hidden":
        fields += ["weights", "dtype"]
    return all(one.get(field) == other[field] for field in fields)
