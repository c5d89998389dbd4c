"""A cache's rows one after the other, for whoever goes through all of it: each data file is fetched and checked once, and of its
columns one record batch is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distft.corpus.reader import Corpus, Document
from distft.errors import ArtifactError, MissingArtifactError
from distft.progress import say
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest
from distft.teacher.encode import SCHEMA, PlainShard
from distft.teacher.head_file import WORDS
from distft.teacher.identity import quarantined_documents, read_parts
from distft.teacher.planes import from_planes
from distft.teacher.scores import Scores
from distft.teacher.staging import stored_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A document as a shard has it: the tokens it had in all, and the teacher's word on those that were scored."""

    digest: str
    tokens: int
    scores: Scores


def rows(folder: Location, entry: FileEntry, staging: Path) -> Iterator[Row]:
    """The rows of one data file, whose bytes are checked before they are parsed. Nothing stays on this machine's disk."""
    where = f"{folder.url}/{entry.name}"
    for batch in stored_batches(folder, entry, staging):
        shard = PlainShard(pa.Table.from_batches([from_planes(batch, SCHEMA, where=where)]), where=where)
        for number in range(len(shard)):
            digest, tokens, scores = shard.read(number)
            yield Row(digest=digest, tokens=tokens, scores=scores)


def find_row(folder: Location, text: str, staging: Path) -> Row:
    """The document whose digest is `text` or alone begins with it."""
    fitting: dict[str, Manifest] = {}
    parts = read_parts(folder)
    for part in parts:
        for digest in part.facts["digests"]:
            if digest.startswith(text):
                fitting.setdefault(digest, part)
    if not fitting:
        told = [(d, reason) for d, reason in quarantined_documents(parts).items() if d.startswith(text)]
        if told:
            raise MissingArtifactError(f"Document {told[0][0]} is quarantined: {told[0][1]}.", where=folder.url,
                                       help="Leave it out by data.exclude, or set score.retry_quarantined=true.")  # fmt: skip
    if len(fitting) != 1:
        listed = f": {', '.join(sorted(fitting)[:5])}" if fitting else ""
        raise MissingArtifactError(
            f"{len(fitting)} documents of the cache begin with {text!r}{listed}.", where=folder.url,
            help="`distft cache show CACHE --json` prints the first hundred `document_ids`.",
        )  # fmt: skip
    [(digest, part)] = fitting.items()
    for entry in part.files:
        for row in rows(folder, entry, staging):
            if row.digest == digest:
                return row
    raise MissingArtifactError(f"Document {digest} is not in the file of the part that lists it.", where=folder.url,
                               help="Run `distft cache verify` on this cache.")  # fmt: skip


class Documents:
    """The documents of all corpora of a store, by digest: a cache holds what a teacher thought of tokens, not the tokens. A corpus is
    fetched and opened when those before it do not have what is asked for."""

    def __init__(self, store: Location | None, staging: Path) -> None:
        self._staging = staging
        self._places: dict[str, tuple[Corpus, str, int]] = {}
        self._corpora: list[set[str]] = []
        folder = store.child("corpus") if store is not None else None
        self._unopened = [folder.child(name) for name in folder.folders()] if folder is not None else []

    @property
    def corpora(self) -> list[set[str]]:
        """The digests of each corpus; opens all."""
        while self._unopened:
            self._open_next()
        return self._corpora

    def __contains__(self, digest: str) -> bool:
        while digest not in self._places and self._unopened:
            self._open_next()
        return digest in self._places

    def get(self, digest: str) -> Document | None:
        if digest not in self:
            return None
        corpus, split, index = self._places[digest]
        return corpus.document(split, index)

    def _open_next(self) -> None:
        """A corpus that cannot be read is left out with a word: another stage's damage is not the cache's."""
        try:
            found = self._opened(self._unopened[0])
        except ArtifactError as error:
            say(f"This corpus is not compared with: {error}")
            found = None
        del self._unopened[0]
        if found is None:
            return
        corpus, splits = found
        for split, digests in splits.items():
            for index, digest in enumerate(digests):
                self._places.setdefault(digest, (corpus, split, index))
        self._corpora.append({digest for digests in splits.values() for digest in digests})

    def _opened(self, folder: Location) -> tuple[Corpus, dict[str, list[str]]] | None:
        """None for one that was never finished."""
        if not folder.exists("MANIFEST.json"):
            return None
        corpus = Corpus.open(folder, self._staging)
        return corpus, {split: corpus.digests(split) for split in corpus.splits}


def document_facts(row: Row, document: Document | None, dtype: str) -> dict[str, Any]:
    """One document whole, as `--json` prints it: lists over the scored tokens, `ids` and `logprobs` a list per token. `tokens` are
    the ids of all its tokens, and null when no corpus has them. Kept log-probabilities are as stored, to float16. Hidden states, in
    the teacher's `dtype`, are told by their width alone: kilobytes a token, which say nothing without the head."""
    scores = row.scores
    cuts = np.cumsum(scores.counts, dtype=np.int64)[:-1]
    return {
        "document": row.digest,
        "token_count": row.tokens,
        "tokens": None if document is None else document.tokens.tolist(),
        **{name: getattr(scores, name).tolist() for name in ("positions", "label_logprob", "entropy", "rank", "tail")},
        "ids": [ids.tolist() for ids in np.split(scores.ids, cuts)],
        "logprobs": [logprobs.tolist() for logprobs in np.split(scores.logprobs, cuts)],
        "hidden_width": scores.words.shape[1] // WORDS[dtype] if len(scores.hidden) else None,
    }
