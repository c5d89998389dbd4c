"""Documents into rows: nothing lost, nothing double, nothing over budget, whatever the lengths are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.engine.pack import batches_by_tokens, lay_out, pack

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=30)
QUICK = settings(max_examples=100, deadline=None)


@QUICK
@given(lengths=lengths_lists)
def test_documents_never_overlap_nor_cross_a_row(lengths: list[int]) -> None:
    layout = lay_out(lengths)
    taken = np.zeros(layout.rows * layout.width, np.int64)
    for length, start in zip(lengths, layout.starts, strict=True):
        assert start // layout.width == (start + length - 1) // layout.width
        taken[start : start + length] += 1
    assert taken.sum() == sum(lengths)
    assert taken.max() == 1
    assert layout.width == max(lengths)
    assert layout.rows <= len(lengths)
    assert taken.reshape(layout.rows, layout.width).any(1).all()  # no row is padding alone


@QUICK
@given(lengths=lengths_lists)
def test_rows_hold_the_documents_and_positions_tell_them_apart(lengths: list[int]) -> None:
    documents = [np.arange(100 * n + 1, 100 * n + 1 + length, dtype=np.uint32) for n, length in enumerate(lengths)]
    layout = lay_out(lengths)
    packed = pack(documents, layout)
    tokens, positions = packed.tokens_RL.flatten().numpy(), packed.positions_RL.flatten().numpy()
    for document, start in zip(documents, layout.starts, strict=True):
        assert np.array_equal(tokens[start : start + len(document)], document)
        assert np.array_equal(positions[start : start + len(document)], np.arange(len(document)))
    # A zero is the start of a document, so nothing else may have one; padding goes on counting, so that it starts none.
    assert np.flatnonzero(positions == 0).tolist() == sorted(layout.starts)
    step = np.diff(packed.positions_RL.numpy(), axis=1)
    assert (step[packed.positions_RL.numpy()[:, 1:] != 0] == 1).all()


def test_best_fit_fills_rows_by_hand() -> None:
    """5 and 3+2, and 1 goes where the least room is left: into no full row, so a third."""
    layout = lay_out([3, 5, 2, 1])
    assert (layout.rows, layout.width) == (3, 5)
    assert layout.starts == (5, 0, 8, 10)


@QUICK
@given(lengths=lengths_lists, budget=st.integers(1, 90))
def test_batches_keep_every_document_once_and_their_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_tokens(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        layout = lay_out([lengths[index] for index in batch])
        places = len(batch) * max(lengths[index] for index in batch)
        assert layout.rows * layout.width <= places
        assert places <= budget or len(batch) == 1
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)  # what does not fit in memory fails first


@QUICK
@given(lengths=lengths_lists, budget=st.integers(1, 90))
def test_packing_is_a_function_of_the_lengths(lengths: list[int], budget: int) -> None:
    assert batches_by_tokens(lengths, budget) == batches_by_tokens(list(lengths), budget)
    assert lay_out(lengths) == lay_out(list(lengths))


@pytest.mark.parametrize("budget", [8, 16, 24, 1000])
def test_a_batch_takes_what_fits_and_no_less(budget: int) -> None:
    assert [len(batch) for batch in batches_by_tokens([8] * 12, budget)] == [min(12, budget // 8)] * (12 // min(12, budget // 8))


@QUICK
@given(lengths=lengths_lists, ranks=st.integers(1, 5))
def test_each_place_of_a_shared_row_is_one_ranks_own(lengths: list[int], ranks: int) -> None:
    layout = lay_out(lengths, ranks=ranks)
    assert layout.width % ranks == 0
    assert max(lengths) <= layout.width < max(lengths) + ranks
    places = np.arange(layout.rows * layout.width)
    whole = places.reshape(layout.rows, ranks, -1)
    for rank in range(ranks):
        mine = places[layout.owners(places) == rank]
        assert mine.tolist() == whole[:, rank].flatten().tolist()
        assert layout.own(mine).tolist() == list(range(len(mine)))
