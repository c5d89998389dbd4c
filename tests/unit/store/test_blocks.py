"""Parts of a large file: right bytes for any range, and a wrong byte is found in whatever block is used."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distft.errors import CorruptArtifactError
from distft.store import blocks
from distft.store.blocks import BlockWriter, Span, read_spans
from distft.store.location import Location, open_location
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
        facts = writer.facts()
        assert writer.sha256() == hashlib.sha256(data).hexdigest()
        return FileEntry(name=name, size=len(data), sha256=writer.sha256(), facts=facts)

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Location:
    """Where it does not matter what kind of store it is."""
    return open_location(str(tmp_path / "disk"))


def read(store: Location, entry: FileEntry, *places: tuple[int, int]) -> list[bytes]:
    return [found.tobytes() for found in read_spans(store, [Span(entry, *place) for place in places])]


def watch(store: Location, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> None:
    """Calls `before` with the number of each block that is asked for."""
    plain = store.read_range

    def asked(name: str, start: int, length: int) -> bytes:
        before(start // 128)
        return plain(name, start, length)

    monkeypatch.setattr(store, "read_range", asked)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 256, 10_000])
@pytest.mark.parametrize("pieces", [1, 3, 400])
def test_digests_do_not_depend_on_how_it_was_written(put: Callable[..., FileEntry], size: int, pieces: int) -> None:
    facts = put(DATA[:size], pieces).facts
    expected = [hashlib.sha256(DATA[:size][start : start + 128]).hexdigest() for start in range(0, size, 128)]
    assert facts == {"block_bytes": 128, "blocks": expected}


def test_any_range_is_what_was_written(store: Location, put: Callable[..., FileEntry]) -> None:
    entry, chance, places = put(), random.Random(1), list[tuple[int, int]]()
    for _ in range(300):
        start = chance.randrange(len(DATA) + 1)
        length = chance.choice((0, 1, 127, 128, 129, 1000, len(DATA)))
        places.append((start, min(length, len(DATA) - start)))
    assert read(store, entry, *places) == [DATA[start : start + length] for start, length in places]
    for place in ((len(DATA), 1), (0, len(DATA) + 1), (-1, 1)):
        with pytest.raises(CorruptArtifactError, match="are looked for"):
            read(store, entry, place)


def test_three_places_side_by_side_read_each_block_once(
    store: Location, put: Callable[..., FileEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, asked = put(), list[int]()
    watch(store, monkeypatch, asked.append)
    third = len(DATA) // 3
    places = [(begin + start, 50) for start in range(0, third - 50, 50) for begin in (0, third, 2 * third)]
    assert read(store, entry, *places) == [DATA[start : start + 50] for start, _ in places]
    assert sorted(asked) == sorted({byte // 128 for start, length in places for byte in range(start, start + length)})


def test_nothing_is_fetched_that_is_not_asked_for(
    store: Location, put: Callable[..., FileEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, asked = put(), list[int]()
    watch(store, monkeypatch, asked.append)
    read(store, entry, (10, 5), (1_000, 200), (9_990, 0))
    assert sorted(asked) == [0, 7, 8, 9]


def test_the_next_block_is_asked_for_before_one_is_there(
    put: Callable[..., FileEntry], store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that gives no block before it was asked for the one after it."""
    entry = put()
    last, asked = len(DATA) // 128, [threading.Event() for _ in range(len(DATA) // 128 + 1)]

    def hold(number: int) -> None:
        asked[number].set()
        assert number == last or asked[number + 1].wait(20)

    watch(store, monkeypatch, hold)
    assert read(store, entry, (0, len(DATA))) == [DATA]


def test_blocks_are_fetched_while_one_is_used_and_no_more_than_agreed(
    put: Callable[..., FileEntry], store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, asked = put(), [threading.Event() for _ in range(len(DATA) // 128 + 1)]
    watch(store, monkeypatch, lambda number: asked[number].set())
    found = read_spans(store, [Span(entry, start, 128) for start in range(0, 9_984, 128)])
    for number in range(20):
        next(found)
        assert asked[number + blocks.AHEAD].wait(20)
        assert not asked[number + blocks.AHEAD + 1].is_set()
    found.close()


def test_a_wrong_block_is_told_without_waiting_for_those_ahead(disk: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BlockWriter(io.BytesIO())
    writer.write(memoryview(DATA))
    entry = FileEntry(name="data/x", size=len(DATA), sha256="", facts=writer.facts())
    disk.replace("data/x", b"?" + DATA[1:])
    going_on, arrived, asked = threading.Event(), list[int](), list[int]()

    def hold(number: int) -> None:
        asked.append(number)
        if number:
            going_on.wait(20)
            arrived.append(number)

    watch(disk, monkeypatch, hold)
    try:
        with pytest.raises(CorruptArtifactError, match="damaged between bytes 0 and 128"):
            read(disk, entry, (0, len(DATA)))
        assert arrived == []
    finally:
        going_on.set()
    assert set(asked) <= set(range(1 + blocks.AHEAD))


def test_a_flipped_byte_is_found_where_it_is_used_and_nowhere_else(store: Location, put: Callable[..., FileEntry]) -> None:
    entry = put()
    store.replace(entry.name, DATA[:500] + bytes([DATA[500] ^ 1]) + DATA[501:])
    assert read(store, entry, (5_000, 2_000), (0, 128)) == [DATA[5_000:7_000], DATA[:128]]
    with pytest.raises(CorruptArtifactError, match=r"data/x is damaged between bytes 384 and 512"):
        read(store, entry, (300, 200))


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
        read(store, replace(entry, facts={**entry.facts, **facts} if facts else {}), (0, 1))


def test_a_file_that_is_shorter_or_gone(store: Location, put: Callable[..., FileEntry]) -> None:
    entry = put(name="data/y")
    store.delete(entry.name)
    with pytest.raises(CorruptArtifactError, match="data/y is in the manifest, and gone"):
        read(store, entry, (0, 100))
    entry = put()
    store.replace(entry.name, DATA[:4_000])
    assert read(store, entry, (0, 100)) == [DATA[:100]]
    with pytest.raises(CorruptArtifactError, match="ends"):
        read(store, entry, (9_000, 100))
