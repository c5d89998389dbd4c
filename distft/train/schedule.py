"""The learning rate of each step, a pure function of the step."""

from __future__ import annotations

import math

from distft.config.schema import Train


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
