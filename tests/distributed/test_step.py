"""A step on several ranks is the step on one: gradient, loss and metrics, with shares of unequal weight and none at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distft.engine.world import World
from distft.store.model_folder import resolve_model
from tests.helpers.objectives import ALL_POSITIONS, CATALOG, uneven
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.steps import Taken, distance, feed, take
from tests.helpers.stores import Lab, lab, shared_model

STEPS = {"eight documents": list(range(8)), "three documents": [1, 2, 6], "one document": [2]}
"""Two ranks cannot share one document: the other's share is empty. Three documents are two micro-batches against one."""


def scored(folder: Path) -> Lab:
    made = lab(folder, documents=uneven(), score=ALL_POSITIONS)
    made.score()
    return made.changed(train={"clip": None, "micro_batch_tokens": 16})


def all_steps(world: World, made: Lab, student: str) -> dict[str, Taken]:
    """Every step under every objective, for a student that is not the teacher."""
    stranger = replace(made, model=resolve_model(student, None))
    taken = {}
    for name, objective in CATALOG.items():
        variant = made.changed(objective=objective)
        for step, rows in STEPS.items():
            taken[f"{name}, {step}"] = take(stranger, feed(variant, world).step(np.array(rows)), world)
    return taken


def test_two_ranks_take_the_step_that_one_takes(tmp_path: Path) -> None:
    made, student = scored(tmp_path), str(shared_model(seed=1).path)
    alone = all_steps(World(), made, student)
    first, second = run_ranks(all_steps, 2, made, student)
    for name, one in alone.items():
        for rank in (first[name], second[name]):
            # float32 sums in another order
            assert distance(one.gradients, rank.gradients) <= 1e-6, name
            assert rank.values.loss == pytest.approx(one.values.loss, rel=1e-6)
            assert rank.line == pytest.approx(one.line, rel=1e-5, abs=1e-7)
            assert rank.values.counts == one.values.counts
            assert sum(rank.values.masses.values()) == pytest.approx(one.values.loss, rel=1e-6)
        assert first[name].micro_batches == second[name].micro_batches
    assert (first["stm_kl, one document"].weighted, second["stm_kl, one document"].weighted) == (15, 0)
    assert first["stm_kl, three documents"].weighted != second["stm_kl, three documents"].weighted


def raises_on_one(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank 1 fell over")
    world.barrier()


def test_a_rank_that_fails_ends_the_others_and_tells_why() -> None:
    with pytest.raises(RankError, match="rank 1 fell over"):
        run_ranks(raises_on_one, 2, timeout=60)
