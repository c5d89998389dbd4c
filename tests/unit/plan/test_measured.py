"""What a corpus asks of the teacher, and what a token took in caches that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distft.plan.measured import TokenBytes, _same_policy, bytes_in_store, reading
from distft.teacher.catalogue import figures
from distft.teacher.identity import FORMAT
from tests.helpers.stores import Lab, lab, random_documents, shared_model, write_corpus

DOCUMENTS, HELDOUT = random_documents(12, seed=71), random_documents(4, seed=72)


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    return lab(tmp_path, documents=DOCUMENTS, heldout=HELDOUT)


def told(made: Lab, **changed: Any) -> TokenBytes | None:
    return bytes_in_store(made.store, made.identity() | changed)


def own(made: Lab) -> TokenBytes:
    [name] = made.store.child("teacher").folders()
    return TokenBytes(amount=figures(made.store.child("teacher", name))["bytes_per_token"], basis=f"cache {name}")


def scored_larger(made: Lab) -> Lab:
    """Beside it in the store: another teacher's cache, of more documents."""
    corpus = write_corpus(made.store, made.staging, train=random_documents(60, seed=73), heldout=HELDOUT)
    larger = replace(made, model=shared_model(seed=1), corpus=corpus)
    larger.score()
    return larger


@pytest.mark.parametrize("positions", ["supervised", "all"])
def test_each_document_is_read_once(made: Lab, positions: str) -> None:
    corpus = write_corpus(made.store, made.staging, train=[*DOCUMENTS, *DOCUMENTS[:5]], heldout=HELDOUT)
    found, every = reading(corpus, positions), [*DOCUMENTS, *HELDOUT]
    assert found.digests == {document.digest for document in every}
    assert found.tokens == sum(len(document) for document in every)
    scored = [len(one) - 1 if positions == "all" else int(one.supervised.sum()) for one in every]
    assert found.scored_tokens == sum(scored)


def test_what_the_plan_expects_is_what_scoring_does(made: Lab) -> None:
    coverage = made.score().coverage
    assert reading(made.corpus, "supervised").scored_tokens == coverage.facts["scored_tokens"]


def test_no_cache_says_nothing(made: Lab) -> None:
    assert told(made) is None


def test_the_very_cache_is_asked_first(made: Lab) -> None:
    made.score()
    mine = own(made)
    larger = scored_larger(made)
    assert told(made) == mine
    assert told(larger) != mine


def test_another_cache_with_the_same_policy_is_asked_next(made: Lab) -> None:
    """The same teacher's before larger ones; else the one with most tokens."""
    made.score()
    mine = own(made)
    larger = scored_larger(made)
    of_larger = told(larger)
    assert told(made, dtype="bfloat16") == mine
    assert told(made, dtype="bfloat16", weights={"files": {}, "config": "another"}) == of_larger != mine


@pytest.mark.parametrize(
    "changed",
    [
        {"distribution": {"kind": "none"}},
        {"distribution": {"kind": "topk", "k": 64, "min_prob": 1e-3}},
        {"positions": "all"},
        {"format": f"{FORMAT}-and-later"},
    ],
)
def test_another_policy_says_nothing_of_this_one(made: Lab, changed: dict[str, Any]) -> None:
    made.score()
    assert told(made, **changed) is None


def test_hidden_states_compare_with_the_same_teachers_alone(made: Lab) -> None:
    """Another teacher is of another width."""
    hidden = made.identity() | {"distribution": {"kind": "hidden"}}
    assert _same_policy(hidden, dict(hidden))
    assert not _same_policy(hidden, hidden | {"weights": {}})
    assert not _same_policy(hidden, hidden | {"dtype": "bfloat16"})
    assert _same_policy(made.identity(), made.identity() | {"dtype": "bfloat16"})


def test_a_cache_without_parts_and_a_damaged_one_are_passed_over(made: Lab) -> None:
    made.score()
    folder = next((made.folder / "store" / "teacher").iterdir())
    part = sorted((folder / "parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-20])
    assert told(made, dtype="bfloat16") is None
    for one in (folder / "parts").iterdir():
        one.unlink()
    assert told(made) is None
