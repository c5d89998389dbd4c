"""One part of a cache while it is written: scores come in as the teacher reads on, and a thread of their own encodes, compresses and
writes them. What is in memory is a few batches, never a part.
"""

from __future__ import annotations

from contextlib import ExitStack
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any, Self

from distft.corpus.reader import Document
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit
from distft.store.shards import ShardWriter
from distft.teacher.encode import SCHEMA, RecordBatches, to_batch
from distft.teacher.identity import documents_key
from distft.teacher.planes import stored_schema, to_planes
from distft.teacher.scores import Scores

AHEAD = 4
"""Batches of the teacher that may wait to be written; then it waits for the disk."""

Row = tuple[Document, Scores]


def numbered(name: str, number: int) -> str:
    """The name of another part of the very same documents; the first has number 1."""
    return f"{name}-{number}" if number > 1 else name


def next_name(name: str) -> str:
    documents, _, number = name.partition("-")
    return numbered(documents, int(number or 1) + 1)


class PartWriter:
    """Data first, then the manifest that gives it a meaning. What goes wrong in the thread is raised by the next call.

    An exception before `commit` leaves nothing behind, and what waits then is thrown away unwritten. One in the middle of it may leave
    a data file that no manifest names, until `prune` takes it: whether the manifest came to be is not known then."""

    def __init__(self, folder: Location, name: str) -> None:
        self.folder, self.name = folder, name
        self.digests: list[str] = []
        self.tokens = self.scored_tokens = self.entries = 0

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._shard: ShardWriter | None = None
        self._rows = RecordBatches()
        self._queue: Queue[list[Row] | None] = Queue(AHEAD)
        self._error: BaseException | None = None
        self._given_up = False
        self._thread = Thread(target=self._work, name="part-writer", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._given_up = kind is not None
        self._finish()
        self._stack.__exit__(kind, error, trace)

    def add(self, rows: list[Row]) -> None:
        """Takes documents with their scores."""
        for document, scores in rows:
            self.digests.append(document.digest)
            self.tokens += len(document)
            self.scored_tokens += len(scores)
            self.entries += len(scores.ids)
        self._raise()
        self._queue.put(rows)

    def commit(self, quarantined: dict[str, str], facts: dict[str, Any]) -> bool:
        """Names the data in a manifest; whether it stands. Another driver may have been first with the same documents: its part stands
        then, and ours is deleted, unless it could not read all that was read here. Ours stands beside it then, under the next name."""
        self._finish()
        self._raise()
        written: tuple[FileEntry, ...] = ()
        if self._shard is not None:
            self._stack.close()
            written = (self._shard.entry,)
        identity = {
            "documents": documents_key([*self.digests, *quarantined]), "teacher": self.folder.url.rsplit("/", 1)[-1],
        }  # fmt: skip
        facts = {
            "digests": self.digests, "quarantined": quarantined, "tokens": self.tokens, "scored_tokens": self.scored_tokens,
            "entries": self.entries, **facts,
        }  # fmt: skip
        ours = Manifest(kind="teacher-part", identity=identity, files=written, facts=facts)
        read = set(self.digests)
        while (theirs := commit(self.folder, ours, f"parts/{self.name}.json")).files != written:
            if not read & theirs.facts.get("quarantined", {}).keys():
                for entry in written:
                    self.folder.delete(entry.name)
                return False
            self.name = next_name(self.name)
        return True

    def _finish(self) -> None:
        """Waits until all that was added is written."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (rows := self._queue.get()) is not None:
            if self._error is not None or self._given_up:
                continue  # drains, so that nobody waits for room
            try:
                for full in self._rows.add(rows):
                    self._write(full)
            except BaseException as error:
                self._error = error
        try:
            if self._error is None and not self._given_up and (last := self._rows.rest()):
                self._write(last)
        except BaseException as error:
            self._error = error

    def _write(self, rows: list[Row]) -> None:
        if self._shard is None:
            key = documents_key(document.digest for document, _ in rows)
            self._shard = self._stack.enter_context(ShardWriter(self.folder, f"part-{key}", stored_schema(SCHEMA)))
        documents, scores = [document for document, _ in rows], [one for _, one in rows]
        self._shard.write(to_planes(to_batch([d.digest for d in documents], [len(d) for d in documents], scores)))
