"""Bytes, arithmetic and memory, from the run file and the model's headers alone.

Every constant says where it is from. Estimates, for choosing hardware; the figures of a finished stage replace them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.config.schema import NoDistribution, Run, Sample

H100_FLOPS = 989e12
UTILISATION = 0.4
"""Of dense bf16 peak; full-weight fine-tunings of 7B-8B models on H100 are published at 0.33 to 0.46."""

HEAD_BUFFER_BYTES = 3 << 27
"""Three [chunk, vocabulary] buffers of `objectives.loss.CHUNK_BYTES`, repeated here so that a plan needs no torch; a test compares."""

SIGNAL_BYTES = 22
"""Position, log q(y), entropy, rank, tail and count of one token, before compression."""
ENTRY_BYTES = 6
DISTINCT_DRAWS = 8
"""Mean distinct ids among 50 stratified draws."""
FLOOR_ENTRIES = 22
"""Mean kept entries a token at min_prob 1e-3 (17 to 26 on three corpora with a 135M model; sharper teachers keep fewer)."""
COMPRESSED = 0.75
"""What zstd leaves of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    parameters: int
    teacher_bytes_per_token: float
    memory_per_rank: int
    """Bytes: weights, gradients, both moments, activations of one micro-batch, and the loss head."""
    score_hours: float | None
    train_hours: float | None
    """On one H100; None until the corpus is tokenised."""

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def estimate(run: Run, *, parameters: int, config: dict[str, Any], tokens: int | None, trained_tokens: int | None) -> Estimate:
    """`tokens` are all that the teacher reads, `trained_tokens` those of one epoch."""
    passes = 8 if run.train.gradient_checkpointing else 6
    pace = H100_FLOPS * UTILISATION * 3600
    return Estimate(
        parameters=parameters,
        teacher_bytes_per_token=teacher_bytes_per_token(run),
        memory_per_rank=memory_per_rank(run, parameters, config),
        score_hours=None if tokens is None else 2 * parameters * tokens / pace,
        train_hours=None if trained_tokens is None else passes * parameters * _all_tokens(run, trained_tokens) / pace,
    )


def _all_tokens(run: Run, epoch_tokens: int) -> int:
    tokens = epoch_tokens * run.train.epochs
    return tokens if run.train.max_steps is None else min(tokens, run.train.max_steps * run.train.tokens_per_step)


def teacher_bytes_per_token(run: Run) -> float:
    policy = run.score.distribution
    if isinstance(policy, NoDistribution):
        return SIGNAL_BYTES * COMPRESSED
    if isinstance(policy, Sample):
        return (SIGNAL_BYTES + DISTINCT_DRAWS * (policy.draws / 50) ** 0.5 * ENTRY_BYTES) * COMPRESSED
    entries = policy.k if policy.min_prob == 0 else min(policy.k, FLOOR_ENTRIES * (1e-3 / policy.min_prob) ** 0.5)
    return (SIGNAL_BYTES + entries * ENTRY_BYTES) * COMPRESSED


def memory_per_rank(run: Run, parameters: int, config: dict[str, Any]) -> int:
    """The local engine: every rank holds all. float32 takes 16 bytes a parameter (weight, gradient, two moments); bfloat16 20
    (weight and gradient in two bytes each, and float32 master, gradient sum, two moments)."""
    half = run.model.dtype == "bfloat16"
    layers, width = int(config.get("num_hidden_layers", 0)), int(config.get("hidden_size", 0))
    # 34 bytes per token, layer and unit of width in half precision without the attention matrix (Korthikanti et al. 2022, eq. 2)
    per_token = 2 * width * layers if run.train.gradient_checkpointing else 34 * width * layers
    activations = per_token * (1 if half else 2) * run.train.micro_batch_tokens
    head = HEAD_BUFFER_BYTES + 4 * int(config.get("vocab_size", 0)) * width
    return (20 if half else 16) * parameters + activations + head
