"""The teacher cache as training reads it: by a document's digest, from files that were verified first.

Shards are compressed in the store; opening a cache writes each one uncompressed to local staging, once, from where documents are
memory-mapped. So random order costs a read, not the decoding of a batch, and memory does not grow with what the teacher said. It grows
by 24 bytes for each document and rank, for where it is, and by a few for its batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distft.corpus.reader import Corpus, Document
from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from distft.objectives.distributions import DenseHead, DenseRows, SparseRows
from distft.objectives.treatment import Signals
from distft.store.location import Location
from distft.store.manifest import Manifest, read_manifest
from distft.store.nearest import nearest
from distft.teacher.coverage import how_to_exclude, places_of, quarantine_text, quarantined_rows
from distft.teacher.encode import PlainShard
from distft.teacher.head_copy import dense_rows, read_head
from distft.teacher.identity import (
    IDENTITY,
    documents_key,
    held_documents,
    is_whole,
    read_parts,
    scored_positions,
    teacher_folder,
)
from distft.teacher.scores import Scores
from distft.teacher.staging import open_shards


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """All documents of a corpus, as the teacher saw them."""

    folder: Location
    coverage: Manifest
    positions: str
    sampled: bool
    """Whether its distributions are draws, so that divergences from them are estimates."""
    shards: list[PlainShard]
    places: Mapping[str, tuple[int, int]]
    """Shard and row of each document."""
    head: DenseHead | None
    """The teacher's output head, where hidden states are kept."""

    @classmethod
    def open(
        cls, store: Location, identity: dict[str, Any], corpus: Corpus, staging: Path, *, limit: int | None = None
    ) -> TeacherCache:
        """Refuses a cache that does not hold every document of the corpus, or that another teacher made; says which it is. `limit` is
        the run file's `score.limit`, which may be why documents are missing."""
        folder = teacher_folder(store, identity)
        corpus_places = places_of(corpus)
        wanted = set(corpus_places)
        coverage = read_manifest(folder.child("coverage"), f"{documents_key(wanted)}.json")
        if coverage is None:
            raise _not_there(store, folder, identity, wanted, limit)
        if not is_whole(coverage):
            rows = quarantined_rows(coverage.facts["quarantined"], corpus_places, corpus)
            raise MissingArtifactError(
                f"The teacher could not read {len(rows):,} of the corpus's {len(wanted):,} documents:\n{quarantine_text(rows)}",
                where=f"{rows[0]['file']}:{rows[0]['row']}", help=how_to_exclude(rows, corpus),
            )  # fmt: skip
        shards = open_shards(folder, coverage.files, staging)
        places = Places(shards)
        absent = places.absent(wanted)
        if absent:
            raise CorruptArtifactError(
                f"{absent} documents that the coverage promises are in none of its {len(shards)} shards.", where=folder.url,
                help="Remove the file under coverage/ and run `distft score` again.",
            )  # fmt: skip
        kind = identity["distribution"]["kind"]
        head = read_head(folder, staging) if kind == "hidden" else None
        return cls(folder, coverage, identity["positions"], kind == "sample", shards, places, head)

    def scores(self, document: Document) -> Scores:
        """The teacher's word on one document, checked against the document itself: a row that is about other tokens is corrupt, and so
        is one with a NaN or an infinity, which would come out as weights or masks before it came out as a loss."""
        number, row = self.places[document.digest]
        digest, tokens, scores = self.shards[number].read(row)
        expected = scored_positions(document, self.positions)
        if digest != document.digest or tokens != len(document.tokens) or not np.array_equal(scores.positions, expected):
            raise CorruptArtifactError(
                f"The row of document {document.digest} is about {digest}, {tokens} tokens, {len(scores.positions)} positions; "
                f"the document has {len(document.tokens)} tokens and {len(expected)} positions.", where=self.folder.url,
                help="Run `distft score` into a fresh store.",
            )  # fmt: skip
        wrong = not_finite(scores, torch.float32 if self.head is None else self.head.weight_VT.dtype)
        if wrong:
            raise CorruptArtifactError(
                f"What the teacher is said to think of document {digest} holds a NaN or an infinity: {', '.join(wrong)}.",
                where=f"{document.file}:{document.row}, in {self.folder.url}",
                help="Nothing was trained on it. Run `distft score` into a fresh store; if that comes out the same, leave the "
                f"document out: add {digest[:12]} to data.exclude.",
            )  # fmt: skip
        return scores

    def rows(self, scores: list[Scores]) -> SparseRows | DenseRows:
        """The distributions of consecutive documents, as the loss wants them."""
        return sparse_rows(scores) if self.head is None else dense_rows(scores, self.head)

    def supervised(self, document: Document) -> Scores:
        """The same for its supervised tokens alone."""
        scores = self.scores(document)
        return scores.select(document.supervised[scores.positions.astype(np.int64)])


