"""What ranks that Ray starts are given to do in tests: whole runs with an accident in them, and next to nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distft import ranks
from distft.config.schema import Run


def killed_twice(run: Run, folder: str) -> dict[str, Any]:
    """A run whose rank 1 is killed in its sixth step, and after the next start rank 0 in its fifth."""
    from distft.engine.local import LocalEngine
    from distft.pipeline import train_here

    plain, taken = LocalEngine.train_step, 0

    def train_step(self: LocalEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        for rank, step in ((1, 6), (0, 5)):
            marker = Path(folder) / f"killed-{rank}"
            if (
                ranks.rank() == rank
                and taken == step
                and not marker.exists()
                and (rank == 1 or (Path(folder) / "killed-1").exists())
            ):
                marker.touch()
                time.sleep(0.5)  # what is being saved may be kept
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **kwargs)

    LocalEngine.train_step = train_step  # pyright: ignore[reportAttributeAccessIssue]
    return train_here(run)


def without_numbers(run: Run) -> dict[str, Any]:
    """A run in whose third step rank 1 meets a weight that is no number."""
    from distft.engine.local import LocalEngine
    from distft.pipeline import train_here

    plain, taken = LocalEngine.train_step, 0

    def train_step(self: LocalEngine, micro_batches: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if ranks.rank() == 1 and taken == 3:
            micro_batches = [replace(b, targets=replace(b.targets, ce_N=b.targets.ce_N * float("nan"))) for b in micro_batches]
        return plain(self, micro_batches, **kwargs)

    LocalEngine.train_step = train_step  # pyright: ignore[reportAttributeAccessIssue]
    return train_here(run)


def mistaken(folder: str) -> dict[str, Any]:
    """Each rank leaves in the folder what it sees of where it is. Rank 1 dies, and after the next start has a bug; rank 0 hears of it
    from the group alone."""
    from distft.engine.world import join_world

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "AWS_ENDPOINT_URL", "DISTFT_CACHE_DIR")
    seen = {name: os.environ.get(name) for name in names} | {"folder": os.getcwd()}
    Path(folder, f"rank-{ranks.rank()}").write_text(json.dumps(seen))
    with join_world() as world:
        if world.rank == 1:
            marker = Path(folder) / "died"
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("a mistake of ours")
        world.barrier()
    return {}


def with_fewer(run: Run, folder: str, how: signal.Signals) -> dict[str, Any]:
    """A run whose sixth step ends the other machine in this way: its part of Ray, and with it the rank."""

    def before(taken: int) -> None:
        if taken == 6 and ranks.size() == 2 and is_elsewhere(Path(folder)):
            time.sleep(0.5)  # what is being saved may be kept
            os.kill(os.getppid(), how)
            os.kill(os.getpid(), signal.SIGKILL)

    return stepwise(run, Path(folder), before)


def with_more(run: Run, folder: str) -> dict[str, Any]:
    """A run that in its fifth step waits for another machine, and then takes its time until it has a second rank."""

    def before(taken: int) -> None:
        if ranks.size() == 1 and taken >= 5:
            Path(folder, "waits").touch()
            while not Path(folder, "joined").exists():
                time.sleep(0.05)
            time.sleep(0.3)

    return stepwise(run, Path(folder), before)


def stepwise(run: Run, folder: Path, before: Callable[[int], None]) -> dict[str, Any]:
    """A run that calls this before each step that this process takes, and notes after it how many ranks took it."""
    from distft.engine.local import LocalEngine
    from distft.pipeline import train_here

    engines: list[Any] = [LocalEngine]
    if run.train.engine == "auto" and ranks.size() > 1:
        from distft.engine.zero3 import Zero3Engine

        engines.append(Zero3Engine)
    taken = 0

    def patched(plain: Any) -> Any:
        def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal taken
            taken += 1
            before(taken)
            values = plain(self, *args, **kwargs)
            if ranks.rank() == 0:
                with (folder / "taken").open("a") as file:
                    file.write(f"{ranks.size()}\n")
            return values

        return train_step

    for engine in engines:
        engine.train_step = patched(engine.train_step)
    return train_here(run)


def is_elsewhere(folder: Path) -> bool:
    """Whether this rank's part of Ray is not the one that the folder names, the driver's."""
    import ray

    return ray.get_runtime_context().get_node_id() != (folder / "here").read_text()


def how_many() -> dict[str, Any]:
    return {"ranks": ranks.size()}
