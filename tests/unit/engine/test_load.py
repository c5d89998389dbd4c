"""A model whose forward does something to its logits that we do not know is refused, in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distft.engine.load import take_apart
from distft.errors import ModelError
from tests.helpers.stores import loaded, shared_model


def altered(whole: Any, change: float) -> Any:
    """The model, its own logits multiplied by 1 + change behind our back."""
    plain = whole.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * (1 + change)
        return output

    whole.forward = forward
    return whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unknown_shaping_of_logits_is_refused(dtype: str) -> None:
    whole = loaded(shared_model(), dtype=dtype).whole
    assert take_apart(whole, head_rows=280, where="m").head.weight.dtype == getattr(torch, dtype)
    with pytest.raises(ModelError, match="does something to its logits"):
        take_apart(altered(whole, 0.05), head_rows=280, where="m")
