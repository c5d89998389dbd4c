"""A teacher pass never comes as a surprise, and what is in the cache is never paid for again."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from distft.store.digest import YOUNG_SECONDS
from distft.teacher import scorer
from tests.helpers.opened import listening
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


def scores_nothing(bench: Bench, *overrides: str, unread: Callable[[str], bool]) -> None:
    """Another `score` with these overrides opens no such file: neither by Python, which an audit hook hears, nor by the loader, which
    opens files on its own."""

    def load(*_: object, **__: object) -> object:
        raise AssertionError("the teacher was loaded")

    time.sleep(YOUNG_SECONDS)  # only then are digests of files that were just written remembered
    bench.run("plan")  # digests of the model's files are known after this
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "load_model", load)
        with listening(unread) as opened:
            told = bench.run("score", *overrides).json
    assert told["documents_scored"] == told["tokens_scored"] == 0
    assert opened == []


def test_a_second_run_opens_no_weights_of_the_teacher(finished: Bench) -> None:
    overrides = ("train.seed=7", "train.tokens_per_step=333", "score.tokens_per_batch=50")
    scores_nothing(finished, *overrides, unread=lambda path: path.endswith(".safetensors"))
