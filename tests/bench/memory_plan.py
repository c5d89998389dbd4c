"""The memory that a plan predicts against what training takes: per rank, above what the process has before it begins.

python -m pytest -m bench -s tests/bench/memory_plan.py

Two steps with a checkpoint after each, on a CPU, where device and host are one. Shapes are those of small models with the vocabularies
of larger ones; the weights are random, which changes no size.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.peaks import Trained, made, peaks, predicted

SMALL = {
    "hidden": 384, "layers": 8, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 32_000,
}  # fmt: skip
"""25 million parameters."""
QWEN = {
    "family": "qwen3", "hidden": 384, "layers": 10, "intermediate_size": 1152, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 64, "vocab_size": 49_152, "tied": False,
}  # fmt: skip
"""56 million, of which two thirds are embedding and head."""
DEEP = {
    "hidden": 576, "layers": 18, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": 49_152,
}  # fmt: skip
"""92 million: SmolLM2-135M with fewer layers."""


def case(
    name: str, shape: dict[str, Any], dtype: str, engine: str, tokens: int, *, ranks: int = 1, lengths: tuple[int, ...] = (256,),
    passes: int = 2, **train: Any,
) -> Trained:  # fmt: skip
    """Two steps, each of so many micro-batches a rank."""
    step = passes * ranks * tokens
    documents = [*lengths] * (2 * step // sum(lengths))
    given = {"engine": engine, "micro_batch_tokens": tokens, "tokens_per_step": step, **train}
    return Trained(name=name, shape=shape, lengths=documents, dtype=dtype, ranks=ranks, train=given)


CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}
OFFLOADED: dict[str, Any] = {"zero3": {"offload_optimizer": True, "offload_parameters": True}}
UNEVEN = (256, 100, 90, 66)
CASES = [
    case("25 M, local, float32, 1,024 tokens", SMALL, "float32", "local", 1_024),
    case("the same, one micro-batch a step", SMALL, "float32", "local", 1_024, passes=1),
    case("the same, rows that documents share", SMALL, "float32", "local", 1_024, lengths=UNEVEN),
    case("the same, bfloat16", SMALL, "bfloat16", "local", 1_024),
    case("25 M, ZeRO-3 on 2 ranks, float32, 512 tokens", SMALL, "float32", "zero3", 512, ranks=2),
    case("25 M, ZeRO-3, bfloat16, all offloaded", SMALL, "bfloat16", "zero3", 512, **OFFLOADED),
    case("56 M untied, local, bfloat16, 512 tokens", QWEN, "bfloat16", "local", 512),
    case("56 M untied, ZeRO-3 on 1 rank, float32", QWEN, "float32", "zero3", 512),
    case("56 M untied, ZeRO-3 on 2 ranks, bfloat16", QWEN, "bfloat16", "zero3", 512, ranks=2),
    case("92 M, local, float32, checkpointing, 512 tokens", DEEP, "float32", "local", 512, **CHECKPOINTING),
    case("92 M, local, bfloat16, checkpointing, 512 tokens", DEEP, "bfloat16", "local", 512, **CHECKPOINTING),
    case("92 M, ZeRO-3 on 2 ranks, bfloat16, 256 tokens", DEEP, "bfloat16", "zero3", 256, ranks=2),
]


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_what_a_plan_says_of_memory(tmp_path: Path) -> None:
    print(f"\nmemory of a rank, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<52}{'predicted':>10}{'measured':>10}{'ratio':>8}   fullest in the")
    worst = 0.0
    for number, one in enumerate(CASES):
        real = made(tmp_path / f"{number}-real", one)
        said = predicted(one, real)
        total, found = said.device_bytes + said.host_bytes, peaks(tmp_path / f"{number}", one, real)
        for measured in sorted({min(found), max(found)}):
            ratio = total / measured
            worst = max(worst, abs(ratio - 1))
            print(f"{one.name:<52}{total / 1e6:>7.0f} MB{measured / 1e6:>7.0f} MB{ratio:>8.3f}   {said.moment}", flush=True)
    print(f"the worst is {worst:.1%} off")


TEACHER = {
    "hidden": 768, "layers": 12, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
    "vocab_size": 32_000,
}  # fmt: skip
"""110 million parameters."""
STUDENT = {**SMALL, "hidden": 256, "layers": 4, "intermediate_size": 640, "num_attention_heads": 4}
"""11 million."""
ENTRIES: dict[str, Any] = {"distribution": {"kind": "topk", "k": 64, "min_prob": 0.0}}


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_what_a_cached_teacher_takes_while_training(tmp_path: Path) -> None:
    """The same documents without a teacher, with the cache of one of the student's size, and with that of one ten times as large."""
    plain = case("sft", STUDENT, "float32", "local", 1_024)
    ways = {
        "sft": plain,
        "sft_kl, a teacher of 11 M": _held(plain, STUDENT),
        "sft_kl, a teacher of 110 M": _held(plain, TEACHER),
    }
    print(f"\ntraining 11 M parameters, 64 entries a token, load {os.getloadavg()[0]:.1f}")
    least = 0
    for number, (name, one) in enumerate(ways.items()):
        [found] = peaks(tmp_path / f"{number}", one, made(tmp_path / f"{number}-real", one))
        least = least or found
        print(f"{name:<32}{found / 1e6:>7.1f} MB   {found / least:.3f} of sft", flush=True)


def _held(plain: Trained, teacher: dict[str, Any]) -> Trained:
    return replace(plain, objective={"kind": "sft_kl"}, teacher=teacher, score=ENTRIES)
