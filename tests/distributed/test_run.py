"""A whole run on two ranks: what one rank trains, also when it is taken up on another number of them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.engine.local import LocalEngine
from distft.engine.world import World
from distft.train.record import read_metrics
from tests.helpers.ranks import run_ranks
from tests.helpers.stores import Lab, bits, lab, random_documents

DAMAGED = "step-00000004"


def prepared(folder: Path) -> Lab:
    made = lab(
        folder, documents=random_documents(20, seed=40), heldout=random_documents(3, seed=41),
        train={
            "tokens_per_step": 60, "epochs": 2, "max_steps": 6, "lr": 3e-3, "warmup_steps": 1, "micro_batch_tokens": 30,
            "checkpoint": {"every_steps": 2, "keep": 3}, "engine": "local",
        },
    )  # fmt: skip
    made.score()
    return made


def runs(world: World, made: Lab, broken: Lab) -> dict[str, Any]:
    """On each rank: the whole run; a run that dies; and that run taken up again, with its newest checkpoint damaged."""
    whole = made.train(world)
    plain, taken = LocalEngine.train_step, []

    def train_step(self: LocalEngine, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    LocalEngine.train_step = train_step
    with suppress(KeyboardInterrupt):
        broken.train(world)
    LocalEngine.train_step = plain
    if world.leads:
        (weights,) = (Path(broken.run.store) / "runs" / "run" / "checkpoints" / DAMAGED).glob("data/rank-00000-*")
        data = bytearray(weights.read_bytes())
        data[-10] ^= 1
        weights.write_bytes(data)
    world.barrier()
    return {"whole": whole, "resumed": broken.train(world)}


def losses(made: Lab) -> list[float]:
    return [line["loss"] for line in read_metrics(made.run_folder)]


def test_two_ranks_train_what_one_trains_and_go_on_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    alone, made, broken = prepared(tmp_path / "alone"), prepared(tmp_path / "two"), prepared(tmp_path / "broken")
    expected = alone.train()
    first, second = run_ranks(runs, 2, made, broken)
    assert first == second
    assert first["whole"]["resumed_from"] is None
    assert first["resumed"]["resumed_from"] == 2
    # Adam divides by the root of a mean of squares: rounding of 1e-7 may grow where a gradient is all but zero
    assert losses(made) == pytest.approx(losses(alone), rel=1e-5)
    assert first["whole"]["drift"] == pytest.approx(expected["drift"], rel=1e-4)
    # On the same number of ranks it is the same to the bit.
    assert losses(broken) == losses(made)
    one, two = bits(made.restored()), bits(broken.restored())
    assert all(torch.equal(one[name], two[name]) for name in one)
    # One rank goes on where two stopped.
    (Path(broken.run.store) / "runs" / "run" / "checkpoints" / "step-00000006" / "MANIFEST.json").unlink()
    assert broken.train()["resumed_from"] == 4
    assert losses(broken) == pytest.approx(losses(alone), rel=1e-5)
