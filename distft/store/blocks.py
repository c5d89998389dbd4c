"""Any bytes of a large file, verified before they are used, without reading all of it: its sha256 is kept block by block.

What one machine wrote as a whole, another may need a part of: a checkpoint of eight ranks that is read by six.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Self

from distft.errors import CorruptArtifactError
from distft.store.location import Location
from distft.store.manifest import FileEntry

BLOCK_BYTES = 16 << 20
AHEAD = 2
"""Blocks that are fetched while the one before them is used."""
KEPT = 12
"""Blocks in memory: those of three places that move on side by side, and what is ahead of each."""


class BlockWriter:
    """Writes to a file and hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._whole: list[str] = []
        self._open, self._room = hashlib.sha256(), BLOCK_BYTES

    def write(self, data: memoryview) -> None:
        data = data.cast("B")
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self.file.write(part)
            self._open.update(part)
            self._room -= len(part)
            if not self._room:
                self._close()

    def facts(self) -> dict[str, object]:
        """What the manifest is to say of the file, once all of it is written."""
        if self._room < BLOCK_BYTES:
            self._close()
        return {"block_bytes": BLOCK_BYTES, "blocks": self._whole}

    def _close(self) -> None:
        self._whole.append(self._open.hexdigest())
        self._open, self._room = hashlib.sha256(), BLOCK_BYTES


class BlockReader:
    """Reads where it is asked to, for one thread; a block with other bytes than the manifest promises is an error that names it."""

    def __init__(self, folder: Location, entry: FileEntry) -> None:
        self.folder, self.entry = folder, entry
        self.block_bytes, self.digests = _promised(folder, entry)
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1 + AHEAD)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read_into(self, start: int, into: memoryview) -> None:
        """Fills `into` with the file's bytes from `start` on."""
        into = into.cast("B")
        if start < 0 or start + len(into) > self.entry.size:
            raise CorruptArtifactError(
                f"{self.entry.name} has {self.entry.size} bytes, and {start} to {start + len(into)} are looked for",
                where=self.folder.url,
            )
        while len(into):
            number, place = divmod(start, self.block_bytes)
            part = memoryview(self._block(number))[place : place + len(into)]
            into[: len(part)] = part
            start, into = start + len(part), into[len(part) :]

    def _block(self, number: int) -> bytes:
        for coming in range(number, min(number + 1 + AHEAD, len(self.digests))):
            if coming not in self._blocks:
                self._blocks[coming] = self._pool.submit(self._fetch, coming)
            self._blocks.move_to_end(coming)
        while len(self._blocks) > KEPT:
            self._blocks.popitem(last=False)[1].cancel()
        return self._blocks[number].result()

    def _fetch(self, number: int) -> bytes:
        start = number * self.block_bytes
        data = self.folder.read_range(self.entry.name, start, min(self.block_bytes, self.entry.size - start))
        found = hashlib.sha256(data).hexdigest()
        if found != self.digests[number]:
            raise CorruptArtifactError(
                f"{self.entry.name} is damaged between bytes {start} and {start + len(data)}: sha256 {found[:12]}..., not "
                f"{self.digests[number][:12]}...", where=self.folder.url,
            )  # fmt: skip
        return data


def _promised(folder: Location, entry: FileEntry) -> tuple[int, list[str]]:
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
