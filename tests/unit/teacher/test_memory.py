"""What scoring holds in memory, measured in a process of its own: a chunk of logits, never a document's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, TOKENS = 262_144, 4_096
"""Gemma's vocabulary. A document's logits would be 4 GiB in float32."""
LIMIT = 2 << 30

SCRIPT = """
import json, sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from distft.config.schema import Score
from distft.engine.load import take_apart
from distft.teacher.forward import score_documents

rows, tokens, policy = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, max_position_embeddings=tokens, tie_word_embeddings=True)
torch.manual_seed(0)
model = take_apart(LlamaForCausalLM(config).to(torch.bfloat16), head_rows=rows - 100, where="here")
with torch.no_grad():
    model.whole.base_model.norm.weight.mul_(40)
document = np.random.default_rng(0).integers(0, rows - 100, tokens).astype(np.uint32)
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

open("/proc/self/clear_refs", "w").write("5")  # the peak of the process that started this one is no concern of ours
before = peak()
distribution = Score.model_validate({"distribution": policy}).distribution
[scores] = score_documents(model, [document], [np.arange(1, tokens, dtype=np.uint32)], distribution)
assert scores.finite and len(scores) == tokens - 1
assert not len(scores.ids) or int(scores.ids.max()) < rows - 100
print(json.dumps({"before": before, "peak": peak(), "entries": len(scores.ids), "words": len(scores.hidden)}))
"""


@pytest.mark.parametrize(
    "policy", [{"kind": "topk"}, {"kind": "sample", "draws": 50}, {"kind": "hidden"}], ids=lambda p: p["kind"]
)
def test_a_vocabulary_of_262144_is_scored_within_two_gigabytes(policy: dict[str, object]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROWS), str(TOKENS), json.dumps(policy)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["peak"] < LIMIT, found
    assert found["peak"] - found["before"] < 1.2e9, found
    assert found["entries"] > 0 or found["words"] == (TOKENS - 1) * 16
