"""What the loss takes in memory beyond weights and their gradients, against the plain way: all logits of student and teacher at once.

python -m pytest -m bench -s tests/bench/loss_memory.py

Each way runs in a process of its own. Its inputs are made, a few tokens are run to load what torch loads late, the kernel's high-water
mark is set back, and the figure is that mark after one forward and backward pass, less what was resident before and less the gradients
that remain. The plain way is measured on fewer tokens and scaled up by them: its buffers are all [tokens, vocabulary].
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.objectives.distributions import DenseHead, DenseRows, LogitShape, SparseRows
from distft.objectives.loss import Targets, token_loss

VOCABULARY, WIDTH, TOKENS = 128_256, 256, 8_192
"""The vocabulary of Llama 3 over a width that makes the head small beside the logits."""

OURS = {
    "cross-entropy alone": "none",
    "cached KL, default policy (some 20 entries)": "default",
    "cached KL, 64 entries": "fixed",
    "KL from hidden states": "hidden",
}
PLAIN_TOKENS = (1_024, 2_048)


def sparse(counts: np.ndarray) -> SparseRows:
    random, total = np.random.default_rng(0), int(counts.sum())
    row_M = np.repeat(np.arange(len(counts)), counts)
    slot_M = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    ids_M = (random.integers(0, 900, len(counts))[row_M] + slot_M * 997) % VOCABULARY  # distinct within a row
    mass_M = random.random(total) + 1e-3
    logprobs_M = np.log(0.95 * mass_M / np.bincount(row_M, mass_M)[row_M])
    return SparseRows(
        ids_M=torch.from_numpy(ids_M.astype(np.int64)), logprobs_M=torch.from_numpy(logprobs_M.astype(np.float32)),
        counts_N=torch.from_numpy(counts), tail_N=torch.full((len(counts),), 0.05),
    )  # fmt: skip


def default_like(tokens: int) -> np.ndarray:
    """Entries per token as the default floor leaves them of real text: few for most, up to 128 for some, some 20 on average."""
    random = np.random.default_rng(1)
    return np.clip(np.round(np.exp(random.normal(np.log(8), 1.5, tokens))), 1, 128).astype(np.int64)


def way(kind: str, tokens: int) -> tuple[Callable[[int], None], list[Tensor]]:
    """A pass forward and back over the first so many of `tokens` tokens, and what gets a gradient of it."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, WIDTH).requires_grad_()
    weight_VD = (torch.randn(VOCABULARY, WIDTH) * 0.05).requires_grad_()
    labels_N = torch.randint(0, VOCABULARY, (tokens,))
    one_N, zero_N, shape = torch.ones(tokens), torch.zeros(tokens), LogitShape(rows=VOCABULARY)
    heard_ND, teacher_VD = torch.randn(tokens, WIDTH), torch.randn(VOCABULARY, WIDTH) * 0.05
    teacher: SparseRows | DenseRows | None = None
    if kind in ("default", "fixed"):
        teacher = sparse(default_like(tokens) if kind == "default" else np.full(tokens, 64))
    elif kind == "hidden":
        teacher = DenseRows(hidden_NT=heard_ND, head=DenseHead(teacher_VD, None, shape))

    def ours(some: int) -> None:
        targets = Targets(
            labels_N=labels_N[:some], ce_N=one_N[:some], kl_N=(zero_N if teacher is None else one_N)[:some], rkl_N=zero_N[:some],
            entropy_N=zero_N[:some], teacher=teacher and teacher.chunk(0, some),
        )  # fmt: skip
        loss, _ = token_loss(hidden_ND[:some], weight_VD, None, targets, shape=shape)
        loss.backward()

    def plain(some: int) -> None:
        logits_NV = hidden_ND[:some] @ weight_VD.T
        with torch.no_grad():
            heard_NV: Tensor = heard_ND[:some] @ teacher_VD.T
        functional = torch.nn.functional
        held = functional.kl_div(logits_NV.log_softmax(1), heard_NV.log_softmax(1), reduction="sum", log_target=True)
        (functional.cross_entropy(logits_NV, labels_N[:some], reduction="sum") + held).backward()

    return plain if kind == "plain" else ours, [hidden_ND, weight_VD]


def resident(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def peak(kind: str, tokens: int) -> int:
    """Bytes at the top above inputs and gradients. Not ru_maxrss: it starts at what the parent process had."""
    torch.set_num_threads(1)
    run, trained = way(kind, tokens)
    run(16)
    for tensor in trained:
        tensor.grad = None
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(tokens)
    return resident("VmHWM") - before - sum(tensor.nbytes for tensor in trained)


def measured(kind: str, tokens: int) -> int:
    command = [sys.executable, "-m", "tests.bench.loss_memory", kind, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_what_the_loss_takes() -> None:
    print(f"\nthe loss, forward and backward, beyond weights and gradients: {VOCABULARY:,} rows of {WIDTH}, float32")
    gigabytes = [(tokens, measured("plain", tokens) / 1e9) for tokens in PLAIN_TOKENS]
    for tokens, found in gigabytes:
        print(f"{f'plain CE and KL, all logits, {tokens:,} tokens':<62}{found:>8.2f} GB", flush=True)
    (few, less), (many, more) = gigabytes
    whole = more + (more - less) / (many - few) * (TOKENS - many)
    print(f"{f'  scaled to {TOKENS:,} tokens, not run':<62}{whole:>8.2f} GB")
    for name, kind in OURS.items():
        found = measured(kind, TOKENS) / 1e9
        print(f"{f'{name}, {TOKENS:,} tokens':<62}{found:>8.2f} GB   1/{whole / found:.0f} of plain", flush=True)


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2])))
