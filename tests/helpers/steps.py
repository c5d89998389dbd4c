"""One optimisation step, seen from outside: its gradient before the update, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distft.corpus.render import token_rows
from distft.engine.base import StepValues
from distft.engine.world import World
from distft.train.batches import Feed, Step
from distft.train.metrics import step_line
from tests.helpers.stores import Lab


@dataclass(frozen=True)
class Taken:
    """A step that was taken: gradients by parameter, its values, its line of metrics without the clock."""

    gradients: dict[str, Tensor]
    values: StepValues
    line: dict[str, float]
    micro_batches: int
    weighted: int
    """Tokens of this rank that reach the head."""


def feed(lab: Lab, world: World | None = None) -> Feed:
    cache = lab.cache() if lab.run.needs_teacher else None
    rows = token_rows(lab.model)
    return Feed(lab.corpus, cache, lab.run.objective, lab.run.train, world or World(), vocabulary=rows)


def take_step(lab: Lab, rows: list[int], world: World | None = None) -> Taken:
    """Trains a fresh engine on these documents, up to but without the update."""
    world = world or World()
    mine = feed(lab, world).step(np.array(rows))
    return take(lab, mine, world)


def take(lab: Lab, mine: Step, world: World) -> Taken:
    engine = lab.engine(world)
    gradients: dict[str, Tensor] = {}

    def see() -> None:
        gradients.update({name: master.grad.clone() for name, master in engine.masters.items() if master.grad is not None})

    engine.optimizer.step = see  # pyright: ignore[reportAttributeAccessIssue]
    *totals, tokens = world.total(*mine.counts, mine.tokens)
    micro_batches, normaliser = mine.normalised(totals)
    values = engine.train_step(micro_batches, normaliser=normaliser, lr=1e-3)
    kinds = world.total(*mine.quadrants)
    line = step_line(1, values, normaliser=normaliser, tokens=int(tokens), kinds=kinds, lr=1e-3, seconds=1.0)
    weighted = sum(len(batch.predictor_N) for batch in mine.micro_batches)
    return Taken(gradients, values, line, len(mine.micro_batches), weighted)


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Of two gradients, as a share of the first one's length."""
    assert one.keys() == two.keys()
    apart = torch.cat([(one[name] - two[name]).double().flatten() for name in one])
    return float(apart.norm() / torch.cat([g.double().flatten() for g in one.values()]).norm())
