"""`train.workers: [min, max]`: a group that loses a machine, one that another joins, and one that waits."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distft.cluster import train
from distft.cluster.train import train_on_ranks
from distft.config.load import load_config
from tests.helpers.cluster import Cluster
from tests.helpers.ranked import how_many, with_fewer, with_more
from tests.helpers.runs import Bench, copy_bench

RANGE = (
    "train.workers=[1, 2]", "train.epochs=8", "train.checkpoint.every_steps=4", "train.checkpoint.keep=20",
    "train.drift_every_steps=null",
)  # fmt: skip
LOCAL = (*RANGE, "train.engine=local")
LAST = 48
on_some = partial(train_on_ranks, address="local", ranks=(1, 2), gpus=0)


@pytest.fixture(scope="module")
def _alone(_pristine: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Once for all: scored, and with `alone`, a run in one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE_DIR", str(folder / "cache"))
        bench = copy_bench(_pristine, folder / "bench")
        for verb in ("tokenize", "score", "train"):
            bench.run(verb, *LOCAL, "train.workers=1", "name=alone")
    return bench


@pytest.fixture
def alone(_alone: Bench, tmp_path: Path, own_cache: None) -> Bench:
    return copy_bench(_alone, tmp_path / "bench")


@contextmanager
def room_for(cluster: Cluster, ranks: int) -> Iterator[Callable[[], None]]:
    """Leaves so many CPUs of the tests' Ray free; calling what it gives frees the rest."""
    ray = cluster.ray
    free = int(ray.cluster_resources()["CPU"])
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < free:  # those of the test before may not have ended
        assert time.monotonic() < until, ray.available_resources()
        time.sleep(0.1)
    taken = ray.util.placement_group([{"CPU": free - ranks}])
    assert taken.wait(30)
    try:
        yield lambda: ray.util.remove_placement_group(taken)
    finally:
        ray.util.remove_placement_group(taken)


@contextmanager
def another_machine(cluster: Cluster) -> Iterator[None]:
    """A second part of Ray with room for one rank, in processes of its own: to Ray it is another machine."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    settings = RayParams(
        gcs_address=cluster.address, node_ip_address="127.0.0.1", num_cpus=1, num_gpus=0, object_store_memory=100 << 20,
        min_worker_port=0, max_worker_port=0, node_manager_port=0, include_log_monitor=None,
    )  # fmt: skip
    before = living(cluster)
    node = Node(settings, head=False, shutdown_at_exit=False, spawn_reaper=False)
    try:
        until = time.monotonic() + 60
        while living(cluster) <= before:
            assert time.monotonic() < until
            time.sleep(0.1)
        yield
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


def living(cluster: Cluster) -> int:
    return sum(node["Alive"] for node in cluster.ray.nodes())


def lines(bench: Bench, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (bench.store / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def taken(bench: Bench) -> list[int]:
    """How many ranks took each step, in the order in which they were taken."""
    return [int(line) for line in (bench.folder / "taken").read_text().split()]


def committed(bench: Bench, name: str) -> set[int]:
    return {int(path.parent.name[5:]) for path in (bench.store / "runs" / name).glob("checkpoints/step-*/MANIFEST.json")}


def told_by(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the driver said, without progress and what is only said on a slow machine."""
    said = capsys.readouterr().err.splitlines()
    return [line for line in said if " steps  " not in line and not line.startswith("waiting for") and not line.endswith(" ...")]


def learned_the_same(bench: Bench, name: str) -> None:
    """Each step stands once, with the documents and the loss of a run that was not disturbed."""
    assert [line["step"] for line in lines(bench, name)] == list(range(1, LAST + 1))
    for one, other in zip(lines(bench, "alone"), lines(bench, name), strict=True):
        assert (one["tokens"], one["epoch"]) == (other["tokens"], other["epoch"])
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert LAST in committed(bench, name)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_machine_that_is_lost(cluster: Cluster, alone: Bench, capsys: pytest.CaptureFixture[str], how: signal.Signals) -> None:
    """The other goes on from the last checkpoint, to the end. After a SIGKILL Ray counts on the machine for 20 seconds."""
    run = load_config(alone.file, [*LOCAL, "name=fewer"])
    (alone.folder / "here").write_text(cluster.ray.get_runtime_context().get_node_id())
    with room_for(cluster, 1), another_machine(cluster):
        result = on_some(partial(with_fewer, run, str(alone.folder), how), restarts=1)
    told = told_by(capsys)
    learned_the_same(alone, "fewer")
    assert result["resumed_from"] == 4
    assert taken(alone) == [2] * 5 + [1] * (LAST - 4), "of what was done, the steps after the last checkpoint were done again"
    assert told[0] == "train: starting with 2 ranks (of 1 to 2)"
    assert told[1].endswith("All ranks start again and go on from the last checkpoint (restart 1 of 1).")
    assert told[2:] == ["train: going on with 1 rank (of 1 to 2)", "train: going on from the checkpoint of step 4"]


@pytest.mark.parametrize("engine", ["local", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_machine_that_joins(
    cluster: Cluster, alone: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """All is kept before more ranks start, and no step is taken twice. It counts as no failure. The engine `auto` is another one
    then."""
    monkeypatch.setattr(train, "LOOK_SECONDS", 0.5)
    run = load_config(alone.file, [*RANGE, f"train.engine={engine}", "name=more"])
    ended, joined = threading.Event(), alone.folder / "joined"

    def join() -> None:
        while not (alone.folder / "waits").exists():
            time.sleep(0.05)
        with another_machine(cluster):
            joined.touch()
            ended.wait()

    with room_for(cluster, 1):
        other = threading.Thread(target=join)
        other.start()
        try:
            result = on_some(partial(with_more, run, str(alone.folder)), restarts=0)
        finally:
            (alone.folder / "waits").touch()
            ended.set()
            other.join()
    told = told_by(capsys)
    learned_the_same(alone, "more")
    kept = result["resumed_from"]
    assert 5 <= kept < LAST
    assert kept in committed(alone, "more")
    assert taken(alone) == [1] * kept + [2] * (LAST - kept)
    assert told == [
        "train: starting with 1 rank (of 1 to 2)",
        "train: 1 rank more can be had: keeping the last step and starting again with 2",
        "train: going on with 2 ranks (of 1 to 2)", f"train: going on from the checkpoint of step {kept}",
    ]  # fmt: skip


def test_no_room_for_the_fewest(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said what is waited for; then as many start as there is room for."""
    told: list[str] = []
    with room_for(cluster, 0) as free:

        def say(text: str) -> None:
            told.append(text)
            if text.startswith("waiting"):
                free()

        monkeypatch.setattr(train, "QUIET_SECONDS", 1.0)
        monkeypatch.setattr(train, "say", say)
        assert on_some(how_many, restarts=0) == {"ranks": 2}
    assert told[:2] == [
        "waiting for the cluster to start 1 to 2 ranks with a CPU each; free are 0 CPUs and 0 GPUs",
        "train: starting with 2 ranks (of 1 to 2)",
    ]
