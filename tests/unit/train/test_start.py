"""By how many ranks a run is trained, and which launched groups it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.config.load import validate
from distft.engine.world import World
from distft.errors import ConfigError
from distft.store.local import LocalLocation
from distft.train import start
from distft.train.stage import train_run
from distft.train.start import ranks_to_start


def run_with(workers: Any, address: str = "local") -> Any:
    document = {"name": "a", "model": {"path": "m"}, "data": {"train": {"path": "t.jsonl"}}}
    return validate(document | {"train": {"workers": workers}, "cluster": {"address": address}}, where="run.yaml")


@pytest.mark.parametrize(
    ("workers", "address", "gpus", "count"),
    [
        ("auto", "local", 0, 1), ("auto", "local", 4, 4), ("auto", "h:1", 0, None), (3, "local", 0, 3), (3, "local", 4, 3),
        (1, "h:1", 0, 1), ([1, 1], "h:1", 0, 1), ([1, 8], "h:1", 0, (1, 8)), ([2, 8], "h:1", 4, (2, 8)),
        ([1, 8], "local", 0, 3), ([1, 2], "local", 0, 2), ([5, 8], "local", 0, 5), ([1, 8], "local", 4, 4), ([1, 8], "local", 1, 1),
    ],
)  # fmt: skip
def test_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Any, address: str, gpus: int, count: int | tuple[int, int] | None
) -> None:
    """A range is one of Ray's cluster; on this machine it is what there is: its GPUs, or its three cores."""
    monkeypatch.setattr(start, "device_count", lambda: gpus)
    monkeypatch.setattr(start.os, "cpu_count", lambda: 3)
    assert ranks_to_start(run_with(workers, address), LocalLocation(tmp_path)) == count


def test_too_few_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "device_count", lambda: 2)
    for workers in (3, [3, 4]):
        with pytest.raises(ConfigError, match=r"train\.workers=3 need a GPU each, and this machine has 2"):
            ranks_to_start(run_with(workers), LocalLocation(tmp_path))


@pytest.mark.parametrize(("workers", "shown"), [(3, "3"), ([3, 4], "[3, 4]"), ([1, 1], "1")])
def test_a_launched_group_of_another_size_is_refused(workers: Any, shown: str) -> None:
    nothing: Any = None
    with pytest.raises(ConfigError) as told:
        train_run(run_with(workers), nothing, nothing, nothing, nothing, World(rank=0, size=2))
    assert told.value.problem == f"train.workers={shown}, and 2 ranks were launched."


@pytest.mark.parametrize("workers", ["auto", 2, [1, 2], [2, 9]])
def test_one_of_its_size_is_not(workers: Any) -> None:
    nothing: Any = None
    with pytest.raises(AttributeError):  # it goes on, and finds no store
        train_run(run_with(workers), nothing, nothing, nothing, nothing, World(rank=0, size=2))
