"""`distft train` on ranks that Ray starts: what one process trains, whoever dies on the way, and one voice."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distft.cluster.train import train_on_ranks
from distft.config.load import load_config
from distft.errors import TrainingError
from tests.helpers.actors import await_end, descendants
from tests.helpers.cluster import Cluster
from tests.helpers.ranked import killed_twice, mistaken, without_numbers
from tests.helpers.runs import Bench, Done, copy_bench

TWO = ("train.workers=2", "train.engine=local")
LONG = (*TWO, "train.epochs=8", "train.checkpoint.every_steps=4", "train.checkpoint.keep=20", "train.drift_every_steps=null")
LAST = 48
on_two = partial(train_on_ranks, address="local", ranks=2, gpus=0)


@pytest.fixture(scope="module")
def _scored(_pristine: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Once for all: scored, and with `whole`, a long run on two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE_DIR", str(folder / "cache"))
        bench = copy_bench(_pristine, folder / "bench")
        bench.run("tokenize")
        bench.run("score")
    return bench


@pytest.fixture(scope="module")
def _whole(_scored: Bench, _running: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        _scored.run("train", *LONG, "name=whole")
    return _scored


@pytest.fixture
def scored(_scored: Bench, tmp_path: Path, own_cache: None) -> Bench:
    return copy_bench(_scored, tmp_path / "bench")


@pytest.fixture
def whole(_whole: Bench, tmp_path: Path, own_cache: None) -> Bench:
    return copy_bench(_whole, tmp_path / "bench")


def lines(bench: Bench, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (bench.store / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def steps(bench: Bench, name: str) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in (bench.store / "runs" / name).glob("checkpoints/step-*/MANIFEST.json"))


def last_bytes(bench: Bench, name: str) -> dict[str, str]:
    """Digests of the last checkpoint's tensors."""
    manifest = json.loads((bench.store / f"runs/{name}/checkpoints/step-{LAST:08d}/MANIFEST.json").read_text())
    return {json.dumps(file["facts"], sort_keys=True): file["sha256"] for file in manifest["files"]}


def same_as_whole(bench: Bench, name: str) -> None:
    assert last_bytes(bench, name) == last_bytes(bench, "whole")
    assert [line["loss"] for line in lines(bench, name)] == [line["loss"] for line in lines(bench, "whole")]


def test_two_ranks_train_what_one_process_trains(cluster: Cluster, scored: Bench) -> None:
    alone = scored.run("train", "train.engine=local", "name=alone")
    two = scored.run("train", *TWO, "name=two")
    one_by_one = list(zip(lines(scored, "alone"), lines(scored, "two"), strict=True))
    assert len(one_by_one) == two.json["steps"] == 12
    for one, other in one_by_one:
        assert (one["step"], one["tokens"], one["epoch"]) == (other["step"], other["tokens"], other["epoch"])
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two.json.keys() == alone.json.keys()
    assert two.json | {"run": "", "loss": 0, "drift": 0} == alone.json | {"run": "", "loss": 0, "drift": 0}
    assert (two.json["loss"], two.json["drift"]) == pytest.approx((alone.json["loss"], alone.json["drift"]), rel=1e-4)
    assert two.err.splitlines()[-1].startswith("train two: 12 of 12 steps"), two.err
    assert two.err.splitlines()[0] == "train: starting 2 ranks"
    assert len(two.err.splitlines()) == len(alone.err.splitlines()) + 1, "nobody else says anything"
    # What is done is known without any rank: there is no such cluster.
    again = scored.run("train", *TWO, "name=two", "cluster.address=elsewhere:6379").json
    assert again == two.json | {"resumed_from": 12}


def test_ranks_that_are_killed(whole: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """First rank 1, then rank 0: each time all start again from the last checkpoint, and no bit is lost."""
    run = load_config(whole.file, [*LONG, "name=killed"])
    result = on_two(partial(killed_twice, run, str(whole.folder)), restarts=2)
    same_as_whole(whole, "killed")
    assert result["steps"] == LAST
    assert result["resumed_from"] in (4, 8), "a checkpoint may still be on its way when its process is killed"
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if "died" in line]
    assert [line.partition(" on ")[0] for line in told] == ["rank 1", "rank 0"]
    assert told[0].endswith("All ranks start again and go on from the last checkpoint (restart 1 of 2).")
    assert "Another rank is gone" not in said.err
    assert said.out == ""


