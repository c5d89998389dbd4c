"""Which engine trains a run."""

from __future__ import annotations

import torch

from distft.config.schema import Run
from distft.engine.base import Engine
from distft.engine.load import load_model
from distft.engine.local import LocalEngine
from distft.engine.world import World, this_device
from distft.progress import waiting
from distft.store.model_folder import ModelFolder


def open_engine(run: Run, model: ModelFolder, world: World, *, head_rows: int) -> Engine:
    """The engine that `train.engine` asks for, with the model's own weights."""
    with waiting(f"loading {model.path.name}"):
        if takes_zero3(run, world):
            from distft.engine.zero3 import Zero3Engine  # not before it is wanted: DeepSpeed takes its time to load

            return Zero3Engine(model, run.model, run.train, world, head_rows=head_rows)
        whole = load_model(model, dtype=run.model.dtype, attention=run.model.attention, head_rows=head_rows, device=this_device())
        return LocalEngine(whole, run.train, world)


def takes_zero3(run: Run, world: World) -> bool:
    if run.train.engine != "auto":
        return run.train.engine == "zero3"
    asked = run.train.zero3.offload_optimizer or run.train.zero3.offload_parameters
    return world.size > 1 or torch.cuda.is_available() or asked
