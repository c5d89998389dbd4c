"""The learning rate of each step, a pure function of the step."""

from __future__ import annotations

import math

from distft.config.schema import Train
from distft.errors import ConfigError


def check_warmup(train: Train, total_steps: int) -> None:
    """Refuses a run that would end before its warmup does."""
    if total_steps < train.warmup_steps:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps}, and the run has {total_steps} steps: train.lr would never be reached.",
            where="train.warmup_steps",
            help="Lower train.warmup_steps; or lower train.tokens_per_step or raise train.epochs for more steps.",
        )  # fmt: skip


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """For steps 1 to total_steps: a linear rise over the warmup, then the schedule, which would reach
    `min_lr_fraction` one step after the last: no step is wasted on a rate of zero."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    span = max(1, total_steps - train.warmup_steps)
    done = (step - 1 - train.warmup_steps) / span
    shape = (1 + math.cos(math.pi * done)) / 2 if train.schedule == "cosine" else 1 - done
    return train.lr * (train.min_lr_fraction + (1 - train.min_lr_fraction) * shape)
