"""Builds CORPUS: `corpus/<id>/`, the documents of each split in the order of their rows.

A split is written in parts, runs of consecutive rows, each committed by a manifest of its own (`parts/<split>-<n>.json`); at last
MANIFEST.json names all their files. A build that was cut off goes on behind the last part. Rows go through the tokenizer in chunks
whose borders follow from the rows alone, and parts end where chunks end: how many processes there are, and where a build was cut off,
leaves no trace in the artifact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.schema import Data, Source, TrainSource
from distft.corpus.anchors import Annotation, annotation_file, annotation_identity
from distft.corpus.files import Row
from distft.corpus.sources import rows, source_files, source_identity
from distft.corpus.tabulate import SCHEMA, Tally
from distft.corpus.workers import Chunk, Workers
from distft.errors import DataError, StaleArtifactError
from distft.progress import say, track
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit, fingerprint, read_manifest
from distft.store.shards import ShardWriter

if TYPE_CHECKING:
    from distft.store.model_folder import ModelFolder

KIND = "corpus"
PART_KIND = "corpus part"
VERSION = 1
"""Raised when the same rows would become other tokens or other supervision."""

PART_TOKENS = 16 << 20  # 64 MB of token ids
CHUNK_ROWS = 256
CHUNK_CHARS = 1 << 20


def corpus_identity(config: Data, model: ModelFolder) -> dict[str, Any]:
    """What decides the documents: the rows' bytes, how they are read, their anchors, the tokenizer with its template, and
    `max_tokens`."""
    anchors = config.train.anchors
    return {
        "version": VERSION,
        "train": {
            **source_identity(config.train),
            **({} if anchors is None else {"anchors": annotation_identity(anchors, source_files(config.train))}),
        },
        "heldout": source_identity(config.heldout) if config.heldout else None,
        "max_tokens": config.max_tokens,
        "tokenizer": model.tokenizer_identity(),
    }


def build_corpus(config: Data, model: ModelFolder, store: Location, *, part_tokens: int = PART_TOKENS) -> Manifest:
    """The corpus of this data and tokenizer, built where it is not there yet. Safe to run twice at once."""
    splits = {name: source for name, source in (("train", config.train), ("heldout", config.heldout)) if source}
    stamps = {name: _stamp(source) for name, source in splits.items()}
    identity = corpus_identity(config, model)
    folder = store.child(KIND, fingerprint(KIND, identity)[:16])
    there = read_manifest(folder)
    if there is not None:
        return there
    built: dict[str, _SplitBuild] = {}
    with Workers(config, model) as workers:
        # The held-out split is the small one: what is wrong with it shows before the long one is worked through.
        for split, source in reversed(splits.items()):
            built[split] = _SplitBuild(folder, identity, split, source, stamps[split], config.max_tokens, part_tokens)
            built[split].run(workers)
    files = [entry for split in splits for part in built[split].parts for entry in part.files]
    facts = {split: built[split].total.facts() for split in splits}
    return commit(folder, Manifest(kind=KIND, identity=identity, files=tuple(files), facts=facts))


@dataclass(slots=True)
class _SplitBuild:
    """The building of one split, part by part."""

    folder: Location
    corpus: dict[str, Any]
    split: str
    source: Source
    stamp: list[tuple[int, ...]]
    max_tokens: int
    part_tokens: int
    parts: list[Manifest] = field(default_factory=list)
    total: Tally = field(default_factory=Tally)

    @property
    def anchors(self) -> str | None:
        return _anchors(self.source)

    def run(self, workers: Workers) -> None:
        self._take_up()
        done = self.total.rows
        with track(f"tokenize {self.split}", self.source.limit, "rows", done=done) as meter:
            results = workers.map(self.split, _chunks(islice(self._rows(), done, None)))
            for first in results:
                tally = Tally()
                with ShardWriter(self.folder, f"{self.split}-{len(self.parts):05d}", SCHEMA, compression=None) as writer:
                    for batch, counted in chain([first], results):
                        writer.write(batch)
                        tally.add(counted)
                        meter.advance(counted.rows)
                        if tally.tokens >= self.part_tokens:
                            break
                self._commit(writer.entry, tally)
        self._report()

    def _rows(self) -> Iterator[Row]:
        found = rows(self.source)
        if self.anchors is None:
            return found
        names = [path.name for path in source_files(self.source)] or [Path(self.source.path).name]
        return Annotation(self.anchors).mark(found, names=names, limit=self.source.limit)

    def _take_up(self) -> None:
        """Finds the parts that are committed already."""
        while (part := read_manifest(self.folder, self._name())) is not None:
            if (part.kind, part.identity) != (PART_KIND, self._identity()):
                raise StaleArtifactError(
                    f"{self._name()} is a part of something else",
                    where=self.folder.url,
                    help="Remove that folder, and run the command again.",
                )
            self.parts.append(part)
            self.total.add(Tally(**part.facts))

    def _commit(self, entry: FileEntry, tally: Tally) -> None:
        if _stamp(self.source) != self.stamp:
            raise DataError(
                "the data changed while it was read",
                where=self.source.path,
                help="Wait until its writer is done, and run the command again.",
            )
        entry = replace(entry, facts={**entry.facts, "split": self.split, "documents": tally.documents, "tokens": tally.tokens})
        part = Manifest(kind=PART_KIND, identity=self._identity(), files=(entry,), facts=tally.facts())
        committed = commit(self.folder, part, name=self._name())
        if committed.facts["rows"] != tally.rows:  # ours would go on where theirs did not end
            raise StaleArtifactError(
                f"another process builds this corpus in parts of {committed.facts['rows']} rows, not {tally.rows}",
                where=self.folder.url,
                help="Run the command again: it goes on behind the parts that are there. Use one version of distft.",
            )
        if committed.files != part.files:  # another process was first, with the same rows
            self.folder.delete(entry.name)
        self.parts.append(committed)
        self.total.add(tally)

    def _name(self) -> str:
        """Of the next part."""
        return f"parts/{self.split}-{len(self.parts):05d}.json"

    def _identity(self) -> dict[str, Any]:
        return {"corpus": fingerprint(KIND, self.corpus), "split": self.split, "part": len(self.parts)}

    def _report(self) -> None:
        """Says what was not taken as it is; refuses a split of which nothing was left."""
        total, names = self.total, self.total.dropped_names
        if total.documents == 0:
            cut = total.shortest_prompt
            raise DataError(
                f"{self.split}: all {total.rows} rows were dropped; the first is {names[0]}"
                + (f"; the shortest prompt has {cut} tokens" if cut is not None else ""),
                where=self.source.path if cut is None else f"data.max_tokens={self.max_tokens}",
                help="Check the source's `format` and columns, and the roles." if cut is None else "Raise data.max_tokens.",
            )
        if total.dropped:
            listed = "; ".join(names[:3]) + ("; ..." if total.dropped > 3 else "")
            say(f"{self.split}: {total.dropped} of {total.rows} rows dropped: {listed}")
        if self.anchors is not None:
            if total.anchor_tokens == 0:
                raise DataError(f"none of its anchors is in the {total.rows} rows that are taken", where=self.anchors,
                                help="Raise data.train.limit, or leave data.train.anchors out.")  # fmt: skip
            say(f"{self.split}: {total.anchor_tokens} of {total.supervised_tokens} supervised tokens are anchors, in "
                f"{total.annotated} of {total.documents} documents")  # fmt: skip
        for count, what in (
            (total.truncated, f"cut to {self.max_tokens} tokens"),
            (total.altered, "where the chat template rewrote or dropped a part of what the assistant says"),
            (total.unended, "where no token ends an assistant's turn: the model will not learn to stop there"),
        ):
            if count:
                say(f"{self.split}: {count} of {total.documents} documents {what}")


def _chunks(found: Iterable[Row]) -> Iterator[Chunk]:
    """Runs of rows, of bounded number and text. Where one ends depends on its own rows alone, so it is the same after a restart."""
    chunk: Chunk = []
    chars = 0
    for row in found:
        chunk.append(row)
        chars += _chars(row.value)
        if len(chunk) >= CHUNK_ROWS or chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list) else 0


def _anchors(source: Source) -> str | None:
    return source.anchors if isinstance(source, TrainSource) else None


def _stamp(source: Source) -> list[tuple[int, ...]]:
    """Changes when a file of the source, or its annotation, is written to."""
    anchors = _anchors(source)
    seen = [path.stat() for path in (*source_files(source), *([] if anchors is None else [annotation_file(anchors)]))]
    return [(one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in seen]