class Places(Mapping[str, tuple[int, int]]):
    """Shard and row by digest, where a document that is in several shards is in the first: sorted arrays, 24 bytes for a document."""

    def __init__(self, shards: Sequence[PlainShard]) -> None:
        raw = [_binary(shard.digests(), shard.where) for shard in shards]
        every_N = np.concatenate([np.empty(0, _BINARY), *raw])
        order_N = np.argsort(every_N, kind="stable")
        sorted_N = every_N[order_N]
        first_N = np.ones(len(sorted_N), np.bool_)
        first_N[1:] = sorted_N[1:] != sorted_N[:-1]
        kept_M = order_N[first_N]
        starts = np.cumsum([0, *(len(one) for one in raw)])
        self._digests = sorted_N[first_N]
        self._shards = (np.searchsorted(starts, kept_M, side="right") - 1).astype(np.int32)
        self._rows = (kept_M - starts[self._shards]).astype(np.int32)

    def __getitem__(self, digest: str) -> tuple[int, int]:
        try:
            wanted = np.frombuffer(bytes.fromhex(digest), _BINARY)
        except ValueError:
            raise KeyError(digest) from None
        at = int(np.searchsorted(self._digests, wanted)[0]) if len(wanted) == 1 else len(self)
        if at == len(self) or self._digests[at] != wanted[0]:
            raise KeyError(digest)
        return int(self._shards[at]), int(self._rows[at])

    def __len__(self) -> int:
        return len(self._digests)

    def __iter__(self) -> Iterator[str]:
        whole = self._digests.tobytes()
        return (whole[at : at + _BINARY.itemsize].hex() for at in range(0, len(whole), _BINARY.itemsize))

    def absent(self, digests: Collection[str]) -> int:
        """How many of these digests it does not have."""
        wanted = _binary(digests, "the corpus")
        at = np.searchsorted(self._digests, wanted)
        there = at < len(self)
        there[there] = self._digests[at[there]] == wanted[there]
        return len(wanted) - int(there.sum())


_BINARY = np.dtype("S16")
"""A digest's bytes. numpy takes zeros at the end for padding, which among texts of one length tells all of them apart."""


def _binary(digests: Collection[str], where: str) -> npt.NDArray[np.bytes_]:
    try:
        if any(len(digest) != 2 * _BINARY.itemsize for digest in digests):
            raise ValueError("one is of another length")
        return np.frombuffer(bytes.fromhex("".join(digests)), _BINARY)
    except ValueError as error:
        raise CorruptArtifactError(f"A document's name is no digest of 32 hex digits: {error}.", where=where) from error


def not_finite(scores: Scores, hidden: torch.dtype) -> list[str]:
    """Columns that hold a NaN or an infinity, and so an exponent of ones alone: to look for that takes half of `isfinite`'s time, and
    needs no bfloat16. `hidden` is what hidden states are."""
    words, exponent = (np.uint32, 0x7F80_0000) if hidden == torch.float32 else (np.uint16, 0x7F80)
    asked: list[tuple[str, Any, int]] = [
        ("label_logprob", np.uint32, 0x7F80_0000), ("entropy", np.uint32, 0x7F80_0000), ("tail", np.uint32, 0x7F80_0000),
        ("logprobs", np.uint16, 0x7C00), ("hidden", words, exponent),
    ]  # fmt: skip
    bits = {name: (getattr(scores, name).view(kind), kind(ones)) for name, kind, ones in asked}
    return [name for name, (column, ones) in bits.items() if len(column) and (column & ones).max() == ones]


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


def _not_there(store: Location, folder: Location, identity: dict[str, Any], wanted: set[str], limit: int | None) -> Exception:
    """Why there is nothing to train on: building, or made by another teacher or policy, or never begun."""
    if read_manifest(folder, IDENTITY) is not None:
        held = held_documents(read_parts(folder))
        if wanted <= held:
            return MissingArtifactError(
                f"The teacher cache holds all {len(wanted):,} documents of the corpus, scored for others, and no list of them for "
                "this one.", where=folder.url, help="Run `distft score` with this config: it makes the list, and reads nothing.",
            )  # fmt: skip
        trial = (
            "" if limit is None else f" and score.limit=null: score.limit={limit} is a trial, which leaves the cache unfinished"
        )
        return MissingArtifactError(
            f"The teacher cache holds {len(wanted & held):,} of the corpus's {len(wanted):,} documents.", where=folder.url,
            help=f"Run `distft score` with this config{trial}; it reads the rest and nothing twice.",
        )  # fmt: skip
    other = nearest(store.child("teacher"), identity, IDENTITY)
    if other is None:
        return MissingArtifactError("There is no teacher cache in this store.", where=store.url,
                                    help="Run `distft score` with this config.")  # fmt: skip
    return StaleArtifactError(
        f"No teacher cache fits this config. {other}", where=folder.url,
        help="If the change is meant, run `distft score` with this config; else undo it.",
    )  # fmt: skip
