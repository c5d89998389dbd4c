"""SmolLM2's output head with drawn numbers, for what is measured at the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from distft.objectives.distributions import LogitShape

VOCABULARY, WIDTH = 49_152, 576


def head(tokens: int) -> tuple[Tensor, Tensor, LogitShape]:
    """Hidden states and the head's rows, the same at each call and both trained, and the shape of its logits. Leaves torch one
    thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.05).requires_grad_()
    return hidden, weight, LogitShape(rows=VOCABULARY)
