"""The loss head on a GPU against plain cross-entropy and the fused ones of two packages: time and memory, forward and backward.

pip install liger-kernel cut-cross-entropy
python -m pytest -m "bench and gpu" -s tests/bench/gpu_loss.py

Both packages are optional: what is not installed has no line. Every way is first compared with float32 on a few tokens, so that none
is fast by doing something else. DISTFT_BENCH_DEVICE=cpu runs that comparison alone, on a small head, without the two packages.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.objectives.distributions import LogitShape, SparseRows
from distft.objectives.loss import Targets, token_loss

DEVICE = os.environ.get("DISTFT_BENCH_DEVICE", "cuda")
VOCABULARY, WIDTH = (128_256, 4_096) if DEVICE == "cuda" else (1_000, 64)
"""Llama 3 8B's head."""
TOKENS = (4_096, 8_192, 32_768)
ENTRIES = 21
"""What the default policy keeps of a token, on average."""
ROUNDS, CHECKED = 9, 256

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states, head and labels to the sum of losses."""


def plain(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N, reduction="sum")


def ours(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, teacher: SparseRows | None = None) -> Tensor:
    one = torch.ones(len(labels_N), device=labels_N.device)
    held = one if teacher is not None else one * 0
    targets = Targets(labels_N=labels_N, ce_N=one, kl_N=held, rkl_N=one * 0, entropy_N=one * 0, teacher=teacher)
    return token_loss(hidden_ND, weight_VD, None, targets, shape=LogitShape(rows=VOCABULARY))[0]


def liger(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]  (optional)

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VD, hidden_ND, labels_N)


def cut(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]  (optional)

    return linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="sum")


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {"torch, all logits": plain, "ours": ours}
    if DEVICE == "cuda":
        found |= {"liger-kernel": liger} if find_spec("liger_kernel") else {}
        found |= {"cut-cross-entropy": cut} if find_spec("cut_cross_entropy") else {}
    return found


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator(device=DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, device=DEVICE, generator=random).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, device=DEVICE, generator=random) * 0.02).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (tokens,), device=DEVICE, generator=random)


def teacher(tokens: int) -> SparseRows:
    random = np.random.default_rng(0)
    ids = (random.integers(0, 40, tokens)[:, None] + np.arange(ENTRIES) * 47) % VOCABULARY
    mass = random.dirichlet(np.ones(ENTRIES), tokens) * 0.95
    order = np.argsort(ids, axis=1)
    rows = SparseRows(
        ids_M=torch.from_numpy(np.take_along_axis(ids, order, 1).reshape(-1)),
        logprobs_M=torch.from_numpy(np.log(np.take_along_axis(mass, order, 1) + 1e-9).astype(np.float32).reshape(-1)),
        counts_N=torch.full((tokens,), ENTRIES), tail_N=torch.full((tokens,), 0.05),
    )  # fmt: skip
    return rows.to(torch.device(DEVICE))


def gradients(way: Way, given: tuple[Tensor, Tensor, Tensor]) -> tuple[float, Tensor, Tensor]:
    hidden, weight, labels = given
    hidden.grad = weight.grad = None
    loss = way(hidden, weight, labels)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return float(loss.detach()), hidden.grad.float(), weight.grad.float()


def check(way: Way, dtype: torch.dtype) -> None:
    """The way's loss and gradients are those of float32, to the rounding of its inputs."""
    exact = gradients(plain, inputs(CHECKED, torch.float32))
    found = gradients(way, inputs(CHECKED, dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert abs(found[0] - exact[0]) <= tolerance * abs(exact[0])
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


def measured(way: Way, given: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Milliseconds of one pass, and GB beyond inputs and gradients at its peak."""
    gradients(way, given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    way(*given).backward()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / 1e9


@pytest.mark.bench
@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_loss_head_against_fused_ones() -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    known = ways()
    for way in known.values():
        check(way, dtype)
    if DEVICE != "cuda":
        return
    known["ours, with a cached KL"] = lambda h, w, y: ours(h, w, y, held)
    print(f"\n{torch.cuda.get_device_name()}, {VOCABULARY:,} rows of {WIDTH}, bfloat16, {ROUNDS} rounds, interleaved")
    for tokens in TOKENS:
        given, held = inputs(tokens, dtype), teacher(tokens)
        times: dict[str, list[float]] = {name: [] for name in known}
        room: dict[str, float] = {}
        for _ in range(ROUNDS):
            for name in list(known):
                try:
                    milliseconds, room[name] = measured(known[name], given)
                except torch.OutOfMemoryError:
                    known.pop(name)  # at this many tokens and at more
                    torch.cuda.empty_cache()
                    continue
                times[name].append(milliseconds)
        for name, taken in times.items():
            if taken:
                low, _, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else (taken[0],) * 3
                print(f"{tokens:>7,} tokens  {name:<24} {statistics.median(taken):8.1f} ms  [{low:.1f}, {high:.1f}]"
                      f"  {room[name]:6.2f} GB")  # fmt: skip
