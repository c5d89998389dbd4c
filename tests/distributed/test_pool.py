"""The pool alone, with workers that do next to nothing: what it gives back, what it survives, and what it leaves behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from distft.cluster import pool as pool_module
from distft.cluster.pool import ATTEMPTS, IN_FLIGHT, Pool, map_units, open_pool
from distft.cluster.session import _connect, _signals_wait, ray_session
from distft.errors import CorruptArtifactError, DistftError, UserInputError
from tests.helpers.actors import Answer, MakeToy, Task, alive, await_end, noted
from tests.helpers.cluster import Cluster

REPOSITORY = Path(__file__).parents[2]


def tasks(count: int, *special: Task, seconds: float = 0.02) -> list[Task]:
    return [*(Task(f"u{number}", seconds=seconds) for number in range(count)), *special]


def test_each_unit_is_done_once_by_workers_that_are_kept(cluster: Cluster, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    most = 0
    with open_pool(MakeToy(tmp_path), workers=2) as pool:
        found: list[Answer] = []
        for answer in pool.map(tasks(12), lambda amount, note: told.append((amount, note))):
            found.append(answer)
            most = max(most, *(len(hand.attempts) for hand in pool.hands))
    assert sorted(answer.name for answer in found) == sorted(task.name for task in tasks(12))
    pids = Counter(answer.pid for answer in found)
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert noted(tmp_path, "made") == 2
    for pid, count in pids.items():
        assert sorted(answer.nth for answer in found if answer.pid == pid) == list(range(1, count + 1))
    assert sum(amount for amount, _ in told) == 24
    assert told[-1][1].startswith("2 of 2 workers, ")
    assert told[-1][1].endswith("/s each")
    assert most == IN_FLIGHT
    assert {answer.threads for answer in found} == {"1"}, "a worker has one core"
    assert not await_end(set(pids)), "actors outlive their pool"


def test_no_unit_waits_behind_a_busy_worker_while_another_has_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with open_pool(MakeToy(tmp_path), workers=2) as pool:
        units = [Task("long", steps=10, seconds=0.15), *tasks(3)]
        assert [answer.name for answer in pool.map(units)][-1] == "long"


def test_an_error_of_a_worker_comes_back_as_itself(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError) as caught, open_pool(MakeToy(tmp_path), workers=2) as pool:
        list(pool.map(tasks(2, Task("broken", fate="raise"))))
    assert (caught.value.problem, caught.value.where, caught.value.help) == ("a unit that is broken", "here", "Mend it.")
    assert noted(tmp_path, "broken") == 1, "what is an answer is not tried again"
    with pytest.raises(CorruptArtifactError, match="broken"):
        list(map_units(MakeToy(tmp_path, "raise"), tasks(1), lambda amount, note: None, workers=1))


def test_a_mistake_of_ours_keeps_its_traceback(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="in suffer") as caught, open_pool(MakeToy(tmp_path), workers=1) as pool:
        list(pool.map([Task("bug", fate="bug")]))
    assert "a mistake of ours" in str(caught.value)


@pytest.mark.parametrize("when", ["at work", "when made"])
def test_a_killed_worker_gives_its_units_back(
    cluster: Cluster, tmp_path: Path, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    amounts: list[float] = []
    at_work = when == "at work"
    make = MakeToy(tmp_path, "" if at_work else "die once")
    with open_pool(make, workers=2) as pool:
        units = [Task("fatal", fate="die once" if at_work else ""), *tasks(8)]
        found = list(pool.map(units, lambda amount, note: amounts.append(amount)))
    assert sorted(answer.name for answer in found) == sorted(unit.name for unit in units)
    assert sum(amounts) == 18, "what was lost is taken off again"
    assert noted(tmp_path, "made") in (2, 3), "another takes its place, unless the rest is done before it has started"
    assert noted(tmp_path, "fatal") == (2 if at_work else 1)
    said = capsys.readouterr()
    assert said.err.count("a worker died over unit") == 1, "only the unit that it was at is to blame"
    assert said.out == "", "stdout belongs to --json"


def test_a_unit_that_kills_is_given_up(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    with pytest.raises(DistftError) as caught, open_pool(MakeToy(tmp_path), workers=2) as pool:
        names.extend(answer.name for answer in pool.map(tasks(4, Task("fatal", fate="die"))))
    assert caught.value.where == "unit fatal"
    assert f"Unit fatal was given up: {ATTEMPTS} workers died" in caught.value.problem
    assert "died" in caught.value.problem.partition("The last one: ")[2], "the cause is told"
    assert noted(tmp_path, "fatal") == ATTEMPTS
    assert capsys.readouterr().err.count("a worker died over unit fatal") == ATTEMPTS - 1


def test_no_worker_is_left_when_a_block_is_left_by_an_exception(cluster: Cluster, tmp_path: Path) -> None:
    pids: set[int] = set()

    def interrupted() -> None:
        with open_pool(MakeToy(tmp_path), workers=2) as pool:
            for answer in pool.map(tasks(400)):
                pids.add(answer.pid)
                if len(pids) == 2:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not await_end(pids)


def test_a_person_is_told_what_is_awaited(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that no machine has room for does not start, and nothing else happens."""
    monkeypatch.setattr(pool_module, "QUIET_SECONDS", 0.3)

    def said(text: str) -> None:
        assert text.startswith("waiting for the cluster to start 1 workers with a CPU and 1 GPU each; free are 6 CPUs and 0 GPUs")
        raise KeyboardInterrupt

    monkeypatch.setattr(pool_module, "say", said)
    until = time.monotonic() + 20
    while cluster.ray.available_resources().get("CPU") != 6 and time.monotonic() < until:
        time.sleep(0.1)
    pool = Pool(cluster.ray, MakeToy(tmp_path), workers=1, gpus_per_actor=1)
    with pytest.raises(KeyboardInterrupt):
        list(pool.map(tasks(1)))
    pool.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_embedded_ray_ends_with_its_driver(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, which a terminal sends to every process of the group; a polite end; and an end without any chance to clear away."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.actors", str(tmp_path)], cwd=REPOSITORY, env=environment | {"HOME": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 90
        while not (tmp_path / "pids").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.05)
        pids = {int(word) for word in (tmp_path / "pids").read_text().split()}
        assert len([pid for pid in pids if alive(pid)]) >= 4, "two actors, and what Ray itself runs"
        (folder,) = {found for pid in pids for word in command(pid) for found in re.findall(r"/tmp/distft-ray-\d+-\w+", word)}
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == ""
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, err) == (1, "stopped\n")
        assert not Path(folder).exists()
    # Two agents of Ray first try to tell the dead cluster of its end, for a minute; they hold nothing.
    agents = {pid for pid in pids if number == signal.SIGKILL and "Agent" in " ".join(command(pid))}
    assert len(agents) <= 2
    assert not await_end(pids - agents)
    shutil.rmtree(folder, ignore_errors=True)
    assert not (tmp_path / ".ray").exists(), "the token was written down"


