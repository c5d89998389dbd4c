"""Before the first step the untouched model is held against its own cache: a cache that is shifted, foreign or mixed up is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.engine.local import LocalEngine
from distft.engine.world import World
from distft.errors import CorruptArtifactError
from distft.teacher.forward import Scores, score_documents
from distft.teacher.head_copy import commit_head
from distft.teacher.identity import teacher_folder
from distft.train.drift import Drift, measure_drift
from tests.helpers.stores import Lab, document, lab, loaded, random_documents, shared_model

Scorer = Callable[..., list[Scores]]

# All of one shape, so that even swapped rows are about as many tokens at the same places.
ALIKE = [document(one.tokens.tolist(), range(1, 16)) for one in random_documents(10, seed=12, shortest=16, longest=16)]
SIGNALS_ALONE = {"distribution": {"kind": "none"}}


def rolled(scores: Scores, by: int) -> Scores:
    """Every column but the positions moved by one token: what an off-by-one between teacher and student would leave."""
    order = np.roll(np.arange(len(scores.positions)), by)
    ends = np.cumsum(scores.counts, dtype=np.int64)
    entries = np.concatenate([np.arange(ends[i] - int(scores.counts[i]), ends[i]) for i in order]).astype(np.int64)
    per_token = {f.name for f in fields(Scores)} - {"positions", "ids", "logprobs", "hidden"}
    columns = {name: getattr(scores, name)[order] for name in per_token}
    return Scores(positions=scores.positions, ids=scores.ids[entries], logprobs=scores.logprobs[entries], **columns)


def anothers(model: Any, read: Sequence[Any], places: Sequence[Any], policy: Any, group: Any) -> list[Scores]:
    """Each document's row is the next one's of the corpus."""
    names = [one.tokens.tobytes() for one in ALIKE]
    others = [ALIKE[(names.index(tokens.tobytes()) + 1) % len(ALIKE)].tokens for tokens in read]
    return score_documents(model, others, places, policy)


def foreign(model: Any, read: Sequence[Any], places: Sequence[Any], policy: Any, group: Any) -> list[Scores]:
    return score_documents(loaded(shared_model(seed=1)), read, places, policy)


def shifted(by: int) -> Scorer:
    def score(*args: Any) -> list[Scores]:
        return [rolled(one, by) for one in score_documents(*args)]

    return score


DAMAGES: dict[str, Scorer] = {
    "each token has the one before's": shifted(1),
    "each token has the next one's": shifted(-1),
    "rows are swapped": anothers,
    "another model's": foreign,
}


def damaged(folder: Path, monkeypatch: pytest.MonkeyPatch, scorer: Scorer, **sections: Any) -> Lab:
    """A store whose cache was written, committed and sealed in good order, with wrong numbers in it."""
    made = lab(folder, documents=ALIKE, **sections)
    with monkeypatch.context() as patch:
        patch.setattr("distft.teacher.scorer.score_documents", scorer)
        made.score()
    return made


def assert_refused(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "train_step", lambda *_, **__: pytest.fail("a step was taken"))
    with pytest.raises(CorruptArtifactError, match="own teacher") as caught:
        made.train()
    assert caught.value.where == made.cache().folder.url
    assert made.checkpoints().steps() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cache_that_is_about_other_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, dtype: str
) -> None:
    assert_refused(damaged(tmp_path, monkeypatch, DAMAGES[damage], dtype=dtype), monkeypatch)


@pytest.mark.parametrize("damage", DAMAGES)
def test_signals_alone_betray_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    objective = {"kind": "stm", "tau": 1000.0}
    assert_refused(damaged(tmp_path, monkeypatch, DAMAGES[damage], objective=objective, score=SIGNALS_ALONE), monkeypatch)


@pytest.mark.parametrize("score", [{}, SIGNALS_ALONE, {"positions": "all"}], ids=["topk", "signals", "all positions"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_honest_cache_passes(tmp_path: Path, dtype: str, score: dict[str, Any]) -> None:
    made = lab(tmp_path, documents=ALIKE, dtype=dtype, objective={"kind": "stm", "tau": 1000.0}, score=score)
    made.score()
    assert made.changed(train={"max_steps": 2}).train()["steps"] == 2


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma3_softcap_sliding", "llama_untied_padded"])
def test_an_honest_cache_of_other_families_passes(tmp_path: Path, family: str) -> None:
    made = lab(tmp_path, documents=random_documents(12, seed=13), model=shared_model(family))
    made.score()
    assert made.changed(train={"max_steps": 2}).train()["steps"] == 2


@pytest.mark.parametrize("distribution", [{"kind": "topk"}, {"kind": "hidden"}])
def test_drift_in_many_chunks_is_the_same(tmp_path: Path, distribution: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student that is not its teacher: every chunk has its own tokens' labels and teacher."""
    made = lab(tmp_path, documents=random_documents(6, seed=4), score={"distribution": distribution})
    if distribution["kind"] == "hidden":
        commit_head(teacher_folder(made.store, made.identity()), loaded(made.model), World())
    made.score()
    engine = LocalEngine(loaded(shared_model(seed=1)), made.run.train, World())

    def measured() -> Drift:
        return measure_drift(engine.measure, made.corpus.documents("train"), made.cache(), World(), tokens_per_batch=1000)

    whole = measured()
    monkeypatch.setattr("distft.objectives.loss.loss_chunk", lambda *_: 3)
    assert whole.kl > 0.1
    assert measured().facts() == pytest.approx(whole.facts(), rel=1e-5)
