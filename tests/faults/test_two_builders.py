"""Builders beside each other, and cleaners beside builders: one cache, whole, and nothing that stays for ever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from distft.store import s3
from distft.store.location import Location, open_location
from distft.teacher.identity import IDENTITY
from distft.teacher.prune import Pruned, prune
from tests.helpers.caches import only_cache
from tests.helpers.contents import Contents, contents, nothing_left_over
from tests.helpers.runs import Bench
from tests.helpers.s3 import SERVERS, empty_prefix

GRACE = 5.0
"""Seconds; `distft cache prune` takes no less than an hour."""


@pytest.fixture(params=["local", *SERVERS])
def shared(request: pytest.FixtureRequest, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench with an empty store on each kind of disk."""
    if request.param != "local":
        bench.write(bench.config() | {"store": empty_prefix(request.getfixturevalue(f"_{request.param}"), monkeypatch)})
    return bench


@pytest.fixture(scope="module")
def expected(_finished: Bench, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return contents(only_cache(open_location(str(_finished.store))), tmp_path_factory.mktemp("staging"))


def cache_of(bench: Bench) -> Location:
    return only_cache(open_location(bench.config()["store"]))


def test_two_that_score_at_once(shared: Bench, expected: Contents, tmp_path: Path) -> None:
    shared.run("tokenize")
    both = [shared.start("score"), shared.start("score")]
    told = [process.wait() for process in both]
    assert [done.status for done in told] == [0, 0], [done.err for done in told]
    assert told[0].json["teacher"] == told[1].json["teacher"]
    assert sum(done.json["documents_scored"] for done in told) == 30, "what one was late with it does not count"
    assert contents(cache_of(shared), tmp_path / "staging") == expected
    assert nothing_left_over(cache_of(shared))
    assert shared.run("score").json["documents_scored"] == 0


@contextmanager
def pruned_all_the_time(store: Location) -> Iterator[list[Pruned]]:
    """Each cache of a store, again and again, by a thread with connections of its own."""
    done, over, failed = list[Pruned](), threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            while not over.is_set():
                for name in store.child("teacher").folders():
                    done.append(prune(store.child("teacher", name), grace_seconds=GRACE))
                time.sleep(0.01)
        except BaseException as error:  # told where the test can see it
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()
    assert not failed, failed


def test_pruning_takes_nothing_from_a_build(shared: Bench, expected: Contents, tmp_path: Path) -> None:
    """An old orphan goes while two builders write; all that they need stays."""
    shared.run("tokenize")
    store = open_location(shared.config()["store"])
    teacher = shared.run("score").json["teacher"].rpartition("/")[2]
    cache = store.child("teacher", teacher)
    for name in cache.names(recursive=True):
        if name != IDENTITY:
            cache.delete(name)
    orphan = f"data/part-{uuid4().hex}.arrow"
    cache.create(orphan, b"of a build that died")
    time.sleep(GRACE + 1)
    with pruned_all_the_time(store) as pruned:
        both = [shared.start("score"), shared.start("score")]
        told = [process.wait() for process in both]
    assert [done.status for done in told] == [0, 0], [done.err for done in told]
    gone = {name for one in pruned for name in one.files}
    assert orphan in gone
    assert contents(cache, tmp_path / "staging") == expected
    assert not gone & set(cache.names(recursive=True))
    assert nothing_left_over(cache)


def test_a_file_is_as_old_as_the_server_says(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's clock is a day ahead: what was written just now is not old for that."""
    store = open_location(s3_url)
    store.create("data/x", b"1")
    real = time.time
    monkeypatch.setattr(s3.time, "time", lambda: real() + 86_400)
    assert store.age("data/x") < 60
    assert prune(store, grace_seconds=3600).files == {}


def test_scratch_files_of_killed_writers_go(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3.tempfile, "gettempdir", lambda: str(tmp_path))
    store = open_location(s3_url)
    left, young = store.scratch("data/a"), store.scratch("data/b")
    for path in (left, young):
        path.write_bytes(b"half a shard")
    os.utime(left, (0, 0))
    store.scratch("data/c")
    assert [path for path in (left, young) if path.exists()] == [young]
