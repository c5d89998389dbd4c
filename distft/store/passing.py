"""Large files from front to back, a little at a time: what a machine can pass on that has no room for the whole.

A block (store/blocks.py) is verified once all of it has passed. Until then its bytes are no more than a rumour: what was made of them
must not be given to anybody before `finish` has returned.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from distft.errors import CorruptArtifactError
from distft.store.blocks import check_block, promised_blocks, read_promised
from distft.store.location import Location
from distft.store.manifest import FileEntry


class Passing:
    """One file of an artifact. At most `ahead` pieces of `piece_bytes` are fetched beforehand, in the threads of `pool`."""

    def __init__(self, folder: Location, entry: FileEntry, pool: ThreadPoolExecutor, *, piece_bytes: int, ahead: int) -> None:
        self.folder, self.entry = folder, entry
        self._pool, self._piece_bytes, self._ahead = pool, piece_bytes, ahead
        self._block_bytes, self._promised = promised_blocks(folder, entry)
        self._coming: deque[Future[bytes]] = deque()
        self._asked = self._passed = 0
        self._block = hashlib.sha256()
        self._left = memoryview(b"")
        self._fetch_ahead()

    def take(self, length: int) -> Iterator[memoryview]:
        """The next so many bytes, in pieces, each cut where it is fetched: at multiples of `piece_bytes` of the file."""
        while length:
            if not len(self._left):
                self._left = self._next()
            piece, self._left = self._left[:length], self._left[length:]
            length -= len(piece)
            yield piece

    def finish(self) -> None:
        """Reads on to the end of the last block that was begun, and returns once all that was taken is verified."""
        self._left = memoryview(b"")
        while self._passed % self._block_bytes and self._passed < self.entry.size:
            self._next()

    def _next(self) -> memoryview:
        self._fetch_ahead()
        if not self._coming:
            raise CorruptArtifactError(
                f"{self.entry.name} has {self.entry.size} bytes, and more are looked for", where=self.folder.url
            )
        data = self._coming.popleft().result()
        self._fetch_ahead()
        self._verify(memoryview(data))
        return memoryview(data)

    def _fetch_ahead(self) -> None:
        while len(self._coming) < self._ahead and self._asked < self.entry.size:
            length = min(self._piece_bytes, self.entry.size - self._asked)
            self._coming.append(self._pool.submit(read_promised, self.folder, self.entry, self._asked, length))
            self._asked += length

    def _verify(self, data: memoryview) -> None:
        """Each block against its promise as soon as it has passed."""
        while len(data):
            number, inside = divmod(self._passed, self._block_bytes)
            part, data = data[: self._block_bytes - inside], data[self._block_bytes - inside :]
            self._block.update(part)
            self._passed += len(part)
            if self._passed % self._block_bytes == 0 or self._passed == self.entry.size:
                start = number * self._block_bytes
                check_block(self.folder, self.entry, start, self._passed, self._block.hexdigest(), self._promised[number])
                self._block = hashlib.sha256()
