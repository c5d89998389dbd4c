"""How a teacher's columns lie in the store: so that Arrow's own compression finds what repeats. Without loss, batch by batch.

Two steps, both undone when a shard is staged. Ascending numbers (positions in a document, ids in a token) become their differences.
Then each column of b-byte numbers becomes b columns of bytes, `ids.0` the lowest: high bytes repeat and all but vanish, low bytes are
noise and cost what they must, and zstd, which sees one buffer per column, never has to tell them apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distft.errors import CorruptArtifactError

ASCENDING = {"positions": None, "ids": "counts"}
"""Columns that ascend, and the column that says how many values form one ascending run; None: all of a document."""

Numbers = npt.NDArray[Any]


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """The stored form of a schema: list columns as byte planes, all others as they are."""
    fields: list[pa.Field] = []
    for field in schema:
        if pa.types.is_list(field.type):
            fields += [pa.field(name, pa.list_(pa.uint8())) for name in _planes(field.name, field.type.value_type)]
        else:
            fields.append(field)
    return pa.schema(fields)


def to_planes(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The stored form of a batch."""
    columns: list[pa.Array] = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if not pa.types.is_list(field.type):
            columns.append(column)
            continue
        offsets, values = _parts(column)
        if field.name in ASCENDING:
            values = _differences(values, _run_starts(batch, field.name, offsets))
        for plane in _bytes_of(values):
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(plane)))
    return pa.RecordBatch.from_arrays(columns, schema=stored_schema(batch.schema))


def from_planes(batch: pa.RecordBatch, schema: pa.Schema, *, where: str) -> pa.RecordBatch:
    """The batch as it was, in `schema`. What does not fit together is refused."""
    if batch.schema.names != stored_schema(schema).names:
        raise CorruptArtifactError(f"Columns {batch.schema.names} are not those of a teacher shard.", where=where)
    columns: dict[str, pa.Array] = {}
    for field in schema:
        if not pa.types.is_list(field.type):
            columns[field.name] = batch.column(field.name)
            continue
        parts = [_parts(batch.column(name)) for name in _planes(field.name, field.type.value_type)]
        offsets = parts[0][0]
        if any(not np.array_equal(offsets, other) for other, _ in parts[1:]):
            raise CorruptArtifactError(f"The byte planes of {field.name} have different lengths.", where=where)
        values = _from_bytes([plane for _, plane in parts], np.dtype(field.type.value_type.to_pandas_dtype()))
        columns[field.name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, field.type.value_type))
    for name in ASCENDING.keys() & set(schema.names):
        offsets, values = _parts(columns[name])
        starts = _run_starts(columns, name, offsets)
        if starts is None:
            raise CorruptArtifactError(f"The runs of {name} do not fill their documents.", where=where)
        summed = pa.array(_sums(values, starts), schema.field(name).type.value_type)
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets), summed)
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _planes(name: str, kind: pa.DataType) -> list[str]:
    return [f"{name}.{place}" for place in range(kind.bit_width // 8)]


def _parts(column: pa.ListArray) -> tuple[npt.NDArray[np.int32], Numbers]:
    """Offsets from 0 and flat values of a list column, also of a sliced one."""
    offsets = column.offsets.to_numpy()
    return offsets - offsets[0], column.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]]


def _run_starts(columns: Any, name: str, offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.int64] | None:
    """Where ascending runs begin in the flat values; None when they do not fill each document exactly."""
    counting = ASCENDING[name]
    if counting is None:
        return offsets[:-1].astype(np.int64)
    token_offsets, counts = _parts(columns[counting] if isinstance(columns, dict) else columns.column(counting))
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return ends[:-1] if np.array_equal(ends[token_offsets], offsets) else None


def _differences(values: Numbers, starts: npt.NDArray[np.int64] | None) -> Numbers:
    """Each value less the one before it in its run; the first of a run stays."""
    assert starts is not None, "what is written fits together"
    if not len(values):
        return values
    changed = values.copy()
    changed[1:] -= values[:-1]
    first = starts[starts < len(values)]
    changed[first] = values[first]
    return changed


def _sums(values: Numbers, starts: npt.NDArray[np.int64] | None) -> Numbers:
    """The inverse. Unsigned arithmetic wraps, so the sum over all values need not fit."""
    assert starts is not None, "checked before"
    if not len(values):
        return values
    total = np.cumsum(values, dtype=values.dtype)
    first = np.minimum(starts, len(values) - 1)  # an empty run at the end has no first value, and is repeated no time
    return total - np.repeat(total[first] - values[first], np.diff(np.append(starts, len(values))))


def _bytes_of(values: Numbers) -> list[npt.NDArray[np.uint8]]:
    """Byte planes, lowest first, whatever this machine's byte order."""
    little = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
    table = little.view(np.uint8).reshape(len(values), values.dtype.itemsize)
    return [np.ascontiguousarray(table[:, place]) for place in range(values.dtype.itemsize)]


def _from_bytes(planes: list[Numbers], kind: np.dtype[Any]) -> Numbers:
    table = np.empty((len(planes[0]), len(planes)), np.uint8)
    for place, plane in enumerate(planes):
        table[:, place] = plane
    return table.reshape(-1).view(kind.newbyteorder("<")).astype(kind, copy=False)