def command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


JOIN = """
import sys
from distft.cluster.session import ray_session
from distft.errors import UserInputError
try:
    with ray_session(sys.argv[1], cpus=1, gpus=0):
        print("joined")
except UserInputError as error:
    print(error.problem)
"""


def test_a_cluster_is_not_joined_without_its_token(cluster: Cluster) -> None:
    assert cluster.address.startswith("127.0.0.1:"), "an embedded Ray listens on loopback alone"
    done = subprocess.run(
        [sys.executable, "-c", JOIN, cluster.address], cwd=REPOSITORY, env={**os.environ, "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith("No Ray cluster could be joined"), done.stderr


def test_an_address_where_nobody_answers_is_told_at_once(cluster: Cluster) -> None:
    with pytest.raises(UserInputError, match=r"No Ray cluster could be joined: .*refused") as caught:
        _connect(cluster.ray, "127.0.0.1:1")
    assert caught.value.where == "cluster.address=127.0.0.1:1"
    with pytest.raises(KeyboardInterrupt):
        _connect(Stopped(), "local")


class Stopped:
    """Stands for ray when SIGTERM comes while it connects: its own handler leaves by SystemExit."""

    def init(self, *_: object, **__: object) -> None:
        raise SystemExit(15)


def test_a_signal_while_ray_starts_counts_afterwards() -> None:
    reached = []

    def started() -> None:
        with _signals_wait():
            signal.raise_signal(signal.SIGTERM)
            reached.append("the end")

    def impatient() -> None:
        with _signals_wait():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("never")

    before = signal.getsignal(signal.SIGTERM)
    for way in (started, impatient):
        with pytest.raises(KeyboardInterrupt):
            way()
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_stay_ours_and_a_connected_process_stays_connected(cluster: Cluster) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ray_session("local", cpus=1, gpus=0) as ray:
        assert ray is cluster.ray
        assert signal.getsignal(signal.SIGTERM) is before
    assert cluster.ray.is_initialized()


@pytest.mark.parametrize("group", [1, 2])
def test_units_do_not_wait_for_machines_that_never_come(cluster: Cluster, tmp_path: Path, group: int) -> None:
    """The cluster has room for six actors; the others pend, with a unit each, until those that live take them."""
    with open_pool(MakeToy(tmp_path), workers=8 // group, group=group) as pool:
        assert {answer.name for answer in pool.map(tasks(12))} == {task.name for task in tasks(12)}
        assert 1 <= len(pool.hands) <= 6 // group
        assert {answer.name for answer in pool.map(tasks(3))} == {"u0", "u1", "u2"}, "those that are left do all the rest"


def test_a_cluster_without_gpus_is_not_taken_for_one_by_default(cluster: Cluster, tmp_path: Path) -> None:
    with (
        pytest.raises(UserInputError, match="has no GPU, or none yet"),
        open_pool(MakeToy(tmp_path), address=cluster.address, workers=None),
    ):
        pass
