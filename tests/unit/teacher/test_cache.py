"""Whose cache it is, what it costs to grow one, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.corpus.reader import Document
from distft.engine.world import World
from distft.errors import CorruptArtifactError, DistftError, MissingArtifactError, StaleArtifactError
from distft.store.digest import document_digest
from distft.store.location import open_location
from distft.store.model_folder import resolve_model
from distft.teacher.cache import TeacherCache
from distft.teacher.forward import Scores, score_documents
from distft.train.drift import measure_drift
from tests.helpers.caches import killed_after
from tests.helpers.stores import Lab, copied_model, lab, random_documents, shared_model, write_corpus

DOCUMENTS = random_documents(40, seed=30)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The documents that a teacher has read, in the order of its passes."""
    seen: list[bytes] = []

    def watching(model: Any, documents: Sequence[Any], *rest: Any) -> list[Scores]:
        seen.extend(one.tobytes() for one in documents)
        return score_documents(model, documents, *rest)

    monkeypatch.setattr("distft.teacher.scorer.score_documents", watching)
    return seen


def over(made: Lab, documents: Sequence[Document]) -> Lab:
    """The same store with another corpus."""
    return replace(made, corpus=write_corpus(made.store, made.staging, train=documents))


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.teacher.scorer.load_model", lambda *_, **__: pytest.fail("the teacher was loaded"))


def contents(made: Lab) -> dict[str, Scores]:
    """Copies: what a cache gives are views of its files."""
    cache = made.cache()
    found = {one.digest: cache.scores(one) for one in made.corpus.documents("train")}
    return {name: Scores(**{f.name: getattr(scores, f.name).copy() for f in fields(Scores)}) for name, scores in found.items()}


def assert_same(one: dict[str, Scores], two: dict[str, Scores]) -> None:
    """Equal to the rounding of another batch: float32 sums of other shapes, then float16."""
    assert one.keys() == two.keys()
    for digest, first in one.items():
        second = two[digest]
        for name in ("positions", "counts", "ids", "rank"):
            assert np.array_equal(getattr(first, name), getattr(second, name)), name
        for name in ("label_logprob", "entropy", "tail"):
            np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(first.logprobs, second.logprobs, rtol=2**-10, atol=1e-4)


# --- incremental -----------------------------------------------------------------------------------------------------


