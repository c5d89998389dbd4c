"""Parts of a large file: right bytes for any range, and a wrong byte is found in whatever block is used."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from distft.errors import CorruptArtifactError
from distft.store import blocks
from distft.store.blocks import BlockReader, BlockWriter
from distft.store.location import Location
from distft.store.manifest import FileEntry

DATA = random.Random(0).randbytes(10_000)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 128)


@pytest.fixture
def put(store: Location) -> Callable[..., FileEntry]:
    def make(data: bytes = DATA, pieces: int = 7, name: str = "data/x") -> FileEntry:
        file = io.BytesIO()
        writer = BlockWriter(file)
        step = max(1, len(data) // pieces)
        for start in range(0, len(data), step):
            writer.write(memoryview(data)[start : start + step])
        assert file.getvalue() == data
        store.replace(name, data)
        return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), facts=writer.facts())

    return make


def read(reader: BlockReader, start: int, length: int) -> bytes:
    into = bytearray(length)
    reader.read_into(start, memoryview(into))
    return bytes(into)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 256, 10_000])
@pytest.mark.parametrize("pieces", [1, 3, 400])
def test_digests_do_not_depend_on_how_it_was_written(put: Callable[..., FileEntry], size: int, pieces: int) -> None:
    facts = put(DATA[:size], pieces).facts
    expected = [hashlib.sha256(DATA[:size][start : start + 128]).hexdigest() for start in range(0, size, 128)]
    assert facts == {"block_bytes": 128, "blocks": expected}


def test_any_range_is_what_was_written(store: Location, put: Callable[..., FileEntry]) -> None:
    entry, chance = put(), random.Random(1)
    with BlockReader(store, entry) as reader:
        for _ in range(300):
            start = chance.randrange(len(DATA) + 1)
            length = chance.choice((0, 1, 127, 128, 129, 1000, len(DATA)))
            length = min(length, len(DATA) - start)
            assert read(reader, start, length) == DATA[start : start + length]
        assert len(reader._blocks) <= blocks.KEPT
        for start, length in ((len(DATA), 1), (0, len(DATA) + 1), (-1, 1)):
            with pytest.raises(CorruptArtifactError, match="are looked for"):
                read(reader, start, length)


def test_three_places_side_by_side_read_each_block_once(
    store: Location, put: Callable[..., FileEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, asked = put(), list[int]()
    plain = store.read_range
    monkeypatch.setattr(store, "read_range", lambda name, start, length: (asked.append(start), plain(name, start, length))[1])
    third = len(DATA) // 3
    with BlockReader(store, entry) as reader:
        for start in range(0, third - 50, 50):
            for begin in (0, third, 2 * third):
                assert read(reader, begin + start, 50) == DATA[begin + start : begin + start + 50]
    assert len(asked) <= len(set(asked)) + 2 * blocks.AHEAD  # what is ahead of one place may be gone when the next gets there


def test_a_flipped_byte_is_found_where_it_is_used_and_nowhere_else(store: Location, put: Callable[..., FileEntry]) -> None:
    entry = put()
    store.replace(entry.name, DATA[:500] + bytes([DATA[500] ^ 1]) + DATA[501:])
    with BlockReader(store, entry) as reader:
        assert read(reader, 5_000, 2_000) == DATA[5_000:7_000]
        assert read(reader, 0, 128) == DATA[:128]
        with pytest.raises(CorruptArtifactError, match=r"data/x is damaged between bytes 384 and 512"):
            read(reader, 300, 200)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"block_bytes": 0},
        {"block_bytes": 128.0},
        {"block_bytes": True},
        {"blocks": None},
        {"blocks": [1] * 79},
        {"blocks": ["00"] * 78},
    ],
)
def test_a_manifest_that_does_not_say_what_the_blocks_are(
    store: Location, put: Callable[..., FileEntry], facts: dict[str, Any]
) -> None:
    entry = put()
    with pytest.raises(CorruptArtifactError, match="does not say what the blocks of data/x are"):
        BlockReader(store, replace(entry, facts={**entry.facts, **facts} if facts else {}))


def test_a_file_that_is_shorter_or_gone(store: Location, put: Callable[..., FileEntry]) -> None:
    entry = put()
    store.replace(entry.name, DATA[:4_000])
    with BlockReader(store, entry) as reader:
        assert read(reader, 0, 100) == DATA[:100]
        with pytest.raises(CorruptArtifactError):
            read(reader, 9_000, 100)
