"""Scores to Arrow columns and back. A row is a document; every column is a list of plain primitives, so that nothing in a file can
run code, and ids ascend within a token, so that Arrow's own compression works on them.

The ids and log-probabilities of a document lie flat, `counts` of them per token. Log-probabilities are float16 (relative error
2^-11); with the tail in float32 the kept mass and the tail may then miss 1 by 1e-3, so `sparse_rows` divides by their sum.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distft.errors import CorruptArtifactError
from distft.store.shards import open_shard, read_shard
from distft.teacher.scores import Scores

DOCUMENTS_PER_BATCH = 64
VALUES_PER_BATCH = 1 << 26

COLUMNS: dict[str, pa.DataType] = {
    "positions": pa.uint32(),
    "label_logprob": pa.float32(),
    "entropy": pa.float32(),
    "rank": pa.uint32(),
    "tail": pa.float32(),
    "counts": pa.uint16(),
    "ids": pa.uint32(),
    "logprobs": pa.float16(),
    "hidden": pa.uint16(),
}

SCHEMA = pa.schema(
    [("digest", pa.string()), ("tokens", pa.uint32()), *((name, pa.list_(kind)) for name, kind in COLUMNS.items())]
)


def to_batch(digests: Sequence[str], lengths: Sequence[int], scores: Sequence[Scores]) -> pa.RecordBatch:
    """Documents as one record batch."""
    columns: list[pa.Array] = [pa.array(digests, pa.string()), pa.array(lengths, pa.uint32())]
    for name, kind in COLUMNS.items():
        values = [getattr(score, name) for score in scores]
        ends = np.concatenate([[0], np.cumsum([len(value) for value in values], dtype=np.int64)])
        flat = np.concatenate(values) if values else np.zeros(0)
        # Arrow refuses an offset beyond 2^31 here; a cast in numpy would wrap it
        columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(flat, kind)))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


class RecordBatches:
    """Gathers consecutive documents into record batches: few enough to be read at once, and within Arrow's 32-bit offsets."""

    def __init__(self) -> None:
        self._open: list[tuple[Any, Scores]] = []
        self._values = 0

    def add(self, rows: Iterable[tuple[Any, Scores]]) -> Iterator[list[tuple[Any, Scores]]]:
        """Takes documents and gives those batches that are full."""
        for row in rows:
            more = len(row[1].ids) + len(row[1].hidden)
            if self._open and (len(self._open) >= DOCUMENTS_PER_BATCH or self._values + more > VALUES_PER_BATCH):
                yield self.rest()
            self._open.append(row)
            self._values += more

    def rest(self) -> list[tuple[Any, Scores]]:
        """The batch that is open, which may have no documents; a new one begins."""
        done, self._open, self._values = self._open, [], 0
        return done


class PlainShard:
    """The documents of a shard in plain form, by row. It holds a few numbers per batch: what a batch says is looked up when one of its
    documents is read, without copying."""

    def __init__(self, table: pa.Table, *, where: str) -> None:
        batches = table.to_batches()
        self._open(table.schema, batches, batches.__getitem__, where)

    @classmethod
    def mapped(cls, path: Path, *, where: str) -> PlainShard:
        """A file that is memory-mapped, and checked down to its last offset once. The map survives the file's name."""
        shard, reader = cls.__new__(cls), open_shard(path)
        batches = read_shard(path).to_batches()
        shard._open(reader.schema, batches, reader.get_batch, where)
        return shard

    def _open(self, schema: pa.Schema, batches: list[pa.RecordBatch], batch: Callable[[int], pa.RecordBatch], where: str) -> None:
        if schema.names != SCHEMA.names or not schema.equals(SCHEMA, check_metadata=False):
            raise CorruptArtifactError(f"Columns {schema.names} are not those of a teacher shard.", where=where)
        if any(column.null_count or _values(column).null_count for one in batches for column in one.columns):
            raise CorruptArtifactError("A teacher shard has values that are missing.", where=where)
        self.where, self._batch, self._count = where, batch, len(batches)
        self._last: tuple[int, _Batch] | None = None
        self._starts = [0, *accumulate(len(one) for one in batches)]

    def __len__(self) -> int:
        return self._starts[-1]

    def digests(self) -> list[str]:
        """Of all documents, read anew each time."""
        return [digest for at in range(self._count) for digest in self._batch(at).column("digest").to_pylist()]

    def read(self, row: int) -> tuple[str, int, Scores]:
        """One document: its digest, token count and scores, without copying. Lengths and counts are checked before they are used."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        number = bisect_right(self._starts, row) - 1
        batch, place = self._opened(number), row - self._starts[number]
        columns = {name: batch.lists[name].row(place, kind) for name, kind in _KINDS.items()}
        scores = Scores(**columns)
        tokens = len(scores.positions)
        uneven = [name for name in ("label_logprob", "entropy", "rank", "tail", "counts") if len(columns[name]) != tokens]
        kept = int(scores.counts.sum(dtype=np.int64))
        if len(scores.hidden) % max(1, tokens):
            uneven.append("hidden")
        if uneven or kept != len(scores.ids) or kept != len(scores.logprobs):
            raise CorruptArtifactError(
                f"Row {row} has {tokens} positions, other columns of another length ({', '.join(uneven) or 'none'}), and promises "
                f"{kept} entries where {len(scores.ids)} ids and {len(scores.logprobs)} log-probabilities are.", where=self.where,
            )  # fmt: skip
        return batch.digest[place].as_py(), batch.tokens[place].as_py(), scores

    def _opened(self, number: int) -> _Batch:
        """The batch, for whose next document, if that is the next to be read, nothing is looked up again."""
        last = self._last
        if last is None or last[0] != number:
            last = self._last = (number, _Batch(self._batch(number)))
        return last[1]


_KINDS: dict[str, np.dtype[Any]] = {name: np.dtype(kind.to_pandas_dtype()) for name, kind in COLUMNS.items()}
_START_AND_END = Struct("=ii").unpack_from


class _Batch:
    """A batch taken apart."""

    __slots__ = ("digest", "lists", "tokens")

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.digest, self.tokens, *lists = batch.columns
        self.lists = dict(zip(COLUMNS, (_Lists(column) for column in lists), strict=True))


class _Lists:
    """A list column without nulls. Straight from its buffers: `to_numpy` takes ten times as long."""

    __slots__ = ("first", "first_value", "offsets", "values")

    def __init__(self, column: pa.ListArray) -> None:
        _, self.offsets, _, self.values = column.buffers()
        self.first, self.first_value = column.offset, column.values.offset

    def row(self, row: int, kind: np.dtype[Any]) -> npt.NDArray[Any]:
        """A view of one list."""
        start, end = _START_AND_END(self.offsets, 4 * (self.first + row))
        if start == end:
            return np.empty(0, kind)
        return np.frombuffer(self.values, kind, end - start, (self.first_value + start) * kind.itemsize)


def _values(column: pa.Array) -> pa.Array:
    return column.values if isinstance(column, pa.ListArray) else column