def test_each_document_is_read_once_and_a_second_run_loads_nothing(
    tmp_path: Path, read: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lab(tmp_path, documents=[*DOCUMENTS, DOCUMENTS[0], DOCUMENTS[7]])  # two rows stand twice
    first = made.score()
    assert sorted(read) == sorted(one.tokens.tobytes() for one in DOCUMENTS)
    assert first.documents_scored == 40
    assert first.tokens_scored == sum(int(one.supervised.sum()) for one in DOCUMENTS)
    assert len(contents(made)) == 40
    no_weights(monkeypatch)
    second = made.score()
    assert (second.documents_scored, second.tokens_scored) == (0, 0)
    assert second.coverage.files == first.coverage.files


def test_a_larger_corpus_costs_its_new_documents_alone(tmp_path: Path, read: list[bytes]) -> None:
    made = lab(tmp_path, documents=DOCUMENTS[:36])
    made.score()
    before = contents(made)
    read.clear()
    grown = over(made, [DOCUMENTS[n] for n in np.random.default_rng(0).permutation(40)])
    assert grown.score().documents_scored == 4
    assert sorted(read) == sorted(one.tokens.tobytes() for one in DOCUMENTS[36:])
    after = contents(grown)
    assert all(np.array_equal(after[name].label_logprob, before[name].label_logprob) for name in before)
    alone = lab(tmp_path / "alone", documents=DOCUMENTS)
    alone.score()
    assert_same(after, contents(alone))


def test_a_smaller_or_reordered_corpus_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    no_weights(monkeypatch)
    for part in (DOCUMENTS[5:15], DOCUMENTS[::-1]):
        other = over(made, part)
        assert other.score().documents_scored == 0
        whole = contents(made)
        assert all(np.array_equal(s.ids, whole[name].ids) for name, s in contents(other).items())


def test_the_same_tokens_under_other_supervision_are_another_document(tmp_path: Path, read: list[bytes]) -> None:
    made = lab(tmp_path, documents=DOCUMENTS[:3])
    made.score()
    mask = ~DOCUMENTS[0].supervised
    mask[0] = False
    turned = replace(DOCUMENTS[0], supervised=mask, digest=document_digest(DOCUMENTS[0].tokens, mask))
    other = over(made, [turned, *DOCUMENTS[1:3]])
    with pytest.raises(MissingArtifactError, match="2 of the corpus's 3"):
        other.cache()
    read.clear()
    assert other.score().documents_scored == 1
    assert contents(other)[turned.digest].positions.tolist() == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("after", [0, 1, 5, 15])
def test_a_killed_build_goes_on_with_what_is_missing(tmp_path: Path, read: list[bytes], after: int) -> None:
    undisturbed, made = lab(tmp_path / "undisturbed", documents=DOCUMENTS), lab(tmp_path / "killed", documents=DOCUMENTS)
    undisturbed.score()
    read.clear()
    with killed_after(after) as parts:
        made.score()
    held = {digest for one in parts for digest in one.facts["digests"]}
    if after:
        assert 0 < len(held) < 40
    with pytest.raises(MissingArtifactError, match=f"{len(held)} of the corpus's 40") as caught:
        made.cache()
    assert "distft score" in caught.value.help
    read.clear()
    assert made.score().documents_scored == 40 - len(held)
    assert sorted(read) == sorted(one.tokens.tobytes() for one in DOCUMENTS if one.digest not in held)
    assert_same(contents(undisturbed), contents(made))


def test_a_teacher_that_is_not_finite_stores_nothing_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab(tmp_path, documents=DOCUMENTS[:4])
    plain = score_documents

    def broken(*args: Any) -> list[Scores]:
        scores = plain(*args)
        scores[0].entropy[0] = np.nan
        return scores

    monkeypatch.setattr("distft.teacher.scorer.score_documents", broken)
    with pytest.raises(DistftError, match="not finite") as caught:
        made.score()
    assert caught.value.where.startswith("rows.jsonl:")
    assert [name.rpartition("/")[2] for name in made.store.child("teacher").names(recursive=True)] == ["IDENTITY.json"]


# --- identity --------------------------------------------------------------------------------------------------------


def stale(made: Lab, *told: str) -> None:
    """The cache does not fit, and the error names the field and the command."""
    with pytest.raises(StaleArtifactError) as caught:
        made.cache()
    for part in told:
        assert part in caught.value.problem
    assert caught.value.problem.count(": ") == len(told), caught.value.problem  # and no other field
    assert "distft score" in caught.value.help


def test_one_changed_weight_is_another_teacher(tmp_path: Path) -> None:
    model = copied_model(shared_model(), tmp_path / "model")
    made = lab(tmp_path, documents=DOCUMENTS[:4], model=model)
    made.score()
    path = model.path / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].clone()
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    stale(replace(made, model=resolve_model(str(model.path), None)), "weights.files.model.safetensors")


