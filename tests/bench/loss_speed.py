"""What a cached KL costs at the loss head, against cross-entropy there and against the plain way to cross-entropy.

python -m pytest -m bench tests/bench/loss_speed.py -s
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.objectives.distributions import SparseRows
from distft.objectives.loss import Targets, token_loss
from tests.bench.head import VOCABULARY, WIDTH, head
from tests.bench.ratios import HEADER, compare

TOKENS = 512
KEPT = (8, 64)
"""Mean kept entries per token: what the default floor leaves of a real teacher, and the classical top-64."""


def rows(kept: int) -> SparseRows:
    random = np.random.default_rng(0)
    counts = random.integers(1, 2 * kept, TOKENS)
    ids = np.concatenate([np.sort(random.choice(VOCABULARY, count, replace=False)) for count in counts])
    logprobs = np.concatenate([np.log(0.95 * random.dirichlet(np.ones(count))) for count in counts])
    return SparseRows(
        ids_M=torch.from_numpy(ids), logprobs_M=torch.from_numpy(logprobs.astype(np.float32)),
        counts_N=torch.from_numpy(counts), tail_N=torch.full((TOKENS,), 0.05),
    )  # fmt: skip


def targets(teacher: SparseRows | None) -> Targets:
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))
    one, zero = torch.ones(TOKENS), torch.zeros(TOKENS)
    return Targets(labels_N=labels, ce_N=one, kl_N=zero if teacher is None else one, rkl_N=zero, entropy_N=zero, teacher=teacher)


@pytest.mark.bench
def test_what_a_cached_divergence_costs_at_the_head() -> None:
    hidden, weight, shape = head(TOKENS)

    def step(wanted: Targets) -> None:
        loss, _ = token_loss(hidden, weight, None, wanted, shape=shape)
        loss.backward()
        hidden.grad = weight.grad = None

    def plain() -> None:
        labels: Tensor = sft.labels_N
        torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()
        hidden.grad = weight.grad = None

    sft = targets(None)
    print(f"\nloss head, forward and backward: {TOKENS} tokens, {VOCABULARY:,} rows of {WIDTH}, float32, one thread\n{HEADER}")
    print(compare(plain, lambda: step(sft)).row("A torch's cross-entropy, B ours"))
    for kept in KEPT:
        held = targets(rows(kept))
        print(compare(lambda: step(sft), lambda held=held: step(held)).row(f"A cross-entropy, B with a cached KL of {kept}"))
