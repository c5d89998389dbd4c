"""A whole build against an S3 server on a bad day: the same cache as on a quiet disk, or an error; never other bytes, never more."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from distft.corpus.reader import Corpus
from distft.store import patience, s3
from distft.store.location import Location, open_location
from distft.teacher import staging
from tests.helpers.caches import only_cache
from tests.helpers.contents import Contents, contents, nothing_left_over
from tests.helpers.proxy import Proxy, Weather
from tests.helpers.runs import Bench, Done, distft
from tests.helpers.s3 import BUCKET

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]


@dataclass(frozen=True)
class Undisturbed:
    """What comes out where nothing goes wrong."""

    contents: Contents
    documents: int
    losses: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(_finished: Bench, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE_DIR", str(tmp_path_factory.mktemp("undisturbed")))
        losses = figures(_finished.run("train").json)
    cache = only_cache(open_location(str(_finished.store)))
    return Undisturbed(contents(cache, tmp_path_factory.mktemp("staging")), 30, losses)


@pytest.fixture
def far(bench: Bench) -> Bench:
    """A bench whose store is an empty prefix on S3."""
    bench.write(bench.config() | {"store": f"s3://{BUCKET}/{uuid4().hex}"})
    return bench


def figures(told: dict[str, Any]) -> dict[str, Any]:
    return {key: told[key] for key in ("loss", "drift", "steps")}


def store_of(bench: Bench) -> Location:
    return open_location(bench.config()["store"])


def ended(bench: Bench, verb: str, *overrides: str) -> Done:
    """However it ended."""
    return distft(verb, str(bench.file), *overrides, "--json")


def open_corpus(bench: Bench) -> Corpus:
    folder = store_of(bench).child("corpus")
    [name] = folder.folders()
    return Corpus.open(folder.child(name), bench.folder / f"staging-{uuid4().hex}")


def build(bench: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")


def forget(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has staged nothing."""
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(bench.folder / f"cache-{uuid4().hex}"))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_build_on_a_bad_day(
    proxy: Proxy, far: Bench, undisturbed: Undisturbed, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(far)
    quiet, proxy.asked = len(proxy.asked), []
    far.write(far.config() | {"store": f"s3://{BUCKET}/{uuid4().hex}"})
    forget(far, monkeypatch)
    proxy.weather = weather = Weather(seed)
    build(far)
    faults, asked = len(weather.made), len(proxy.asked)
    assert faults > 10
    assert quiet <= asked <= quiet + 3 * faults, "a fault costs one more try, and at most a look at what became of the first"
    told = far.run("train").json
    assert figures(told) == undisturbed.losses
    proxy.weather = None
    cache = only_cache(store_of(far))
    assert contents(cache, tmp_path / "staging") == undisturbed.contents
    assert nothing_left_over(cache)


def test_actors_on_a_bad_day(proxy: Proxy, far: Bench, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Each has connections and retries of its own."""
    far.run("tokenize")
    proxy.weather = weather = Weather(100)
    done = far.start("score", "score.workers=2").wait()
    proxy.weather = None
    assert done.status == 0, done.err
    assert len(weather.made) > 3
    cache = only_cache(store_of(far))
    assert contents(cache, tmp_path / "staging") == undisturbed.contents
    assert nothing_left_over(cache)


# --- wrong bytes with a 200 ------------------------------------------------------------------------------------------

READ = ["corpus/.*/MANIFEST", "corpus/.*/data/train", "corpus/.*/data/heldout", "teacher/.*/data/part", "teacher/.*/coverage/"]
WRITTEN = [*READ, "corpus/.*/parts/", "teacher/.*/parts/", "teacher/.*/IDENTITY"]


class Flips:
    """Flips a bit in the bodies of requests whose path fits, the first `times` or all; of listings never, which are no objects."""

    def __init__(self, method: str, pattern: str, times: int = -1) -> None:
        self.method, self.pattern, self.left, self.done = method, re.compile(pattern), times, 0

    def __call__(self, method: str, path: str) -> Any:
        if method != self.method or "list-type" in path or self.left == 0 or not self.pattern.search(path):
            return None
        self.left -= 1
        self.done += 1
        return "flip" if method == "GET" else "flip_request"


@pytest.fixture
def built(proxy: Proxy, far: Bench) -> Bench:
    build(far)
    return far


@pytest.mark.parametrize("hidden", [True, False], ids=["unseen", "the server's checksum tells"])
def test_wrong_bytes_are_never_trained_on(
    proxy: Proxy, built: Bench, undisturbed: Undisturbed, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong once, they are fetched again; wrong always, that is an error about this file."""
    monkeypatch.setattr(staging, "THREADS", 1)  # so that one shard alone is asked for before the error is told
    proxy.hides_checksums = hidden
    forget(built, monkeypatch)
    each = [Flips("GET", pattern, 1) for pattern in READ]
    proxy.weather = lambda method, path: next(filter(None, (flips(method, path) for flips in each)), None)
    assert figures(built.run("train", "name=once").json) == undisturbed.losses
    assert [flips.done for flips in each] == [1] * len(READ)
    for number, pattern in enumerate(READ):
        forget(built, monkeypatch)
        proxy.bits.seed(number)
        proxy.weather = flips = Flips("GET", pattern)
        done = built.refused("train", "name=always", status=3, says=pattern.rpartition("/")[2])
        assert "remove the artifact's folder" in done.json["help"] or "restore the file" in done.json["help"]
        assert 1 < flips.done <= 2 * (patience.REREADS + 1)
    proxy.weather = None
    assert store_of(built).child("runs", "always", "checkpoints").names(recursive=True) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_that_flip_anywhere(
    proxy: Proxy, built: Bench, undisturbed: Undisturbed, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in six of all bodies that are read is wrong: a run ends right or is refused, and by which file."""
    random = Weather(seed).random
    proxy.bits.seed(seed)
    flips = Flips("GET", "corpus|teacher")
    proxy.weather = lambda method, path: flips(method, path) if random.random() < 1 / 6 else None
    statuses = set[int]()
    for attempt in range(2):
        forget(built, monkeypatch)
        name = f"name=any-{attempt}"
        done = ended(built, "train", name)
        statuses.add(done.status)
        if done.status == 0:
            assert figures(done.json) == undisturbed.losses
        else:
            assert done.status == 3, done.err
            assert "Traceback" not in done.err
    assert flips.done > 0
    assert statuses <= {0, 3}


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_arrives_wrong_is_put_right(
    proxy: Proxy, far: Bench, undisturbed: Undisturbed, pattern: str, tmp_path: Path
) -> None:
    """The writer notices by the ETag, while it still has the right bytes."""
    proxy.weather = flips = Flips("PUT", pattern, 1)
    build(far)
    assert flips.done == 1
    corpus = open_corpus(far)
    assert sum(1 for split in corpus.splits for _ in corpus.documents(split)) == undisturbed.documents
    assert contents(only_cache(store_of(far)), tmp_path / "staging") == undisturbed.contents


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_never_arrives_right_is_not_believed(proxy: Proxy, far: Bench, pattern: str) -> None:
    proxy.weather = flips = Flips("PUT", pattern)
    tokenized = ended(far, "tokenize")
    done = ended(far, "score") if tokenized.status == 0 else tokenized
    assert done.status == 3, done.err
    assert "Traceback" not in done.err
    assert "wrong bytes arrive" in done.json["error"]
    assert flips.done == patience.REREADS + 1
    proxy.weather = None
    far.refused("train", status=3, says="")


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)  # a real one checks what arrives, and such a request is sent again
@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_a_server_without_honest_etags_stored_wrong_is_refused_by_readers(
    proxy: Proxy, far: Bench, pattern: str, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no writer can know: the body is stored wrong, and the reply has the ETag of the right one."""
    monkeypatch.setattr(s3.S3Location, "_put", _trusting)
    proxy.weather = flips = Flips("PUT", pattern, 1)
    statuses = {ended(far, verb).status for verb in ("tokenize", "score")}
    forget(far, monkeypatch)
    done = ended(far, "train")
    assert flips.done == 1
    assert "Traceback" not in done.err
    assert statuses <= {0, 3}
    if done.status == 0:
        assert "/parts/" in pattern or "IDENTITY" in pattern, "training reads corpus and coverage"
        assert figures(done.json) == undisturbed.losses
    else:
        assert done.status == 3, done.err


def _trusting(self: Any, name: str, data: bytes, **request: Any) -> None:
    self._call("put_object", Key=self._key(name), Body=data, **request)


# --- whole files, once -----------------------------------------------------------------------------------------------


def data_read(proxy: Proxy) -> list[str]:
    return [path for path in proxy.requests("GET", "/data/") if "/runs/" not in path]


def test_a_second_reader_of_a_machine_asks_for_no_data(
    proxy: Proxy, built: Bench, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(built, monkeypatch)
    proxy.asked.clear()
    built.run("train", "name=one")
    read = data_read(proxy)
    stored = [
        f"{kind}/{name}" for kind in ("corpus", "teacher") for name in store_of(built).child(kind).names(recursive=True)
        if "/data/" in name
    ]  # fmt: skip
    assert len(read) == len(set(read)) == len(stored), "each file whole, and once"
    proxy.asked.clear()
    told = built.run("train", "name=two").json
    assert figures(told) == undisturbed.losses
    assert data_read(proxy) == []


def test_two_readers_at_once_share_what_they_fetch(proxy: Proxy, built: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(built, monkeypatch)
    proxy.asked.clear()
    both = [built.start("train", f"name=reader-{number}") for number in range(2)]
    for process in both:
        done = process.wait()
        assert done.status == 0, done.err
    read = data_read(proxy)
    assert read
    assert len(read) == len(set(read))
