"""Shards: what is written is what is read, and nothing is read that is not sound."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distft.errors import CorruptArtifactError
from distft.store import shards
from distft.store.location import Location, open_location
from distft.store.manifest import fetch
from distft.store.shards import Compression, ShardWriter, read_batches, read_shard

SCHEMA = pa.schema(
    [("id", pa.uint32()), ("probs", pa.list_(pa.float16(), 4)), ("ids", pa.list_(pa.uint32())), ("text", pa.string())]
)


def batch(rows: int, seed: int = 0) -> pa.RecordBatch:
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "id": pa.array(random.integers(0, 2**32, rows), pa.uint32()),
        "probs": pa.FixedSizeListArray.from_arrays(pa.array(random.random(4 * rows).astype(np.float16)), 4),
        "ids": pa.array([list(range(n % 5)) for n in range(rows)], pa.list_(pa.uint32())),
        "text": pa.array([f"row {n}" if n % 3 else None for n in range(rows)]),
    }
    return pa.record_batch(columns, schema=SCHEMA)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_batches_come_back_as_they_were_written(store: Location, tmp_path: Path, compression: Compression) -> None:
    written = [batch(1000, 1), batch(0), batch(7, 2)]
    with ShardWriter(store, "part", SCHEMA, metadata={"vocab": "151936"}, compression=compression) as writer:
        for one in written:
            writer.write(one)
    entry = writer.entry
    assert store.names(recursive=True) == [entry.name]
    assert entry.name.startswith("data/part-")
    assert entry.facts == {"rows": 1007, "batches": 3}
    data = store.read(entry.name)
    assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    path = fetch(store, entry, tmp_path / "staging")
    assert [one.equals(two) for one, two in zip(read_batches(path), written, strict=True)] == [True] * 3
    table = read_shard(path)
    assert table.equals(pa.Table.from_batches(written, SCHEMA))
    assert table.schema.metadata[b"vocab"] == b"151936"


def test_large_and_small_writes_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "GATHER_BYTES", 512)
    store = open_location(str(tmp_path))
    with ShardWriter(store, "part", SCHEMA, compression=None) as writer:
        for rows in (1, 500, 3, 90):
            writer.write(batch(rows))
    assert read_shard(fetch(store, writer.entry, tmp_path)).num_rows == 594


def test_an_empty_shard_is_a_shard(store: Location, tmp_path: Path) -> None:
    with ShardWriter(store, "part", SCHEMA) as writer:
        pass
    table = read_shard(fetch(store, writer.entry, tmp_path))
    assert (table.num_rows, table.schema.names) == (0, SCHEMA.names)


def test_two_shards_of_one_stem_have_two_names(tmp_path: Path) -> None:
    store = open_location(str(tmp_path))
    for _ in range(2):
        with ShardWriter(store, "part", SCHEMA) as writer:
            writer.write(batch(1))
    assert len(store.names(recursive=True)) == 2


def test_nothing_is_there_before_the_end_or_after_an_exception(store: Location) -> None:
    writer = ShardWriter(store, "part", SCHEMA)

    def stopped() -> None:
        with writer:
            writer.write(batch(1000))
            assert store.names(recursive=True) == []
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert store.names(recursive=True) == []
    assert store.sweep(older_than_seconds=0) == []
    assert not writer._path.exists()


def test_a_batch_of_another_schema_is_refused(tmp_path: Path) -> None:
    other = pa.record_batch({"id": pa.array([1], pa.int64())})
    with pytest.raises(TypeError, match="int64"), ShardWriter(open_location(str(tmp_path)), "part", SCHEMA) as writer:
        writer.write(other)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def extension_fields() -> list[pa.Field]:
    marked = {"ARROW:extension:name": "someone.elses"}
    return [
        pa.field("x", pa.uuid()),
        pa.field("x", pa.list_(pa.uuid())),
        pa.field("x", pa.struct([("deep", pa.list_(pa.json_()))])),
        pa.field("x", pa.int32(), metadata=marked),
        pa.field("x", pa.list_(pa.field("item", pa.int32(), metadata=marked))),
    ]


@pytest.mark.parametrize("field", extension_fields(), ids=str)
def test_extension_types_are_neither_written_nor_read(tmp_path: Path, field: pa.Field) -> None:
    schema = pa.schema([field])
    with pytest.raises(TypeError, match="extension"):
        ShardWriter(open_location(str(tmp_path)), "part", schema)
    path = tmp_path / "x.arrow"
    with pa.ipc.new_file(str(path), schema.with_metadata({shards.VERSION_KEY: shards.VERSION})):
        pass
    for read in (read_shard, lambda path: list(read_batches(path))):
        with pytest.raises(CorruptArtifactError, match="extension type"):
            read(path)


@pytest.mark.parametrize("metadata", [None, {"distft.shard": "2"}, {"other": "1"}])
def test_an_unknown_version_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "x.arrow"
    with pa.ipc.new_file(str(path), SCHEMA.with_metadata(metadata)):
        pass
    with pytest.raises(CorruptArtifactError, match="shard version"):
        read_shard(path)


@pytest.mark.parametrize("offsets", [(0, 111, 1_000_000), (0, -5, 222), (0, 223, 222)])
def test_offsets_that_point_outside_are_refused(tmp_path: Path, offsets: tuple[int, ...]) -> None:
    """The two last are found by full validation alone: they would be read as lists of the wrong values, or crash."""
    store = open_location(str(tmp_path))
    schema = pa.schema([("ids", pa.list_(pa.uint32()))])
    with ShardWriter(store, "part", schema, compression=None) as writer:
        writer.write(pa.record_batch({"ids": pa.array([[7] * 111, [7] * 111], schema.field("ids").type)}, schema=schema))
    data = store.read(writer.entry.name)
    good = np.array([0, 111, 222], "<i4").tobytes()
    assert data.count(good) == 1
    (tmp_path / "bad.arrow").write_bytes(data.replace(good, np.array(offsets, "<i4").tobytes()))
    for read in (read_shard, lambda path: list(read_batches(path))):
        with pytest.raises(CorruptArtifactError, match="not a sound Arrow file"):
            read(tmp_path / "bad.arrow")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_shard_is_refused(tmp_path: Path, length: int) -> None:
    store = open_location(str(tmp_path))
    with ShardWriter(store, "part", SCHEMA) as writer:
        writer.write(batch(10))
    path = tmp_path / "cut.arrow"
    path.write_bytes(store.read(writer.entry.name)[:length])
    with pytest.raises(CorruptArtifactError):
        read_shard(path)
    store.replace(writer.entry.name, store.read(writer.entry.name)[:length])
    with pytest.raises(CorruptArtifactError, match="bytes, not"):
        fetch(store, writer.entry, tmp_path)


def test_every_flipped_byte_of_a_shard_is_found_before_it_is_parsed(tmp_path: Path) -> None:
    store = open_location(str(tmp_path))
    with ShardWriter(store, "part", SCHEMA) as writer:
        writer.write(batch(3))
    good = store.read(writer.entry.name)
    for position in range(0, len(good), 7):
        store.replace(writer.entry.name, good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        with pytest.raises(CorruptArtifactError, match="sha256"):
            fetch(store, writer.entry, tmp_path)
