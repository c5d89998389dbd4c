"""What a plan predicts of memory is what training takes. `tests/bench/memory_plan.py` does it for more engines and larger models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.peaks import Trained, made, peaks, predicted

SHAPE = {
    "hidden": 256, "layers": 4, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 32_000,
}  # fmt: skip
"""11 million parameters under a vocabulary of usual size: half a gigabyte, of which no noise is a tenth."""


@pytest.mark.parametrize(("engine", "dtype"), [("local", "float32"), ("zero3", "bfloat16")])
def test_training_takes_what_the_plan_says(tmp_path: Path, engine: str, dtype: str) -> None:
    train = {"engine": engine, "micro_batch_tokens": 768, "tokens_per_step": 1536}
    case = Trained(name=engine, shape=SHAPE, lengths=[256] * 12, dtype=dtype, train=train)
    real = made(tmp_path / "real", case)
    said = predicted(case, real)
    [measured] = peaks(tmp_path, case, real)
    assert measured > 300_000_000
    assert said.device_bytes + said.host_bytes == pytest.approx(measured, rel=0.15)
