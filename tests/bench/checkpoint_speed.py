"""How long training stands still for a checkpoint: `save` alone, against a save that training would wait for.

python -m pytest -m bench -s tests/bench/checkpoint_speed.py

Both by turns, in wall time: what is waited for is the disk and not the processor. The store is a folder of this machine, and
DISTFT_BENCH_STORE names another. The engine has a model's slices and no model.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distft.engine.base import Slice
from distft.store.location import open_location
from distft.train.checkpoint import Checkpoints
from distft.train.rank_files import PARTS

ROUNDS = 5
WIDTH, INNER, LAYERS, VOCABULARY, HEADS = 576, 1536, 30, 49_152, 192
"""SmolLM2-135M's."""


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "q": (WIDTH, WIDTH), "k": (HEADS, WIDTH), "v": (HEADS, WIDTH), "o": (WIDTH, WIDTH), "gate": (INNER, WIDTH),
        "up": (INNER, WIDTH), "down": (WIDTH, INNER), "norm": (WIDTH,), "after": (WIDTH,),
    }  # fmt: skip
    layers = {f"{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    return {"embed": (VOCABULARY, WIDTH), **layers, "norm": (WIDTH,)}


class Held:
    """What `Checkpoints.save` asks of an engine."""

    def __init__(self) -> None:
        self.parts = {name: {part: torch.randn(math.prod(shape)) for part in PARTS} for name, shape in shapes().items()}

    def slices(self) -> Iterator[Slice]:
        for name, shape in shapes().items():
            yield Slice(name=name, shape=shape, start=0, **self.parts[name])


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_what_a_checkpoint_costs_training(tmp_path: Path) -> None:
    engine: Any = Held()
    folder = open_location(os.environ.get("DISTFT_BENCH_STORE", str(tmp_path / "store")))
    kept = Checkpoints(folder.child("checkpoints"), {"bench": time.time()}, keep=1)
    step, blocked, whole = 0, list[float](), list[float]()

    def save(*, wait: bool) -> float:
        nonlocal step
        step += 1
        start = time.perf_counter()
        kept.save(step, engine, {})
        if wait:
            kept.finish()
        spent = time.perf_counter() - start
        kept.finish()
        return spent

    for turn in range(ROUNDS + 1):  # the first takes the room, and is not counted
        pair = {wait: save(wait=wait) for wait in ((False, True) if turn % 2 else (True, False))}
        if turn:
            blocked.append(pair[False])
            whole.append(pair[True])
    target, source = np.ones(1 << 27, np.float32), np.zeros(1 << 27, np.float32)
    source += 1  # zeros may be one page of memory
    start = time.perf_counter()
    np.copyto(target, source)
    rate = target.nbytes / (time.perf_counter() - start)
    numbers = sum(math.prod(shape) for shape in shapes().values())
    print(
        f"\n{numbers / 1e6:.0f} M parameters, {12 * numbers / 1e9:.2f} GB in {len(shapes())} slices, {ROUNDS} rounds, "
        f"load {os.getloadavg()[0]:.1f}\n{'':<32}{'median':>9}   middle half"
    )
    ratios = [100 * one / two for one, two in zip(blocked, whole, strict=True)]
    rows = [("save blocks", "s", blocked), ("save and finish", "s", whole), ("the first / the second", "%", ratios)]
    for name, unit, values in rows:
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:<32}{median:>7.3f} {unit}   {low:.3f} to {high:.3f}")
    print(f"copying as much at the speed of one large vector: {12 * numbers / rate:.3f} s at {rate / 1e9:.1f} GB/s")