def test_two_swapped_token_ids_are_another_teacher(tmp_path: Path) -> None:
    """The vocabulary has the same size and the same words; ids mean something else."""
    model = copied_model(shared_model(), tmp_path / "model")
    made = lab(tmp_path, documents=DOCUMENTS[:4], model=model)
    made.score()
    path = model.path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[20], list(vocabulary)[40]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(tokenizer))
    stale(replace(made, model=resolve_model(str(model.path), None)), "vocabulary")


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"score": {"distribution": {"kind": "topk", "k": 64}}}, "distribution.k"),
    "floor": ({"score": {"distribution": {"kind": "topk", "min_prob": 0.0}}}, "distribution.min_prob"),
    "positions": ({"score": {"positions": "all"}}, "positions"),
    "dtype": ({"model": {"dtype": "bfloat16"}}, "dtype"),
    "teacher's dtype": ({"teacher": {"dtype": "bfloat16"}}, "dtype"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_policy_or_precision_is_another_cache(tmp_path: Path, other: str) -> None:
    made = lab(tmp_path, documents=DOCUMENTS[:4])
    made.score()
    sections, field = OTHERS[other]
    stale(made.changed(**sections), field)


def test_what_changes_no_number_changes_no_identity(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS[:4])
    same = made.changed(
        name="other", score={"tokens_per_batch": 7}, train={"seed": 9, "tokens_per_step": 30, "micro_batch_tokens": 5, "epochs": 3},
        objective={"kind": "stm_kl"}, model={"attention": "eager"},
    )  # fmt: skip
    assert same.identity() == made.identity()


def test_moving_and_renaming_model_and_store_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copied_model(shared_model(), tmp_path / "model")
    made = lab(tmp_path / "one", documents=DOCUMENTS[:6], model=model)
    scored = made.score()
    shutil.move(model.path, tmp_path / "renamed")
    shutil.move(tmp_path / "one", tmp_path / "two")
    moved = lab(tmp_path / "two", documents=DOCUMENTS[:6], model=resolve_model(str(tmp_path / "renamed"), None))
    no_weights(monkeypatch)
    again = moved.score()
    assert again.documents_scored == 0
    assert again.folder.url.rsplit("/", 1)[1] == scored.folder.url.rsplit("/", 1)[1]
    assert len(contents(moved)) == 6


def test_a_batch_size_changes_no_number_beyond_rounding(tmp_path: Path) -> None:
    small, large = (lab(tmp_path / str(size), documents=DOCUMENTS, score={"tokens_per_batch": size}) for size in (24, 10_000))
    small.score()
    large.score()
    assert_same(contents(small), contents(large))


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def shard(made: Lab) -> Path:
    folder = made.cache().folder
    path = folder.local(made.cache().coverage.files[0].name)
    assert path is not None
    return path


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_shard_is_refused_before_it_is_read(tmp_path: Path, damage: str) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    path = shard(made)
    if damage == "flipped":
        flip(path, path.stat().st_size // 2)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    shutil.rmtree(made.staging)
    said = {"flipped": ": sha256", "cut": r": \d+ bytes, not", "missing": ": missing"}[damage]
    with pytest.raises(CorruptArtifactError, match=f"{path.name}{said}"):
        made.cache()


def test_a_damaged_staged_copy_is_made_again(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    before = contents(made)
    for copy in made.staging.glob("*.arrow"):
        flip(copy, copy.stat().st_size // 2)
    after = contents(made)
    for name, scores in before.items():
        assert all(np.array_equal(getattr(scores, f.name), getattr(after[name], f.name)) for f in fields(Scores))


def test_a_row_about_other_tokens_is_refused(tmp_path: Path) -> None:
    """The digest says which document it is; a document that has another length or supervision cannot be it."""
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    cache = made.cache()
    one = DOCUMENTS[3]
    with pytest.raises(CorruptArtifactError, match=one.digest):
        cache.scores(replace(one, tokens=one.tokens[:-1], supervised=one.supervised[:-1]))
    swapped = replace(cache, places={**cache.places, one.digest: cache.places[DOCUMENTS[4].digest]})
    with pytest.raises(CorruptArtifactError, match=one.digest):
        swapped.scores(one)


def test_all_positions_serve_the_supervised_ones(tmp_path: Path) -> None:
    some, every = (lab(tmp_path / kind, documents=DOCUMENTS, score={"positions": kind}) for kind in ("supervised", "all"))
    some.score()
    every.score()
    narrow, wide = some.cache(), every.cache()
    for one in DOCUMENTS:
        assert wide.scores(one).positions.tolist() == list(range(1, len(one)))
        assert narrow.scores(one).positions.tolist() == np.flatnonzero(one.supervised).tolist()
        assert_same({"": narrow.supervised(one)}, {"": wide.supervised(one)})


def test_an_empty_store_says_what_to_run(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS[:2])
    with pytest.raises(MissingArtifactError, match="no teacher cache") as caught:
        TeacherCache.open(open_location(str(tmp_path / "store")), made.identity(), made.corpus, made.staging)
    assert "distft score" in caught.value.help


def test_drift_from_draws_is_an_unbiased_estimate(tmp_path: Path) -> None:
    """KL(w||p) alone would overstate it by what the draws lack in entropy; taken off, many seeds average to the exact figure."""
    held = random_documents(6, seed=50)
    exact = lab(
        tmp_path / "exact", documents=DOCUMENTS, heldout=held, score={"distribution": {"kind": "topk", "k": 280, "min_prob": 0}}
    )
    exact.score()
    engine = exact.engine()
    with torch.no_grad():
        for parameter in engine.model.whole.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    def drift(made: Lab) -> float:
        return measure_drift(engine.measure, made.corpus.documents("heldout"), made.cache(), World(), tokens_per_batch=200).kl

    truth, found = drift(exact), []
    for seed in range(8):
        sampled = lab(tmp_path / str(seed), documents=DOCUMENTS, heldout=held,
                      score={"distribution": {"kind": "sample", "draws": 40, "seed": seed}})  # fmt: skip
        sampled.score()
        found.append(drift(sampled))
    spread = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 4 * spread + 1e-3, (truth, found)
    assert spread < 0.2 * truth


def test_a_run_trains_on_draws(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=random_documents(20), score={"distribution": {"kind": "sample", "draws": 30}})
    made.score()
    assert made.train()["steps"] > 1
