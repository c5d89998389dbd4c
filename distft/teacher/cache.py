"""The teacher cache as training reads it: by a document's digest, from files that were verified first.

Shards are compressed in the store; opening a cache writes each one uncompressed to local staging, once, from where documents are
memory-mapped. So random order costs a read, not the decoding of a batch, and memory does not grow with the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distft.corpus.reader import Corpus, Document
from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from distft.objectives.loss import SparseRows
from distft.objectives.treatment import Signals
from distft.store.location import Location
from distft.store.manifest import Manifest, read_manifest
from distft.store.nearest import nearest
from distft.store.shards import read_shard
from distft.teacher.encode import PlainShard
from distft.teacher.forward import Scores
from distft.teacher.identity import IDENTITY, documents_key, read_parts, scored_positions, teacher_folder
from distft.teacher.staging import make_room, staged


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """All documents of a corpus, as the teacher saw them."""

    folder: Location
    coverage: Manifest
    positions: str
    sampled: bool
    """Whether its distributions are draws, so that divergences from them are estimates."""
    shards: list[PlainShard]
    places: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, store: Location, identity: dict[str, Any], corpus: Corpus, staging: Path) -> TeacherCache:
        """Refuses a cache that does not hold every document of the corpus, or that another teacher made; says which it is."""
        folder = teacher_folder(store, identity)
        wanted = {digest for split in corpus.splits for digest in corpus.digests(split)}
        coverage = read_manifest(folder.child("coverage"), f"{documents_key(wanted)}.json")
        if coverage is None:
            raise _not_there(store, folder, identity, wanted)
        paths = [staged(folder, entry, staging) for entry in coverage.files]
        make_room(staging, paths)
        shards = [PlainShard(read_shard(path), where=folder.url) for path in paths]
        places: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(shards):
            for row, digest in enumerate(shard.digests):
                places.setdefault(digest, (number, row))
        absent = wanted - places.keys()
        if absent:
            raise CorruptArtifactError(
                f"{len(absent)} documents that the coverage promises are in none of its {len(shards)} shards.", where=folder.url,
                help="Remove the file under coverage/ and run `distft score` again.",
            )  # fmt: skip
        sampled = identity["distribution"]["kind"] == "sample"
        return cls(folder, coverage, identity["positions"], sampled, shards, places)

    def scores(self, document: Document) -> Scores:
        """The teacher's word on one document, checked against the document itself: a row that is about other tokens is corrupt."""
        number, row = self.places[document.digest]
        digest, tokens, scores = self.shards[number].read(row)
        expected = scored_positions(document, self.positions)
        if digest != document.digest or tokens != len(document.tokens) or not np.array_equal(scores.positions, expected):
            raise CorruptArtifactError(
                f"The row of document {document.digest} is about {digest}, {tokens} tokens, {len(scores.positions)} positions; "
                f"the document has {len(document.tokens)} tokens and {len(expected)} positions.", where=self.folder.url,
                help="Run `distft score` into a fresh store.",
            )  # fmt: skip
        return scores

    def supervised(self, document: Document) -> Scores:
        """The same for its supervised tokens alone."""
        scores = self.scores(document)
        return scores.select(document.supervised[scores.positions.astype(np.int64)])


def signals(scores: Scores) -> Signals:
    """The three scalars per token."""
    return Signals(label_logprob=scores.label_logprob, entropy=scores.entropy, rank=scores.rank)


def sparse_rows(scores: list[Scores]) -> SparseRows:
    """Distributions of consecutive documents, as the loss wants them: kept probabilities and tail sum to exactly 1 per token,
    which float16 log-probabilities alone do not."""
    counts_N = np.concatenate([s.counts for s in scores]).astype(np.int64)
    logprobs_M = np.concatenate([s.logprobs for s in scores]).astype(np.float32)
    tail_N = np.concatenate([s.tail for s in scores]).astype(np.float64)
    row_M = np.repeat(np.arange(len(counts_N)), counts_N)
    mass_N = np.bincount(row_M, weights=np.exp(logprobs_M.astype(np.float64)), minlength=len(counts_N)) + tail_N
    return SparseRows(
        ids_M=torch.from_numpy(np.concatenate([s.ids for s in scores]).astype(np.int64)),
        logprobs_M=torch.from_numpy((logprobs_M - np.log(mass_N)[row_M]).astype(np.float32)),
        counts_N=torch.from_numpy(counts_N),
        tail_N=torch.from_numpy((tail_N / mass_N).astype(np.float32)),
    )


def sampling_excess(scores: Scores) -> npt.NDArray[np.float64]:
    """By how much KL(w||p), w the shares of the draws, overstates KL(q||p) in expectation, per token: H(q) - H(w). Taking it off
    leaves an unbiased estimate, whatever p is."""
    row_M = np.repeat(np.arange(len(scores.counts)), scores.counts)
    logprobs_M = scores.logprobs.astype(np.float64)
    shares_M = np.exp(logprobs_M)
    shares_M /= np.bincount(row_M, weights=shares_M, minlength=len(scores.counts))[row_M]
    entropy_N = -np.bincount(row_M, weights=shares_M * np.log(shares_M), minlength=len(scores.counts))
    return scores.entropy.astype(np.float64) - entropy_N


def _not_there(store: Location, folder: Location, identity: dict[str, Any], wanted: set[str]) -> Exception:
    """Why there is nothing to train on: building, or made by another teacher or policy, or never begun."""
    if read_manifest(folder, IDENTITY) is not None:
        held = {digest for part in read_parts(folder) for digest in part.facts["digests"]}
        return MissingArtifactError(
            f"The teacher cache holds {len(wanted & held):,} of the corpus's {len(wanted):,} documents.", where=folder.url,
            help="Run `distft score` with this config; it reads the rest and nothing twice.",
        )  # fmt: skip
    other = nearest(store.child("teacher"), identity, IDENTITY)
    if other is None:
        return MissingArtifactError("There is no teacher cache in this store.", where=store.url,
                                    help="Run `distft score` with this config.")  # fmt: skip
    return StaleArtifactError(
        f"No teacher cache fits this config. {other}", where=folder.url,
        help="If the change is meant, run `distft score` with this config; else undo it.",
    )  # fmt: skip
