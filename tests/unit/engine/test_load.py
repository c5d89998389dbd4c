"""A model whose forward does something to its logits that we do not know is refused, in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distft.engine.load import take_apart
from distft.engine.sharded import blank_model, check_one_dtype
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


def test_an_architecture_with_weights_of_two_dtypes_is_refused_where_all_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared_model()
    blank = blank_model(folder, dtype="bfloat16")
    check_one_dtype(folder, blank, "bfloat16")
    monkeypatch.setattr(blank, "_keep_in_fp32_modules_strict", {"layers.*.input_layernorm"})
    check_one_dtype(folder, blank, "float32")
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM keeps 2 weights in float32 \(model.layers.0.input_layernorm.weight, "
    ):
        check_one_dtype(folder, blank, "bfloat16")