def test_a_driver_that_is_stopped_and_then_killed(whole: Bench) -> None:
    """Each time the same command goes on, and no rank stays behind."""
    done = struck(whole, signal.SIGTERM)
    stopped = steps(whole, "struck")[-1]
    assert done.status == 1
    assert done.json == {"error": "interrupted", "where": "", "help": "Run the same command again."}
    assert "SIGTERM: stopping after this step, with a checkpoint." in done.err
    assert f"Stopped after step {stopped}, which is kept. The same command goes on" in done.err
    assert "Traceback" not in done.err
    done = struck(whole, signal.SIGKILL)
    reached = steps(whole, "struck")[-1]
    assert done.status == -signal.SIGKILL
    assert stopped < reached <= LAST  # ranks may be done before they notice
    assert whole.run("train", *LONG, "name=struck").json["resumed_from"] == reached
    same_as_whole(whole, "struck")


def struck(bench: Bench, number: signal.Signals) -> Done:
    """The command, with a signal when it has kept a step; all that it had started is gone after it."""
    before = steps(bench, "struck")
    process = bench.start("train", *LONG, "name=struck")
    until = time.monotonic() + 120
    while steps(bench, "struck") == before:
        assert process.process.is_alive(), process.err.read_text()
        assert time.monotonic() < until
        time.sleep(0.005)
    assert process.process.pid is not None
    below = descendants(process.process.pid)
    assert json.loads((bench.store / "runs/struck/checkpoints/OWNER.json").read_text())["process"] in below
    process.signal(number)
    done = process.wait()
    assert not await_end({pid for pid in below if not is_agent(pid)}, 60)
    return done


def is_agent(pid: int) -> bool:
    """Two agents of Ray try for a minute to tell a dead cluster of its end; they hold nothing."""
    try:
        return b"agent" in Path(f"/proc/{pid}/cmdline").read_bytes().lower()
    except OSError:
        return False


def test_bad_input_is_told_once_and_not_tried_again(cluster: Cluster, scored: Bench) -> None:
    done = scored.refused("train", *TWO, "train.warmup_steps=50", status=2, says="warmup_steps=50")
    assert done.err.count("error:") == 1
    assert "start again" not in done.err


def test_a_loss_that_is_no_number_ends_the_run_with_its_own_text(cluster: Cluster, scored: Bench) -> None:
    run = load_config(scored.file, [*TWO, "train.checkpoint.every_steps=2"])
    with pytest.raises(TrainingError) as caught:
        on_two(partial(without_numbers, run), restarts=3)
    assert caught.value.where.startswith("step 3, rows [")
    assert "The last checkpoint is step 2." in caught.value.help
    assert steps(scored, "first") == [2]


def test_a_mistake_of_ours_keeps_its_traceback(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a death that another start could cure. And what ranks see around them is what the driver has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(RuntimeError, match=r"rank 1 on .*: KeyError: 'a mistake of ours'") as caught:
        on_two(partial(mistaken, str(tmp_path)), restarts=1)
    assert "in mistaken" in str(caught.value.__cause__)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("rank 1 on ")
    assert " died: " in told
    assert told.endswith("(restart 1 of 1).")
    for rank in "01":
        assert json.loads((tmp_path / f"rank-{rank}").read_text()) == {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "DISTFT_CACHE_DIR": os.environ["DISTFT_CACHE_DIR"], "folder": str(tmp_path),
        }  # fmt: skip


def test_zero3_trains_what_one_process_trains(cluster: Cluster, scored: Bench) -> None:
    scored.run("train", "train.engine=local", "train.max_steps=4", "name=alone")
    scored.run("train", "train.engine=auto", "train.workers=2", "train.max_steps=4", "name=two")
    sharded = [line["loss"] for line in lines(scored, "two")]
    assert sharded == pytest.approx([line["loss"] for line in lines(scored, "alone")], rel=1e-6)
