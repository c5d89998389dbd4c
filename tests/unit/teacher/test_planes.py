"""The stored form of a teacher's columns loses nothing, is smaller, and what does not fit together in it is refused."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.errors import CorruptArtifactError
from distft.teacher.encode import SCHEMA, to_batch
from distft.teacher.forward import Scores
from distft.teacher.planes import from_planes, stored_schema, to_planes
from tests.unit.teacher.test_encode import scores_of

documents = st.lists(st.lists(st.integers(0, 12), max_size=8), max_size=6)


def batch_of(made: list[Scores]) -> pa.RecordBatch:
    return to_batch([str(n) for n in range(len(made))], [1001 + n for n in range(len(made))], made)


@settings(max_examples=150, deadline=None)
@given(counts=documents, seed=st.integers(0, 99), cut=st.integers(0, 5))
def test_what_goes_in_comes_out(counts: list[list[int]], seed: int, cut: int) -> None:
    """Empty batches, documents and tokens included, and a batch that is a slice of another."""
    batch = batch_of([scores_of(one, seed=seed + n) for n, one in enumerate(counts)])
    for some in (batch, batch.slice(min(cut, batch.num_rows))):
        stored = to_planes(some)
        stored.validate(full=True)
        back = from_planes(stored, SCHEMA, where="here")
        back.validate(full=True)
        assert back.to_pylist() == some.to_pylist()
        assert back.schema == SCHEMA


def test_the_extremes_of_every_type() -> None:
    one = scores_of([3, 2])
    one.ids[:] = [0, 2**31, 2**32 - 1, 5, 2**32 - 2]
    one.positions[:] = [1, 2**32 - 1]
    one.rank[:] = [0, 2**32 - 1]
    one.label_logprob[:] = [np.float32(-0.0), np.float32(-3.4e38)]
    one.entropy[:] = [np.float32(1e-45), np.float32(np.inf)]
    one.logprobs[:3] = [np.float16(-0.0), np.float16(-65504), np.float16(-6e-8)]
    batch = batch_of([one, scores_of([1], seed=1)])
    back = from_planes(to_planes(batch), SCHEMA, where="here")
    for name in ("ids", "positions", "rank", "label_logprob", "entropy", "logprobs"):
        assert back.column(name).values.to_numpy().tobytes() == batch.column(name).values.to_numpy().tobytes(), name


def test_ids_that_ascend_cost_less() -> None:
    """The reason for it all: even with ids at random a batch takes less than its plain columns."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(20):
        one = scores_of([16] * 50)
        one.ids[:] = np.sort(random.integers(0, 50_000, (50, 16)), axis=1).reshape(-1)
        one.logprobs[:] = np.log(random.dirichlet(np.full(16, 0.3), 50) + 1e-3).reshape(-1)
        made.append(one)

    def size(batch: pa.RecordBatch) -> int:
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
            out.write_batch(batch)
        return len(sink.getvalue())

    batch = batch_of(made)
    assert size(to_planes(batch)) < 0.9 * size(batch)


def replaced(name: str, values: list[int], document: int = 0) -> pa.RecordBatch:
    """A stored batch in which one column of one document was exchanged."""
    stored = to_planes(batch_of([scores_of([2, 0, 3]), scores_of([1, 1])]))
    column = stored.column(name).to_pylist()
    column[document] = values
    return stored.set_column(stored.schema.get_field_index(name), name, pa.array(column, pa.list_(pa.uint8())))


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("ids.1", [0] * 4, "planes of ids have different lengths"),
        ("entropy.3", [0] * 4, "planes of entropy have different lengths"),
        ("counts.0", [2, 0, 4], "runs of ids do not fill"),
        ("counts.0", [2, 0, 2], "runs of ids do not fill"),
        ("counts.1", [1, 0, 0], "runs of ids do not fill"),
    ],
)
def test_planes_that_contradict_each_other_are_refused(name: str, values: list[int], says: str) -> None:
    with pytest.raises(CorruptArtifactError, match=says) as told:
        from_planes(replaced(name, values), SCHEMA, where="here")
    assert told.value.where == "here"


def test_other_columns_are_refused() -> None:
    stored = to_planes(batch_of([scores_of([1])]))
    with pytest.raises(CorruptArtifactError, match="are not those"):
        from_planes(stored.drop_columns(["ids.2"]), SCHEMA, where="here")
    with pytest.raises(CorruptArtifactError, match="are not those"):
        from_planes(batch_of([scores_of([1])]), SCHEMA, where="here")


def test_the_stored_form_is_plain_bytes() -> None:
    lists = [field for field in stored_schema(SCHEMA) if pa.types.is_list(field.type)]
    assert len(lists) == 4 * 6 + 2 * 3  # six columns of four bytes; counts, log-probabilities and hidden states of two
    assert all(field.type.value_type == pa.uint8() for field in lists)
