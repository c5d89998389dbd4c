"""The live teacher against the stored one: honest caches pass, and those that lie are found though all their bytes are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from distft.config.schema import TopK
from distft.corpus.reader import Document
from distft.engine.load import LanguageModel
from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from distft.store.model_folder import ModelFolder
from distft.teacher.catalogue import find_cache
from distft.teacher.forward import Scores, score_documents
from distft.teacher.probe import probe_cache
from distft.teacher.rows import Documents
from distft.teacher.verify import verify_cache
from tests.helpers.caches import Change, only_cache, rewrite
from tests.helpers.stores import Lab, lab, loaded, random_documents, shared_model

DOCUMENTS = random_documents(10, seed=66, shortest=6)


def probe(made: Lab, count: int = 10, model: ModelFolder | None = None) -> dict[str, Any]:
    [folder] = (made.folder / "store" / "teacher").iterdir()
    cache, documents = find_cache(str(folder), ""), Documents(made.store, made.staging)
    return probe_cache(cache, documents, model or made.model, count=count, staging=made.staging)


@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "topk"}, {"kind": "topk", "k": 4, "min_prob": 0.0}, {"kind": "topk", "k": 300, "min_prob": 0.0}, {"kind": "none"},
        {"kind": "sample"},
    ],
)  # fmt: skip
def test_an_honest_cache_agrees(tmp_path: Path, policy: dict[str, Any]) -> None:
    made = lab(tmp_path, documents=DOCUMENTS, score={"distribution": policy})
    made.score()
    found = probe(made)
    assert (found["documents"], found["tokens"]) == (10, sum(int(one.supervised.sum()) for one in DOCUMENTS))
    assert found["max_label_gap"] < 1e-4
    assert found["rank_agreement"] > 0.99
    kept = policy["kind"] == "topk"
    assert (found["argmax_agreement"] or 0) > 0.99 if kept else found["argmax_agreement"] is None


@pytest.mark.parametrize("name", ["llama_untied_padded", "gemma3_softcap_sliding"])
def test_an_honest_cache_of_another_family_and_precision(tmp_path: Path, name: str) -> None:
    made = lab(tmp_path, documents=DOCUMENTS, model=shared_model(name), dtype="bfloat16", score={"positions": "all"})
    made.score()
    found = probe(made, 4)
    assert found["documents"] == 4
    assert (found["tolerance"], found["tolerance_share"]) == (0.1, 0.25)
    assert found["worst"] <= 0.5


# A lie takes the model and a document and gives what a wrong teacher, or a wrong program, would have stored.
Lie = Callable[[LanguageModel, Document], Scores]


def honest(model: LanguageModel, one: Document, where: npt.NDArray[np.uint32] | None = None) -> Scores:
    place = np.flatnonzero(one.supervised).astype(np.uint32) if where is None else where
    return score_documents(model, [one.tokens], [place], TopK())[0]


def other_weight(model: LanguageModel, one: Document) -> Scores:
    with torch.no_grad():
        model.whole.model.norm.weight[3] = 1.5
    return honest(model, one)


def shifted_positions(model: LanguageModel, one: Document) -> Scores:
    """The answer for the token before, under the right position."""
    where = np.flatnonzero(one.supervised).astype(np.uint32)
    return replace(honest(model, one, np.maximum(where, 2) - 1), positions=where)


def positions_of_others(model: LanguageModel, one: Document) -> Scores:
    scores = honest(model, one)
    return replace(scores, positions=scores.positions + 1)


def shifted_labels(model: LanguageModel, one: Document) -> Scores:
    scores = honest(model, one)
    return replace(scores, label_logprob=np.roll(scores.label_logprob, 1))


def other_ids(model: LanguageModel, one: Document) -> Scores:
    scores = honest(model, one)
    return replace(scores, ids=np.where(scores.ids % 7 == 3, scores.ids - 1, scores.ids))


def zero_ranks(model: LanguageModel, one: Document) -> Scores:
    scores = honest(model, one)
    return replace(scores, rank=scores.rank * 0)


def neighbours_seen(model: LanguageModel, one: Document) -> Scores:
    """What a packed batch gives when attention leaks: a document is read behind another."""
    before = DOCUMENTS[0].tokens
    where = np.flatnonzero(one.supervised).astype(np.uint32)
    behind = score_documents(model, [np.concatenate([before, one.tokens])], [where + np.uint32(len(before))], TopK())
    return replace(behind[0], positions=where)


def not_a_number(model: LanguageModel, one: Document) -> Scores:
    scores = honest(model, one)
    return replace(scores, entropy=scores.entropy * np.float32(np.nan))


@pytest.mark.parametrize(
    "lie",
    [
        other_weight, shifted_positions, positions_of_others, shifted_labels, other_ids, zero_ranks, neighbours_seen, not_a_number,
    ],
)  # fmt: skip
def test_a_cache_that_lies_is_found(tmp_path: Path, lie: Lie) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    model, by_digest = loaded(made.model), {one.digest: one for one in DOCUMENTS}
    change: Change = lambda row: replace(row, scores=lie(model, by_digest[row.digest]))  # noqa: E731
    rewrite(only_cache(made.store), made.staging, change, every=True)
    with pytest.raises(CorruptArtifactError, match=r"differ by more than the 0\.001 nats") as caught:
        probe(made, 6)
    for figure in ("max |dlogp| of the label", "argmax agreement", "rank agreement"):
        assert figure in caught.value.problem


def test_the_truth_written_anew_agrees(tmp_path: Path) -> None:
    """So what the lies above were found by is what they say."""
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    model, by_digest = loaded(made.model), {one.digest: one for one in DOCUMENTS}
    rewrite(
        only_cache(made.store), made.staging, lambda row: replace(row, scores=honest(model, by_digest[row.digest])), every=True
    )
    assert probe(made)["documents"] == 10


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    with pytest.raises(StaleArtifactError, match=r"weights\.files\.model\.safetensors: [0-9a-f]{12} -> [0-9a-f]{12}"):
        probe(made, model=shared_model("llama", 1))


def test_a_cache_without_its_corpus_cannot_be_probed(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    [folder] = made.store.child("corpus").folders()
    made.store.child("corpus", folder).delete("MANIFEST.json")
    with pytest.raises(MissingArtifactError, match="None of the 10 documents of the cache is in a corpus"):
        probe(made)


def test_a_damaged_corpus_is_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    path = next((made.folder / "store" / "corpus").rglob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    [folder] = (made.folder / "store" / "teacher").iterdir()
    found = verify_cache(find_cache(str(folder), ""), Documents(made.store, made.staging), made.staging)
    assert found["compared_with_corpus"] == 0
    assert "This corpus is not compared with" in capsys.readouterr().err
