"""The driver: which units it gives out and in which order, what it counts as its own, and what it holds meanwhile."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distft.corpus.reader import Corpus
from distft.engine.load import LanguageModel, load_model
from distft.store.manifest import Manifest
from distft.teacher.build import Scored, _Pace, build_teacher, in_process
from distft.teacher.forward import score_documents
from distft.teacher.scores import Scores
from tests.helpers.caches import only_cache
from tests.helpers.contents import contents, nothing_left_over
from tests.helpers.stores import Lab, lab, random_documents

DOCUMENTS = random_documents(120, seed=95)


def score(made: Lab, mapping: Any = in_process) -> Scored:
    return build_teacher(made.run, made.corpus, made.model, made.store, mapping)


def test_two_drivers_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither knows of the other but by the parts that it finds; what both were at, one of them counts."""
    made, read, both = lab(tmp_path / "both", documents=DOCUMENTS), list[bytes](), list[Scored]()
    one_at_a_time = threading.Lock()  # transformers loads one model at a time

    def load(*args: Any, **given: Any) -> LanguageModel:
        with one_at_a_time:
            return load_model(*args, **given)

    def slowly(model: Any, documents: Sequence[Any], *rest: Any) -> list[Scores]:
        read.extend(one.tobytes() for one in documents)
        time.sleep(0.02)
        with one_at_a_time:
            return score_documents(model, documents, *rest)

    monkeypatch.setattr("distft.teacher.scorer.load_model", load)
    monkeypatch.setattr("distft.teacher.scorer.score_documents", slowly)

    def work() -> None:
        corpus = Corpus.open(made.corpus.folder, made.staging)
        both.append(build_teacher(made.run, corpus, made.model, made.store))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.documents_scored for one in both) == len(DOCUMENTS)
    assert sum(one.tokens_scored for one in both) == sum(int(one.supervised.sum()) for one in DOCUMENTS)
    assert min(one.documents_scored for one in both) > len(DOCUMENTS) / 10
    assert len(read) < 1.5 * len(DOCUMENTS), "in one order both would read all of it"
    assert both[0].coverage.held == both[1].coverage.held
    alone = lab(tmp_path / "alone", documents=DOCUMENTS)
    score(alone)
    assert contents(only_cache(made.store), tmp_path / "x").digest == contents(only_cache(alone.store), tmp_path / "y").digest
    assert nothing_left_over(only_cache(made.store))


def test_no_two_drivers_have_one_order(tmp_path: Path) -> None:
    made, orders = lab(tmp_path, documents=DOCUMENTS), list[list[str]]()

    def stop(make_worker: Any, units: Any, report: Any) -> Any:
        orders.append([unit.name for unit in units])
        raise KeyboardInterrupt
        yield

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            score(made, stop)
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


def test_what_another_was_first_with_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither its documents nor its pace; progress reaches its end all the same."""
    made = lab(tmp_path, documents=DOCUMENTS)

    def overtaken(make_worker: Any, units: Any, report: Any) -> Any:
        assert score(made).documents_scored == len(DOCUMENTS)
        capsys.readouterr()
        yield from in_process(make_worker, units, report)

    scored = score(made, overtaken)
    assert (scored.documents_scored, scored.tokens_scored, scored.tokens_per_second) == (0, 0, None)
    assert scored.coverage.held == {one.digest for one in DOCUMENTS}
    total = f"{made.corpus.lengths('train').sum():,}"
    assert f"score: {total} of {total} tokens" in capsys.readouterr().err


def test_pace_is_of_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 6.0, 15.0])
    monkeypatch.setattr("distft.teacher.build.time.monotonic", lambda: next(clock))
    told: list[float] = []
    pace = _Pace(lambda amount, note: told.append(amount))
    for amount in (0, 900, 100):
        pace(amount, "")
    assert told == [0, 900, 100]
    assert (pace.rate(0), pace.rate(900), pace.rate(1000)) == (100, 10, None)


def test_no_parts_are_held_while_the_teacher_reads(tmp_path: Path) -> None:
    """Each names its documents: hundreds of megabytes in a large cache, which nothing looks at until the end."""
    made = lab(tmp_path, documents=DOCUMENTS)

    def half(make_worker: Any, units: Any, report: Any) -> Any:
        yield from in_process(make_worker, units[::2], report)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(made, half)
    cache, held = only_cache(made.store).url.rpartition("/")[2], list[int]()

    def look(make_worker: Any, units: Any, report: Any) -> Any:
        gc.collect()
        parts = [one for one in gc.get_objects() if isinstance(one, Manifest) and one.kind == "teacher-part"]
        held.append(sum(one.identity["teacher"] == cache for one in parts))
        yield from in_process(make_worker, units, report)

    score(made, look)
    assert held == [0]
