"""What a rank does in tests of the ZeRO-3 engine. Everything that comes back is copied: engines end with their process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distft.corpus.render import token_rows
from distft.engine.base import Engine, MicroBatch, Slice, StepValues
from distft.engine.local import LocalEngine
from distft.engine.world import World
from distft.store.model_folder import ModelFolder, resolve_model
from tests.helpers.steps import feed
from tests.helpers.stores import Lab, loaded

STEPS = [[0, 1, 2, 3], [2], [4, 5, 6, 7], [1, 2, 6], list(range(8))] * 2
"""Ten. Of one document the second rank has nothing; three are two micro-batches against one."""
LR = 3e-4


@dataclass(frozen=True)
class Taken:
    """Some steps, and what they left."""

    values: list[StepValues]
    micro_batches: list[int]
    weights: dict[str, Tensor]
    slices: list[Slice]


def open_zero3(made: Lab, student: str, world: World) -> Any:
    from distft.engine.zero3 import Zero3Engine

    warnings.simplefilter("ignore")
    folder = resolve_model(student, None)
    return Zero3Engine(folder, made.run.model, made.run.train, world, head_rows=token_rows(folder))


def open_local(made: Lab, student: str, world: World) -> LocalEngine:
    return LocalEngine(loaded(resolve_model(student, None), dtype=made.run.model.dtype), made.run.train, world)


def batches(made: Lab, rows: list[int], world: World) -> tuple[Sequence[MicroBatch], float]:
    mine = feed(made, world).step(np.array(rows))
    *totals, _ = world.total(*mine.counts, mine.tokens)
    return mine.normalised(totals)


def train(engine: Engine, made: Lab, world: World, steps: list[list[int]]) -> Taken:
    values, counts = [], []
    for rows in steps:
        mine, normaliser = batches(made, rows, world)
        counts.append(len(mine))
        values.append(engine.train_step(mine, normaliser=normaliser, lr=LR))
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    return Taken(values, counts, weights, copied(engine))


def copied(engine: Engine) -> list[Slice]:
    return [
        replace(one, weight=one.weight.clone(), exp_avg=one.exp_avg.clone(), exp_avg_sq=one.exp_avg_sq.clone())
        for one in engine.slices()
    ]


def recut(slices: Sequence[Slice], engine: Engine) -> list[Slice]:
    """The parts of these slices that an engine wants, in no order, some of them in pieces."""
    found = []
    for name, _, start, stop in engine.wanted():
        for one in slices:
            first, last = max(start, one.start), min(stop, one.stop)
            if one.name == name and first < last:
                own = slice(first - one.start, last - one.start)
                moments = {"exp_avg": one.exp_avg[own], "exp_avg_sq": one.exp_avg_sq[own]}
                found.append(replace(one, start=first, weight=one.weight[own], **moments))
    return found[::-1]


def refused(work: Callable[[], Any]) -> str:
    """What a DistftError says; nothing is an error of ours."""
    from distft.errors import DistftError

    try:
        work()
    except DistftError as error:
        return f"{type(error).__name__}: {error.problem}"
    raise AssertionError("it was not refused")


def damaged(model: ModelFolder, path: Any, change: Callable[[dict[str, Tensor]], None]) -> str:
    """A copy of a model with other tensors in its file."""
    from safetensors.torch import load_file, save_file

    from tests.helpers.stores import copied_model

    folder = copied_model(model, path)
    [file] = folder.weight_files()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder.path)


def storage(engine: Any) -> int:
    """Bytes of this rank's weights that are in memory, gathered ones too."""
    return sum(
        p.ds_tensor.numel() * p.ds_tensor.element_size() + p.data.untyped_storage().nbytes() for p in engine.parameters.values()
    )


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
