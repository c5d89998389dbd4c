"""What scoring costs above the forward pass and head that it cannot do without.

python -m pytest -m bench tests/bench/scoring_speed.py -s
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distft.config.schema import Distribution, Hidden, NoDistribution, Sample, TopK
from distft.engine.load import LanguageModel, take_apart
from distft.engine.pack import lay_out, pack
from distft.objectives.loss import chunk_tokens
from distft.teacher.forward import score_documents
from tests.bench.ratios import HEADER, compare

VOCABULARY, WIDTH, LAYERS, LENGTHS = 49_152, 576, 30, (96, 160, 128, 64, 64)
POLICIES: dict[str, Distribution] = {
    "signals alone": NoDistribution(kind="none"),
    "top-128 above 1e-3 (default)": TopK(),
    "top-64, no floor": TopK(k=64, min_prob=0.0),
    "50 draws": Sample(kind="sample"),
    "hidden states": Hidden(kind="hidden"),
}


def model() -> LanguageModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return take_apart(whole, head_rows=VOCABULARY, where="bench")


@pytest.mark.bench
def test_what_scoring_costs_above_forward_and_head() -> None:
    torch.set_num_threads(1)
    teacher, random = model(), np.random.default_rng(0)
    documents = [random.integers(0, VOCABULARY, length).astype(np.uint32) for length in LENGTHS]
    places = [np.arange(1, length, dtype=np.uint32) for length in LENGTHS]
    packed = pack(documents, lay_out(LENGTHS))

    def alone() -> None:
        with torch.no_grad():
            hidden, size = teacher.hidden(packed), chunk_tokens(VOCABULARY)
            for start in range(0, sum(LENGTHS) - len(LENGTHS), size):
                teacher.shape.logits(hidden[start : start + size], teacher.head.weight, None)

    print(f"\nscoring: {sum(LENGTHS)} tokens, {LAYERS} layers of {WIDTH}, {VOCABULARY:,} rows, float32, one thread\n{HEADER}")
    for name, policy in POLICIES.items():
        found = score_documents(teacher, documents, places, policy)
        entries = sum(len(scores.ids) for scores in found) / sum(len(scores.positions) for scores in found)
        ratio = compare(alone, lambda policy=policy: score_documents(teacher, documents, places, policy))
        print(ratio.row(f"A forward+head, B {name}, {entries:.0f} kept"))
