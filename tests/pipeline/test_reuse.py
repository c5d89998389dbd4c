"""A teacher pass never comes as a surprise, and what is in the cache is never paid for again."""

from __future__ import annotations

import sys
import time

import pytest

from distft.store.digest import YOUNG_SECONDS
from distft.teacher import scorer
from tests.helpers.runs import Bench


def test_a_new_cache_says_what_differs_from_the_nearest(finished: Bench) -> None:
    quiet = finished.run("score").err
    assert "a new teacher cache begins" not in quiet
    told = finished.run("score", "score.distribution.k=7").err
    assert "score: a new teacher cache begins" in told
    assert "distribution.k: 128 -> 7" in told


def test_reuse_only_refuses_what_would_be_scored(bench: Bench) -> None:
    bench.run("tokenize")
    bench.refused("score", "score.reuse_only=true", status=3, says="The store has none.")
    assert not list(bench.store.glob("teacher/*/IDENTITY.json"))
    bench.run("score")
    assert bench.run("score", "score.reuse_only=true").json["documents_scored"] == 0
    bench.refused("score", "score.reuse_only=true", "score.positions=all", status=3, says="positions: supervised -> all")
    rows = bench.rows()
    rows[0]["messages"][0]["content"] = "What is new?"
    bench.write_rows(rows)
    bench.run("tokenize")
    bench.refused("score", "score.reuse_only=true", status=3, says="documents are not in the cache")
    told = bench.run("score").json
    assert told["documents_scored"] == 1


def test_a_second_run_opens_no_weights_of_the_teacher(finished: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by Python, which an audit hook hears, nor by the loader, which opens files on its own."""

    def load(*_: object, **__: object) -> object:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(scorer, "load_model", load)
    time.sleep(YOUNG_SECONDS)  # only then are digests of files that were just copied remembered
    opened: list[str] = []
    active = True

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if active and event == "open" and str(arguments[0]).endswith(".safetensors"):
            opened.append(str(arguments[0]))

    finished.run("plan")  # digests of the model's files are known after this
    sys.addaudithook(hear)
    try:
        told = finished.run("score", "train.seed=7", "train.tokens_per_step=333", "score.tokens_per_batch=50").json
    finally:
        active = False
    assert told["documents_scored"] == told["tokens_scored"] == 0
    assert opened == []
