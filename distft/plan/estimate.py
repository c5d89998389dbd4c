"""Bytes, arithmetic and memory, from the run file and the model's headers alone.

Every constant says where it is from. Estimates, for choosing hardware; what was measured replaces them (plan/measured.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.config.schema import Hidden, NoDistribution, Run, Sample
from distft.plan.largest import largest
from distft.plan.load import load_of
from distft.plan.measured import Lengths, Reading, TokenBytes
from distft.plan.memory import memory
from distft.plan.shape import Shape
from distft.store.model_folder import ModelFolder
from distft.train.flops import PEAKS

H100_FLOPS = PEAKS["H100"]
UTILISATION = 0.4
"""Of dense bf16 peak; full-weight fine-tunings of 7B-8B models on H100 are published at 0.33 to 0.46."""

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
    """Bytes on the device at the fullest moment; `memory` has them by what they are for."""
    memory: dict[str, Any]
    """Of one rank: `device`, `host`, what is `fullest`, and the `process` itself."""
    largest: list[dict[str, Any]]
    """The largest model that so many GPUs train at this run's settings."""
    checkpoint_bytes: int
    """Of one checkpoint, over all ranks; so much of the hosts' memory, too, while it is written."""
    score_hours: float | None
    train_hours: float | None
    """On one H100; None until the corpus is tokenised."""

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def estimate_run(
    run: Run, model: ModelFolder, teacher: ModelFolder | None, *, reading: Reading | None, lengths: Lengths | None,
    known: TokenBytes | None,
) -> Estimate:  # fmt: skip
    """`lengths` are those of the training documents; `known` are bytes that were measured. A `teacher` of None is the model itself."""
    parameters, config, read = model.parameter_count(), _text_config(model), _text_config(teacher or model)
    width = int(read.get("hidden_size", 0))
    found = known or TokenBytes(amount=teacher_bytes_per_token(run, width=width), basis="estimated")
    return estimate(
        run, parameters=parameters, config=config, known=found, lengths=lengths,
        teacher_parameters=teacher.parameter_count() if teacher else parameters,
        tokens=reading.tokens if reading else None, scored_tokens=reading.scored_tokens if reading else None,
        head_bytes=head_bytes(run, rows=int(read.get("vocab_size", 0)), width=width),
    )  # fmt: skip


def estimate(
    run: Run, *, parameters: int, teacher_parameters: int, config: dict[str, Any], known: TokenBytes,
    tokens: int | None, scored_tokens: int | None, lengths: Lengths | None, head_bytes: int = 0,
) -> Estimate:  # fmt: skip
    """`tokens` are all that the teacher reads, `scored_tokens` those that are kept. `head_bytes` are kept once, however many tokens
    there are."""
    load = load_of(run, lengths=lengths, teacher_head=head_bytes)
    needed = memory(Shape.of(config, parameters), load)
    passes = 8 if run.train.gradient_checkpointing else 6
    pace = H100_FLOPS * UTILISATION * 3600
    return Estimate(
        parameters=parameters,
        teacher_bytes_per_token=known.amount,
        basis=known.basis,
        teacher_bytes=None if scored_tokens is None else round(known.amount * scored_tokens) + head_bytes,
        memory_per_rank=needed.device_bytes,
        memory=needed.facts(),
        largest=largest(load, workers=run.train.most_ranks or 8, local=run.train.engine == "local"),
        checkpoint_bytes=12 * parameters,
        score_hours=None if tokens is None else 2 * teacher_parameters * tokens / pace,
        train_hours=None if lengths is None else passes * parameters * _all_tokens(run, lengths.tokens) / pace,
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
