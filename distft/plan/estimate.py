"""Bytes, arithmetic and memory, from the run file and the model's headers alone.

Every constant says where it is from. Estimates, for choosing hardware; what was measured replaces them (plan/measured.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.config.schema import Hidden, NoDistribution, Run, Sample
from distft.plan.measured import Reading, TokenBytes
from distft.store.model_folder import ModelFolder

H100_FLOPS = 989e12
UTILISATION = 0.4
"""Of dense bf16 peak; full-weight fine-tunings of 7B-8B models on H100 are published at 0.33 to 0.46."""

HEAD_BUFFER_BYTES = 1 << 29
"""All [chunk, vocabulary] buffers: `objectives.loss.BUFFER_BYTES`, repeated here so that a plan needs no torch; a test compares."""

SIGNAL_BYTES = 14
"""Position, log q(y), entropy, rank, tail and count of one token, as they lie compressed (README, "Compute a teacher cache once")."""
ENTRY_BYTES = 2.7
"""An id and its log-probability, likewise: 2.2 to 2.9 over the policies of that table."""
DISTINCT_DRAWS = 8
"""Mean distinct ids among 50 stratified draws."""
FLOOR_ENTRIES = 22
"""Mean kept entries a token at min_prob 1e-3 (17 to 26 on three corpora with a 135M model; sharper teachers keep fewer)."""
HIDDEN_COMPRESSED = {"bfloat16": 0.69, "float32": 0.89}
"""What compression leaves of hidden states, by the same table: signs and mantissas are noise, exponents are not."""
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    parameters: int
    teacher_bytes_per_token: float
    basis: str
    """How the bytes of a token are known (`TokenBytes.basis`)."""
    teacher_bytes: int | None
    """Of the whole corpus; None until it is tokenised."""
    memory_per_rank: int
    """Bytes: weights, gradients, both moments, activations of one micro-batch, and the loss head."""
    checkpoint_bytes: int
    """Of one checkpoint, over all ranks; so much of the hosts' memory, too, while it is written."""
    score_hours: float | None
    train_hours: float | None
    """On one H100; None until the corpus is tokenised."""

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def estimate_run(
    run: Run, model: ModelFolder, teacher: ModelFolder | None, *, reading: Reading | None, trained_tokens: int | None,
    known: TokenBytes | None,
) -> Estimate:  # fmt: skip
    """`trained_tokens` are those of one epoch; `known` are bytes that were measured. A `teacher` of None is the model itself."""
    parameters, config, read = model.parameter_count(), _text_config(model), _text_config(teacher or model)
    width = int(read.get("hidden_size", 0))
    found = known or TokenBytes(amount=teacher_bytes_per_token(run, width=width), basis="estimated")
    return estimate(
        run, parameters=parameters, config=config, known=found, trained_tokens=trained_tokens,
        teacher_parameters=teacher.parameter_count() if teacher else parameters,
        tokens=reading.tokens if reading else None, scored_tokens=reading.scored_tokens if reading else None,
        head_bytes=head_bytes(run, rows=int(read.get("vocab_size", 0)), width=width),
    )  # fmt: skip


def estimate(
    run: Run, *, parameters: int, teacher_parameters: int, config: dict[str, Any], known: TokenBytes,
    tokens: int | None, scored_tokens: int | None, trained_tokens: int | None, head_bytes: int = 0,
) -> Estimate:  # fmt: skip
    """`tokens` are all that the teacher reads, `scored_tokens` those that are kept, `trained_tokens` all of one epoch. `head_bytes`
    are kept once, however many tokens there are."""
    passes = 8 if run.train.gradient_checkpointing else 6
    pace = H100_FLOPS * UTILISATION * 3600
    return Estimate(
        parameters=parameters,
        teacher_bytes_per_token=known.amount,
        basis=known.basis,
        teacher_bytes=None if scored_tokens is None else round(known.amount * scored_tokens) + head_bytes,
        memory_per_rank=memory_per_rank(run, parameters, config),
        checkpoint_bytes=12 * parameters,
        score_hours=None if tokens is None else 2 * teacher_parameters * tokens / pace,
        train_hours=None if trained_tokens is None else passes * parameters * _all_tokens(run, trained_tokens) / pace,
    )


def _text_config(model: ModelFolder) -> dict[str, Any]:
    return model.config.get("text_config") or model.config


def _all_tokens(run: Run, epoch_tokens: int) -> int:
    tokens = epoch_tokens * run.train.epochs
    return tokens if run.train.max_steps is None else min(tokens, run.train.max_steps * run.train.tokens_per_step)


def teacher_bytes_per_token(run: Run, *, width: int) -> float:
    """`width` is the teacher's hidden size."""
    policy = run.score.distribution
    if isinstance(policy, Hidden):
        dtype = run.teacher_model.dtype
        return SIGNAL_BYTES + width * DTYPE_BYTES[dtype] * HIDDEN_COMPRESSED[dtype]
    if isinstance(policy, NoDistribution):
        return SIGNAL_BYTES
    if isinstance(policy, Sample):
        return SIGNAL_BYTES + DISTINCT_DRAWS * (policy.draws / 50) ** 0.5 * ENTRY_BYTES
    entries = policy.k if policy.min_prob == 0 else min(policy.k, FLOOR_ENTRIES * (1e-3 / policy.min_prob) ** 0.5)
    return SIGNAL_BYTES + entries * ENTRY_BYTES


def head_bytes(run: Run, *, rows: int, width: int) -> int:
    """The copy of the teacher's output head, which hidden states alone need."""
    return rows * width * DTYPE_BYTES[run.teacher_model.dtype] if isinstance(run.score.distribution, Hidden) else 0


def memory_per_rank(run: Run, parameters: int, config: dict[str, Any]) -> int:
    """float32 takes 16 bytes a parameter (weight, gradient, two moments); bfloat16 20 (weight and gradient in two bytes each, and
    float32 master, gradient sum, two moments). ZeRO-3 shares them among as many ranks as the run file says, and holds the head and
    two layers whole while it computes with them."""
    half = run.model.dtype == "bfloat16"
    ranks = run.train.workers if isinstance(run.train.workers, int) else 1
    layers, width = int(config.get("num_hidden_layers", 0)), int(config.get("hidden_size", 0))
    # 34 bytes per token, layer and unit of width in half precision without the attention matrix (Korthikanti et al. 2022, eq. 2)
    per_token = 2 * width * layers if run.train.gradient_checkpointing else 34 * width * layers
    activations = per_token * (1 if half else 2) * run.train.micro_batch_tokens
    # of a micro-batch's head the gradient's float32 sum, and in bfloat16 what it is rounded to before it is added to the others
    head = HEAD_BUFFER_BYTES + (6 if half else 4) * int(config.get("vocab_size", 0)) * width
    state = (20 if half else 16) * parameters
    if run.train.engine == "zero3" or (run.train.engine == "auto" and ranks > 1):
        in_use = int(config.get("vocab_size", 0)) * width + 2 * parameters // max(1, layers)
        state = state // ranks + (2 if half else 4) * in_use
    return state + activations + head
