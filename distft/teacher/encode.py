"""Scores to Arrow columns and back. A row is a document; every column is a list of plain primitives, so that nothing in a file can
run code, and ids ascend within a token, so that Arrow's own compression works on them.

The ids and log-probabilities of a document lie flat, `counts` of them per token. Log-probabilities are float16 (relative error
2^-11); with the tail in float32 the kept mass and the tail may then miss 1 by 1e-3, so `sparse_rows` divides by their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distft.errors import CorruptArtifactError
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
    """The documents of a shard in plain form, by row. What a row costs beyond its bytes is a few slices: offsets and values are
    looked up once per batch, not once per document."""

    def __init__(self, table: pa.Table, *, where: str) -> None:
        if table.schema.names != SCHEMA.names:
            raise CorruptArtifactError(f"Columns {table.schema.names} are not those of a teacher shard.", where=where)
        self.where = where
        self.digests: list[str] = table.column("digest").to_pylist()
        self.tokens: list[int] = table.column("tokens").to_pylist()
        self._batches = [
            {name: (column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=True)) for name, column in batch.items()}
            for batch in ({name: batch.column(name) for name in COLUMNS} for batch in table.to_batches())
        ]
        self._starts = np.cumsum([0, *(len(batch["positions"][0]) - 1 for batch in self._batches)])

    def __len__(self) -> int:
        return len(self.digests)

    def read(self, row: int) -> tuple[str, int, Scores]:
        """One document: its digest, token count and scores, without copying. Lengths and counts are checked before they are used."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        at = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[at])
        columns: dict[str, npt.NDArray[Any]] = {}
        for name, (offsets, values) in self._batches[at].items():
            columns[name] = values[offsets[place] : offsets[place + 1]]
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
        return self.digests[row], self.tokens[row], scores
