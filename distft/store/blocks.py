"""Any bytes of a large file, verified before they are used, without reading all of it: its sha256 is kept block by block.

What one machine wrote as a whole, another may need a part of: a checkpoint of eight ranks that is read by six.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.store.location import Location
from distft.store.manifest import FileEntry

BLOCK_BYTES = 16 << 20
AHEAD = 4
"""Blocks that are fetched while one is used, or are there before their turn."""


class BlockWriter:
    """Writes to a file and hashes what passes, by block and as a whole: nothing has to be read back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._all = hashlib.sha256()
        self._blocks: list[str] = []
        self._open, self._room = hashlib.sha256(), BLOCK_BYTES

    def write(self, data: memoryview) -> None:
        data = data.cast("B")
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self.file.write(part)
            self._open.update(part)
            self._all.update(part)
            self._room -= len(part)
            if not self._room:
                self._close()

    def facts(self) -> dict[str, object]:
        """What the manifest is to say of the file, once all of it is written."""
        if self._room < BLOCK_BYTES:
            self._close()
        return {"block_bytes": BLOCK_BYTES, "blocks": self._blocks}

    def sha256(self) -> str:
        """Of all that was written."""
        return self._all.hexdigest()

    def _close(self) -> None:
        self._blocks.append(self._open.hexdigest())
        self._open, self._room = hashlib.sha256(), BLOCK_BYTES


class Span(NamedTuple):
    """Some bytes of a file of a manifest."""

    entry: FileEntry
    start: int
    length: int


def read_spans(folder: Location, spans: Sequence[Span]) -> Generator[npt.NDArray[np.uint8], None, None]:
    """The bytes of each span, in turn. The blocks that hold them are fetched once each, and no others. In memory are AHEAD blocks at
    most whose turn comes next, and those that were used and will be again: where places of a file are read side by side, one of each.
    A block with other bytes than the manifest promises is an error that names it. Whoever stops early waits for no fetch."""
    blocks = _Blocks(folder, spans)
    try:
        for span in spans:
            found, filled = np.empty(span.length, np.uint8), 0
            for number, part in blocks.of(span):
                piece = np.frombuffer(blocks.take(span.entry, number), np.uint8)[part]
                found[filled : filled + len(piece)] = piece
                filled += len(piece)
                del piece  # else it would hold a block that is done with
                blocks.used(span.entry, number)
            yield found
    finally:
        blocks.close()


class _Blocks:
    """What of the spans' blocks is in memory or on its way."""

    def __init__(self, folder: Location, spans: Sequence[Span]) -> None:
        self.folder = folder
        entries = {span.entry.name: span.entry for span in spans}
        self._promised = {name: promised_blocks(folder, entry) for name, entry in entries.items()}
        self._uses: Counter[tuple[str, int]] = Counter()
        self._later: deque[tuple[FileEntry, int]] = deque()
        self._ahead: deque[tuple[str, int]] = deque()
        self._here: dict[tuple[str, int], Future[bytes]] = {}
        for span in spans:
            if span.start < 0 or span.start + span.length > span.entry.size:
                raise CorruptArtifactError(
                    f"{span.entry.name} has {span.entry.size} bytes, and {span.start} to {span.start + span.length} are looked for",
                    where=folder.url,
                )
            for number, _ in self.of(span):
                if (span.entry.name, number) not in self._uses:
                    self._later.append((span.entry, number))
                self._uses[span.entry.name, number] += 1
        self._pool = ThreadPoolExecutor(1 + AHEAD, "blocks")

    def of(self, span: Span) -> Iterator[tuple[int, slice]]:
        """The numbers of the blocks that hold the span, and which part of each does."""
        size, _ = self._promised[span.entry.name]
        start, stop = span.start, span.start + span.length
        while start < stop:
            number, place = divmod(start, size)
            length = min(size - place, stop - start)
            yield number, slice(place, place + length)
            start += length

    def take(self, entry: FileEntry, number: int) -> bytes:
        """A block, by the spans' order; those that come next are on their way when it is here."""
        key = (entry.name, number)
        if key not in self._here:
            self._fetch_ahead(1)
        if self._ahead and self._ahead[0] == key:
            self._ahead.popleft()
        self._fetch_ahead(AHEAD)
        return self._here[key].result()

    def used(self, entry: FileEntry, number: int) -> None:
        """After the last use it is gone."""
        key = (entry.name, number)
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._here[key]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._here.clear()

    def _fetch_ahead(self, count: int) -> None:
        while self._later and len(self._ahead) < count:
            entry, number = self._later.popleft()
            self._ahead.append((entry.name, number))
            self._here[entry.name, number] = self._pool.submit(self._fetch, entry, number)

    def _fetch(self, entry: FileEntry, number: int) -> bytes:
        size, digests = self._promised[entry.name]
        start = number * size
        data = read_promised(self.folder, entry, start, min(size, entry.size - start))
        check_block(self.folder, entry, start, start + len(data), hashlib.sha256(data).hexdigest(), digests[number])
        return data


def read_promised(folder: Location, entry: FileEntry, start: int, length: int) -> bytes:
    """Bytes of a file that a manifest names, not yet verified."""
    try:
        return folder.read_range(entry.name, start, length)
    except MissingArtifactError as error:
        raise CorruptArtifactError(f"{entry.name} is in the manifest, and gone", where=folder.url) from error


def check_block(folder: Location, entry: FileEntry, start: int, stop: int, found: str, promised: str) -> None:
    """Refuses a block with other bytes than the manifest promises."""
    if found != promised:
        raise CorruptArtifactError(
            f"{entry.name} is damaged between bytes {start} and {stop}: sha256 {found[:12]}..., not {promised[:12]}...",
            where=folder.url,
        )


def promised_blocks(folder: Location, entry: FileEntry) -> tuple[int, list[str]]:
    """Size and digests of the blocks, once they fit the file."""
    size, digests = entry.facts.get("block_bytes"), entry.facts.get("blocks")
    if (
        type(size) is not int
        or size <= 0
        or not isinstance(digests, list)
        or not all(isinstance(one, str) for one in digests)
        or len(digests) != -(-entry.size // size)
    ):
        raise CorruptArtifactError(f"the manifest does not say what the blocks of {entry.name} are", where=folder.url)
    return size, digests
