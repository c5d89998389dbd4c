"""What a cache says in sum: how sure its teacher was, and how much of its distribution was kept. One pass over the shards, of which
one record batch is in memory at a time. What grows with the cache is the names of its documents: in its parts' manifests, and a set of
those that were seen, so that each counts once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distft.errors import MissingArtifactError
from distft.progress import track
from distft.store.location import Location
from distft.store.manifest import read_manifest
from distft.teacher.head_file import WORDS, head_bytes
from distft.teacher.identity import IDENTITY, quarantined_documents, read_parts
from distft.teacher.rows import rows
from distft.teacher.scores import Scores

PERPLEXITY_EDGES = (1.0, 1.05, 1.25, 1.5, 2.0, 2.5, 4.0, 8.0, 16.0, 64.0, 256.0, 1024.0, math.inf)
ENTROPY_EDGES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, math.inf)
"""A bin holds its lower edge. Finer where teachers mostly are: sure."""
MASS_STEPS = 10_000
"""The percentile of the kept mass is exact to one of so many steps."""


@dataclass(slots=True, kw_only=True)
class Statistics:
    """Sums over tokens. `tau` is the perplexity above which `stm` masks a token, by the very comparison that it makes."""

    tau: float
    documents: int = 0
    tokens: int = 0
    scored: int = 0
    entries: int = 0
    words: int = 0
    """Of hidden states, 16 bits each."""
    above: int = 0
    first_choice: int = 0
    nll: float = 0.0
    entropy: float = 0.0
    mass: float = 0.0
    perplexities: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(PERPLEXITY_EDGES) - 1, np.int64))
    entropies: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(ENTROPY_EDGES) - 1, np.int64))
    masses: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(MASS_STEPS + 1, np.int64))

    def add(self, tokens: int, scores: Scores) -> None:
        """One document."""
        mass_N = np.clip(1.0 - scores.tail.astype(np.float64), 0.0, 1.0)
        self.documents += 1
        self.tokens += tokens
        self.scored += len(scores.positions)
        self.entries += len(scores.ids)
        self.words += len(scores.hidden)
        self.above += int((scores.label_logprob < -math.log(self.tau)).sum())
        self.first_choice += int((scores.rank == 0).sum())
        self.nll -= float(scores.label_logprob.sum(dtype=np.float64))
        self.entropy += float(scores.entropy.sum(dtype=np.float64))
        self.mass += float(mass_N.sum())
        self.perplexities += _histogram(np.exp(-scores.label_logprob.astype(np.float64)), PERPLEXITY_EDGES)
        self.entropies += _histogram(scores.entropy.astype(np.float64), ENTROPY_EDGES)
        self.masses += np.bincount((mass_N * MASS_STEPS).astype(np.int64), minlength=MASS_STEPS + 1)

    def facts(self) -> dict[str, Any]:
        """As `--json` prints them. The last edge of a histogram is null: no end."""
        count = max(1, self.scored)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "scored_tokens": self.scored,
            "entries_per_token": self.entries / count,
            "mean_nll": self.nll / count,
            "mean_entropy": self.entropy / count,
            "first_choice_share": self.first_choice / count,
            "perplexity": {"edges": _open(PERPLEXITY_EDGES), "counts": self.perplexities.tolist()},
            "entropy": {"edges": _open(ENTROPY_EDGES), "counts": self.entropies.tolist()},
            "mass_kept": {"mean": self.mass / count, "p5": self._percentile(0.05)},
            "tau": self.tau,
            "share_above_tau": self.above / count,
        }

    def _percentile(self, share: float) -> float:
        """The mass that all but this share of the tokens keep at least, rounded down."""
        return int(np.searchsorted(np.cumsum(self.masses), share * self.scored, side="right").clip(0, MASS_STEPS)) / MASS_STEPS


def cache_statistics(folder: Location, staging: Path, *, tau: float) -> dict[str, Any]:
    """Of every document of the committed parts, once. `bytes` are those of the files, also of rows that are there twice, and of the
    teacher's head where hidden states are kept, which is no token's; `quarantined` are the documents that the teacher could not read,
    and why."""
    parts = read_parts(folder)
    entries = {entry.name: entry for part in parts for entry in part.files}
    size = sum(entry.size for entry in entries.values())
    if not entries:
        raise MissingArtifactError("The cache holds no document yet.", where=folder.url,
                                   help="Run `distft score` with the run file that it belongs to.")  # fmt: skip
    found, seen = Statistics(tau=tau), set[str]()
    with track("show", size, "bytes") as meter:
        for entry in entries.values():
            for row in rows(folder, entry, staging):
                if row.digest not in seen:
                    seen.add(row.digest)
                    found.add(row.tokens, row.scores)
            meter.advance(entry.size)
    manifest, head = read_manifest(folder, IDENTITY), head_bytes(folder)
    width = found.words // max(1, found.scored) // WORDS[manifest.identity["dtype"]] if manifest and found.words else None
    stored = sum(part.facts["scored_tokens"] for part in parts)
    return {
        **found.facts(), "hidden_width": width, "bytes": size + head, "head_bytes": head, "bytes_per_token": size / max(1, stored),
        "document_ids": sorted(seen)[:100], "quarantined": quarantined_documents(parts),
    }  # fmt: skip


def _histogram(values: npt.NDArray[np.float64], edges: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """Counts per bin; what rounding puts below the first edge counts in the first bin."""
    bins = np.searchsorted(edges[1:-1], values, side="right")
    return np.bincount(bins, minlength=len(edges) - 1)


def _open(edges: tuple[float, ...]) -> list[float | None]:
    return [edge if math.isfinite(edge) else None for edge in edges]
