"""Scores on disk are the scores that were put there, and columns that contradict each other are refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.errors import CorruptArtifactError
from distft.store.location import open_location
from distft.store.manifest import fetch
from distft.store.shards import ShardWriter, read_shard
from distft.teacher import encode
from distft.teacher.encode import COLUMNS, SCHEMA, PlainShard, RecordBatches, to_batch
from distft.teacher.forward import Scores


def scores_of(counts: list[int], seed: int = 0) -> Scores:
    random, tokens, kept = np.random.default_rng(seed), len(counts), sum(counts)
    return Scores(
        positions=np.sort(random.choice(1000, tokens, replace=False)).astype(np.uint32),
        label_logprob=-random.random(tokens).astype(np.float32) * 20, entropy=random.random(tokens).astype(np.float32),
        rank=random.integers(0, 2**20, tokens).astype(np.uint32), tail=random.random(tokens).astype(np.float32),
        counts=np.array(counts, np.uint16),
        ids=np.concatenate([np.zeros(0), *(np.sort(random.choice(2**18, c, replace=False)) for c in counts)]).astype(np.uint32),
        logprobs=(-random.random(kept) * 10).astype(np.float16),
    )  # fmt: skip


def assert_equal(one: Scores, two: Scores) -> None:
    for field in fields(Scores):
        before, after = getattr(one, field.name), getattr(two, field.name)
        assert before.dtype == after.dtype, field.name
        assert before.tolist() == after.tolist(), field.name


documents = st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(batches=st.lists(documents, min_size=1, max_size=3), cut=st.integers(0, 5))
def test_what_is_written_is_what_is_read(batches: list[list[list[int]]], cut: int) -> None:
    """Also through a table of several batches, and through one that was sliced."""
    made = [[scores_of(counts, seed=seed) for seed, counts in enumerate(batch)] for batch in batches]
    table = pa.Table.from_batches(
        [
            to_batch([f"{b}.{n}" for n in range(len(batch))], [1001 + n for n in range(len(batch))], batch)
            for b, batch in enumerate(made)
        ]
    )
    flat = [(f"{b}.{n}", 1001 + n, scores) for b, batch in enumerate(made) for n, scores in enumerate(batch)]
    for row, (digest, length, scores) in enumerate(flat):
        found = PlainShard(table, where="memory").read(row)
        assert found[:2] == (digest, length)
        assert_equal(found[2], scores)
    cut = min(cut, len(flat) - 1)
    assert_equal(PlainShard(table.slice(cut), where="memory").read(0)[2], flat[cut][2])
    with pytest.raises(IndexError):
        PlainShard(table, where="memory").read(len(flat))


def test_ids_of_the_largest_vocabularies_fit() -> None:
    one = scores_of([3])
    one.ids[:] = [0, 2**17 + 1, 2**20 - 1]
    assert_equal(PlainShard(pa.Table.from_batches([to_batch(["a"], [9], [one])]), where="memory").read(0)[2], one)


def test_every_column_is_a_list_of_plain_primitives() -> None:
    assert all(pa.types.is_primitive(kind) for kind in COLUMNS.values())
    assert not any(isinstance(field.type, pa.BaseExtensionType) for field in SCHEMA)


def with_column(name: str, values: list) -> pa.Table:
    """A shard of one document, in which one column was exchanged."""
    table = pa.Table.from_batches([to_batch(["a"], [1001], [scores_of([2, 0, 3])])])
    index = table.schema.get_field_index(name)
    return table.set_column(index, SCHEMA.field(name), pa.array([values], SCHEMA.field(name).type))


WRONG = {
    "a count too high": ("counts", [2, 1, 3]),
    "a count too low": ("counts", [2, 0, 2]),
    "a token without a count": ("counts", [2, 3]),
    "an entry without an id": ("ids", [1, 2, 3, 4]),
    "an entry too many": ("logprobs", [np.float16(-1)] * 6),
    "a label short": ("label_logprob", [-1.0, -2.0]),
    "an entropy short": ("entropy", [1.0, 2.0]),
    "a rank too many": ("rank", [1, 2, 3, 4]),
    "no tail": ("tail", []),
    "a position short": ("positions", [1, 2]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_columns_that_contradict_each_other_are_refused(wrong: str) -> None:
    with pytest.raises(CorruptArtifactError, match="Row 0") as caught:
        PlainShard(with_column(*WRONG[wrong]), where="here").read(0)
    assert caught.value.where == "here"


def test_other_columns_are_refused() -> None:
    table = pa.Table.from_batches([to_batch(["a"], [9], [scores_of([1])])])
    with pytest.raises(CorruptArtifactError, match="are not those"):
        PlainShard(table.drop_columns(["tail"]), where="here").read(0)
    with pytest.raises(CorruptArtifactError, match="are not those"):
        PlainShard(table.select([*table.schema.names[::-1]]), where="here").read(0)


@pytest.mark.parametrize("offsets", [[0, 50], [0, -1], [4, 2], [-3, 5]])
def test_offsets_that_point_outside_are_refused_before_they_are_used(tmp_path: Path, offsets: list[int]) -> None:
    """A shard whose sha256 is right and whose offsets are not: made by someone else."""
    batch = to_batch(["a"], [1001], [scores_of([2, 0, 3])])
    memory = np.array([0, 5], np.int32)
    bad = pa.ListArray.from_buffers(pa.list_(pa.uint32()), 1, [None, pa.py_buffer(memory)], children=[batch.column("ids").values])
    columns = [bad if name == "ids" else batch.column(name) for name in SCHEMA.names]
    damaged = pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
    memory[:] = offsets  # behind pyarrow's back, which checks what it makes
    store = open_location(str(tmp_path))
    with ShardWriter(store, "part", SCHEMA, compression=None) as writer:
        writer.write(damaged)
    with pytest.raises(CorruptArtifactError):
        read_shard(fetch(store, writer.entry, tmp_path / "staging"))


@pytest.mark.parametrize(("counts", "expected"), [
    ([], []),
    ([[5]], [1]),
    ([[99]], [1]),
    ([[3], [3], [4], [1], [9], [99], [1]], [3, 2, 1, 1]),
    ([[]] * 9, [4, 4, 1]),
])  # fmt: skip
def test_batches_stay_below_the_offsets_reach(
    counts: list[list[int]], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "VALUES_PER_BATCH", 10)
    monkeypatch.setattr(encode, "DOCUMENTS_PER_BATCH", 4)
    batches = RecordBatches()
    found = [*batches.add((number, scores_of(one)) for number, one in enumerate(counts)), batches.rest()]
    assert [len(part) for part in found if part] == expected
    assert [number for part in found for number, _ in part] == list(range(len(counts)))
    assert batches.rest() == []


class Endless:
    """A column whose length alone is asked for before the offsets are made."""

    def __len__(self) -> int:
        return 2**30


def test_an_offset_that_does_not_fit_is_an_error_not_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "COLUMNS", {"positions": pa.uint32()})
    endless = [SimpleNamespace(positions=Endless()) for _ in range(3)]
    plain = np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda parts: np.zeros(0) if isinstance(parts[0], Endless) else plain(parts))
    with pytest.raises(pa.ArrowInvalid, match="2147483648 not in range"):
        to_batch(["a", "b", "c"], [1, 1, 1], endless)  # pyright: ignore[reportArgumentType]
