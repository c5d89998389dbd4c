"""A document in a packed row has the hidden states that it has alone, in every kind of attention that differs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distft.engine.base import PackedTokens
from distft.engine.pack import lay_out, pack
from tests.helpers.stores import FAMILIES, loaded, shared_model

LENGTHS = [17, 3, 9, 1, 24, 12, 2, 11]


@pytest.mark.parametrize("end_to_end", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_see_themselves_alone(family: str, attention: str, end_to_end: bool) -> None:
    model = loaded(shared_model(family), attention=attention)
    random = np.random.default_rng(1)
    documents = [random.integers(5, 280, length).astype(np.uint32) for length in LENGTHS]
    layout = lay_out(LENGTHS)
    packed = pack(documents, layout)
    if end_to_end:  # as `hidden` does for flash attention
        packed = PackedTokens(tokens_RL=packed.tokens_RL.reshape(1, -1), positions_RL=packed.positions_RL.reshape(1, -1))
    with torch.no_grad():
        together = model.hidden(packed)
        for document, start in zip(documents, layout.starts, strict=True):
            tokens = torch.from_numpy(document.astype(np.int64))[None]
            alone = model.whole.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
            # float32 sums in another order; entries are of size 1, another document in sight changes them by 0.1 and more
            torch.testing.assert_close(together[start : start + len(document)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_behind_a_document_changes_nothing(attention: str) -> None:
    model = loaded(shared_model("mistral_sliding"), attention=attention)
    short, long = np.arange(5, 12, dtype=np.uint32), np.arange(20, 60, dtype=np.uint32)
    layout = lay_out([len(short), len(long)])
    packed = pack([short, long], layout)
    row = layout.starts[0] // layout.width
    other = packed.tokens_RL.clone()
    other[row, len(short) :] = 7
    with torch.no_grad():
        before = model.hidden(packed).view(layout.rows, layout.width, -1)[row, : len(short)]
        changed = PackedTokens(tokens_RL=other, positions_RL=packed.positions_RL)
        after = model.hidden(changed).view(layout.rows, layout.width, -1)[row, : len(short)]
    assert torch.equal(before, after)
