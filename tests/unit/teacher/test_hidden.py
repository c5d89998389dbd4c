"""A cache of hidden states in the hands of all that looks after caches: its head's copy, its rows, its figures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.objectives.distributions import DenseRows
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, read_manifest
from distft.teacher import head_copy, scorer
from distft.teacher.catalogue import figures, find_cache, list_caches
from distft.teacher.head_file import HEAD, head_form, head_is_there
from distft.teacher.identity import read_parts
from distft.teacher.probe import probe_cache
from distft.teacher.prune import prune
from distft.teacher.rows import Documents, document_facts, find_row, rows
from distft.teacher.statistics import cache_statistics
from distft.teacher.tell import document_text, list_text, policy, statistics_text
from distft.teacher.verify import row_problems, verify_cache
from tests.helpers.caches import Change, changed, only_cache, rewrite
from tests.helpers.stores import Lab, copied_model, lab, loaded, random_documents, shared_model

DOCUMENTS = random_documents(16, seed=70, shortest=6)
HIDDEN = {"distribution": {"kind": "hidden"}}
WIDTH, ROWS = 32, 280


def build(folder: Path, dtype: str = "float32", model: str = "llama", **sections: Any) -> Lab:
    made = lab(folder, documents=DOCUMENTS, model=shared_model(model), dtype=dtype, score=HIDDEN, **sections)
    made.score()
    return made


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def _built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("hidden")
    build(folder, request.param)
    return folder, request.param


@pytest.fixture
def made(_built: tuple[Path, str], tmp_path: Path) -> Lab:
    """A cache that a test may change."""
    source, dtype = _built
    shutil.copytree(source / "store", tmp_path / "store")
    return lab(tmp_path, documents=DOCUMENTS, dtype=dtype, score=HIDDEN)


def verify(made: Lab) -> dict[str, Any]:
    return verify_cache(find_cache(folder(made).url, ""), Documents(made.store, made.staging), made.staging / "verify")


def refused(made: Lab, *told: str) -> CorruptArtifactError:
    with pytest.raises(CorruptArtifactError) as caught:
        verify(made)
    for part in told:
        assert part in caught.value.problem, caught.value.problem
    return caught.value


def folder(made: Lab) -> Location:
    return only_cache(made.store)


def head(made: Lab) -> FileEntry:
    manifest = read_manifest(folder(made), HEAD)
    assert manifest is not None
    [entry] = manifest.files
    return entry


def head_path(made: Lab) -> Path:
    path = folder(made).local(head(made).name)
    assert path is not None
    return path


def dtype(made: Lab) -> str:
    return made.run.teacher_model.dtype


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> object:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(scorer, "load_model", load)


# --- sound -----------------------------------------------------------------------------------------------------------


def test_a_sound_cache(made: Lab) -> None:
    found = verify(made)
    data = list((made.folder / "store" / "teacher").rglob("data/*"))
    assert (found["files"], found["bytes"]) == (len(data), sum(path.stat().st_size for path in data))
    assert any(path.suffix == ".safetensors" for path in data)
    assert (found["documents"], found["compared_with_corpus"], found["corpora_covered"]) == (16, 16, 1)
    assert not list((made.staging / "verify").iterdir())


def test_the_heads_form_is_read_without_its_numbers(made: Lab) -> None:
    form = head_form(head_path(made))
    assert (form.rows, form.width, form.dtype) == (ROWS, WIDTH, dtype(made))


def test_figures_name_the_width_and_count_the_head(made: Lab) -> None:
    found = cache_statistics(folder(made), made.staging, tau=2.5)
    size, each = head(made).size, 4 if dtype(made) == "float32" else 2
    assert size == ROWS * WIDTH * each + size % (ROWS * WIDTH * each), "a small header, and the weight"
    parts = sum(entry.size for part in read_parts(folder(made)) for entry in part.files)
    assert (found["hidden_width"], found["entries_per_token"]) == (WIDTH, 0)
    assert found["mass_kept"] == {"mean": 1.0, "p5": 1.0}
    assert (found["head_bytes"], found["bytes"], found["bytes_per_token"]) == (size, parts + size, parts / found["scored_tokens"])
    text = statistics_text({"cache": "x", "identity": made.identity(), **found})
    assert "kept a token           hidden 32" in text
    assert "100.00%" in text
    assert "entries a token" not in text
    [listed] = list_caches(made.store)
    assert (listed["bytes"], listed["head_bytes"], listed["bytes_per_token"]) == (found["bytes"], size, found["bytes_per_token"])
    assert figures(folder(made))["bytes"] == parts, "what tokens take, by which a corpus is estimated"
    assert "hidden states and the teacher's head, supervised" in list_text({"store": "x", "caches": [listed]})


def test_another_policy_has_no_width_and_no_head(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS, score={"distribution": {"kind": "none"}})
    made.score()
    found = cache_statistics(folder(made), made.staging, tau=2.5)
    assert (found["hidden_width"], found["head_bytes"]) == (None, 0)
    assert policy(made.identity()) == "signals only, supervised"
    folder(made).replace(HEAD, Manifest(kind="teacher-head", identity={}, files=()).to_json())
    refused(made, f"{HEAD}: it is there, and this cache keeps no hidden states")


def test_one_document_is_told_without_its_hidden_states(made: Lab) -> None:
    one = DOCUMENTS[3]
    row = find_row(folder(made), one.digest[:12], made.staging)
    facts = document_facts(row, Documents(made.store, made.staging).get(row.digest), dtype(made))
    count = int(one.supervised.sum())
    assert len(row.scores.hidden) == count * WIDTH * (2 if dtype(made) == "float32" else 1)
    assert facts["hidden_width"] == WIDTH
    assert facts["ids"] == facts["logprobs"] == [[]] * count
    assert facts["tail"] == [0.0] * count
    assert "hidden" not in facts
    assert "   all  0.00e+00" in document_text(facts)


# --- the head is lost, damaged, another's ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", [3, 500, -1])
def test_a_flipped_bit_of_the_head_is_named_and_cured(made: Lab, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = head_path(made)
    data = bytearray(path.read_bytes())
    data[place] ^= 2
    path.write_bytes(data)
    told = refused(made, "1 problem in", f"{HEAD}: {head(made).name}: sha256 ")
    assert "remove HEAD.json" in told.help
    assert "coverage" not in told.help
    with pytest.raises(CorruptArtifactError, match="head is damaged") as caught:
        made.cache()
    assert "Remove HEAD.json" in caught.value.help
    folder(made).delete(HEAD)
    assert made.score().documents_scored == 0
    assert verify(made)["documents"] == 16


def test_a_flipped_bit_of_hidden_states_is_named(made: Lab) -> None:
    path = max((made.folder / "store" / "teacher").rglob("data/*.arrow"), key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    told = refused(made, "1 problem in", f"data/{path.name}: sha256 ")
    assert "parts/" in told.help
    assert HEAD not in told.help


def lose_manifest(made: Lab) -> None:
    folder(made).delete(HEAD)


def lose_file(made: Lab) -> None:
    head_path(made).unlink()


def cut_file(made: Lab) -> None:
    head_path(made).write_bytes(head_path(made).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("lose", "verified", "opened"),
    [
        (lose_manifest, f"{HEAD}: missing, and without it", "no copy of the teacher's head"),
        (lose_file, "missing", "missing"),
        (cut_file, "bytes, not", "bytes, not"),
    ],
)
def test_a_lost_head_is_told_and_score_writes_it_again(
    made: Lab, lose: Callable[[Lab], None], verified: str, opened: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [made.cache().scores(one).hidden.tolist() for one in DOCUMENTS[:3]]
    old = made.cache().head
    assert old is not None
    weight_VT = old.weight_VT.clone()  # it is a mapping of the file
    lose(made)
    refused(made, "1 problem in", HEAD, verified)
    with pytest.raises((CorruptArtifactError, MissingArtifactError), match=opened) as caught:
        made.cache()
    assert "distft score" in caught.value.help
    assert not head_is_there(folder(made))
    again = made.score()
    assert (again.documents_scored, again.tokens_scored) == (0, 0)
    assert verify(made)["documents"] == 16
    new = made.cache().head
    assert new is not None
    assert torch.equal(new.weight_VT, weight_VT)
    assert [made.cache().scores(one).hidden.tolist() for one in DOCUMENTS[:3]] == before
    no_model(monkeypatch)
    made.score()


def test_a_lost_head_comes_back_where_a_few_documents_are_missing_too(made: Lab) -> None:
    parts = folder(made).child("parts")
    parts.delete(parts.names()[0])
    for name in folder(made).child("coverage").names():
        folder(made).delete(f"coverage/{name}")
    lose_file(made)
    assert 0 < made.score().documents_scored < 16
    assert verify(made)["documents"] == 16


def test_a_trial_that_has_nothing_left_writes_the_head_too(made: Lab) -> None:
    for name in folder(made).child("coverage").names():
        folder(made).delete(f"coverage/{name}")
    lose_manifest(made)
    made.changed(score={"limit": 2}).score()
    assert head_is_there(folder(made))


def test_a_manifest_that_cannot_be_read_is_told_with_the_heads_own_cure(made: Lab) -> None:
    data = folder(made).read(HEAD)
    folder(made).replace(HEAD, data.replace(b'"scale"', b'"scald"'))
    for look in (made.cache, made.score):
        with pytest.raises(CorruptArtifactError, match="its own sha256 does not fit") as caught:
            look()
        assert "Remove HEAD.json" in caught.value.help
    refused(made, f"{HEAD}: ", "its own sha256 does not fit")


def test_anothers_head_is_named(made: Lab) -> None:
    manifest = read_manifest(folder(made), HEAD)
    assert manifest is not None
    folder(made).replace(HEAD, replace(manifest, identity={"teacher": "0" * 16}).to_json())
    refused(made, f"{HEAD}: it belongs to cache {'0' * 16}, not {folder(made).url[-16:]}")
    folder(made).replace(HEAD, replace(manifest, kind="teacher-part").to_json())
    refused(made, f"{HEAD} is a teacher-part of 1 files")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda head: {"weight": head["weight"][:, :-1].contiguous()}, "a hidden state is not as wide as the teacher's head"),
        (lambda head: {"weight": head["weight"].half()}, "is no output head"),
        (lambda head: {"wait": head["weight"]}, "is no output head"),
        (lambda head: {**head, "bias": head["weight"][:3, 0].contiguous()}, "does not fit its weight"),
    ],
)
def test_a_head_of_another_form_is_named(made: Lab, change: Callable[[Any], Any], told: str) -> None:
    """As a defect would commit it: every byte is right."""
    from distft.store.put import put_file

    tensors = change(load_file(head_path(made)))
    manifest = read_manifest(folder(made), HEAD)
    assert manifest is not None
    entry = put_file(folder(made), "head", "safetensors", lambda path: save_file(tensors, path))
    folder(made).replace(HEAD, replace(manifest, files=(entry,)).to_json())
    refused(made, told)


def test_a_head_of_another_dtype_is_named(made: Lab, tmp_path: Path) -> None:
    from distft.store.put import put_file

    other = torch.bfloat16 if dtype(made) == "float32" else torch.float32
    tensors = {"weight": load_file(head_path(made))["weight"].to(other)}
    manifest = read_manifest(folder(made), HEAD)
    assert manifest is not None
    entry = put_file(folder(made), "head", "safetensors", lambda path: save_file(tensors, path))
    folder(made).replace(HEAD, replace(manifest, files=(entry,)).to_json())
    refused(made, f"{HEAD}: the head is {str(other).removeprefix('torch.')}, and the teacher was {dtype(made)}")


def test_a_commit_of_the_head_that_is_killed_leaves_nothing_to_complain_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is there, and no manifest names it: the next `score` writes another, and `prune` takes this one."""
    made = lab(tmp_path, documents=DOCUMENTS, score=HIDDEN)

    class KilledError(BaseException):
        pass

    def die(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(head_copy, "commit", die)
        with pytest.raises(KilledError):
            made.score()
    assert len(list((made.folder / "store" / "teacher").rglob("data/head-*"))) == 1
    assert verify(made)["parts"] == 0
    made.score()
    assert verify(made)["documents"] == 16
    kept = head_path(made)
    for path in (made.folder / "store" / "teacher").rglob("data/*"):
        os.utime(path, (1, 1))
    assert [name.partition("-")[0] for name in prune(folder(made)).files] == ["data/head"]
    assert kept.exists()
    assert prune(folder(made)).files == {}
    assert verify(made)["documents"] == 16


def test_of_two_that_write_the_head_at_once_one_is_kept(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.engine.world import World

    first = head(made)
    monkeypatch.setattr(head_copy, "head_is_there", lambda _: False)
    head_copy.commit_head(folder(made), loaded(made.model, dtype=dtype(made)), World())
    assert head(made) == first
    assert len(list((made.folder / "store" / "teacher").rglob("data/head-*"))) == 1


# --- rows that are whole, and wrong ----------------------------------------------------------------------------------


def without_a_word(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, WIDTH)[:, :-1].reshape(-1)


def infinite(values: np.ndarray) -> np.ndarray:
    made = values.copy()
    made[WIDTH - 1] = 0xFF80
    return made


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed(hidden=without_a_word), "a hidden state is not as wide as the teacher's head"),
        (changed(hidden=lambda x: x[:0]), "a hidden state is not as wide as the teacher's head"),
        (changed(hidden=infinite), "a hidden state is not finite"),
        (changed(tail=lambda x: x + np.float32(0.5)), "beside hidden states"),
        (changed(label_logprob=lambda x: x + 40), "a label's log-probability"),
    ],
)
def test_what_cannot_be_true_of_a_row(made: Lab, change: Change, problem: str) -> None:
    row = next(iter(rows(folder(made), read_parts(folder(made))[0].files[0], made.staging)))
    form, identity = head_form(head_path(made)), made.identity()
    document = Documents(made.store, made.staging).get(row.digest)
    assert row_problems(row, document, identity, form) == row_problems(row, document, identity) == []
    assert any(problem in told for told in row_problems(change(row), document, identity, form))


def test_any_bits_may_stand_in_the_lower_half_of_a_float32(made: Lab) -> None:
    row = next(iter(rows(folder(made), read_parts(folder(made))[0].files[0], made.staging)))
    wrong = row_problems(changed(hidden=lambda x: np.where(np.arange(len(x)) % 2 == 0, 0x7F80, x))(row), None, made.identity())
    assert bool(wrong) == (dtype(made) == "bfloat16")


def test_hidden_states_where_the_policy_keeps_none_are_named(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    rewrite(folder(made), made.staging, lambda row: changed(hidden=lambda _: np.zeros(len(row.scores) * 4, np.uint16))(row))
    refused(made, "there are hidden states, which its policy does not keep")


# --- against the live teacher ----------------------------------------------------------------------------------------


def probe(made: Lab) -> dict[str, Any]:
    cache, documents = find_cache(folder(made).url, ""), Documents(made.store, made.staging)
    return probe_cache(cache, documents, made.model, count=8, staging=made.staging)


def test_an_honest_cache_agrees(made: Lab) -> None:
    found = probe(made)
    exact = dtype(made) == "float32"
    assert (found["documents"], found["hidden_tolerance"]) == (8, 1e-3 if exact else 0.1)
    assert found["max_hidden_gap"] <= (1e-5 if exact else 0.05)
    assert found["mean_kl"] <= found["max_kl"] <= (1e-6 if exact else 0.05)
    assert found["max_kept_gap"] is None


@pytest.mark.parametrize("name", ["llama_untied_padded", "gemma3_softcap_sliding"])
def test_an_honest_cache_of_another_family_agrees(tmp_path: Path, name: str) -> None:
    made = build(tmp_path, model=name)
    assert verify(made)["documents"] == 16
    assert probe(made)["max_kl"] < 1e-5
    assert isinstance(made.cache().rows([made.cache().scores(DOCUMENTS[0])]), DenseRows)


def shifted(words: np.ndarray, width: int) -> np.ndarray:
    return np.roll(words.reshape(-1, width), 1, axis=0).reshape(-1)


def test_hidden_states_of_other_tokens_are_found_though_all_signals_are_right(made: Lab) -> None:
    width = WIDTH * (2 if dtype(made) == "float32" else 1)
    rewrite(folder(made), made.staging, changed(hidden=lambda words: shifted(words, width)), every=True)
    verify(made)
    with pytest.raises(CorruptArtifactError, match="hidden states differ by up to") as caught:
        probe(made)
    assert "max |dlogp| of the label" in caught.value.problem


def test_a_head_of_another_teacher_is_found_though_all_hidden_states_are_right(made: Lab, tmp_path: Path) -> None:
    """Its KL alone tells: hidden states and signals agree."""
    from distft.store.put import put_file

    tensors = {"weight": load_file(head_path(made))["weight"].roll(1, 0)}
    manifest = read_manifest(folder(made), HEAD)
    assert manifest is not None
    entry = put_file(folder(made), "head", "safetensors", lambda path: save_file(tensors, path))
    folder(made).replace(HEAD, replace(manifest, files=(entry,)).to_json())
    verify(made)
    with pytest.raises(CorruptArtifactError, match="and their distributions by up to"):
        probe(made)


def test_the_kl_of_the_probe_is_that_of_two_whole_distributions(tmp_path: Path) -> None:
    """Stored by a teacher a little off, compared with the live one: as computed from their logits in float64."""
    from distft.teacher.probe import _hidden_gaps

    made = build(tmp_path)
    cache, model = made.cache(), loaded(copied_model(made.model, tmp_path / "other"))
    with torch.no_grad():
        model.whole.model.norm.weight *= 1.1
    from distft.config.schema import Hidden
    from distft.teacher.forward import score_documents

    one = DOCUMENTS[2]
    place = np.flatnonzero(one.supervised).astype(np.uint32)
    [live] = score_documents(model, [one.tokens], [place], Hidden(kind="hidden"))
    assert cache.head is not None
    gap_N, kl_N = _hidden_gaps(cache.scores(one), cache.head, live, model)
    ids = torch.from_numpy(one.tokens.astype(np.int64))[None]
    with torch.no_grad():
        log_p, log_q = (
            own.whole(ids).logits[0, place.astype(np.int64) - 1].double().log_softmax(-1) for own in (model, loaded(made.model))
        )
    assert kl_N == pytest.approx((log_q.exp() * (log_q - log_p)).sum(-1).numpy(), abs=1e-5)
    assert gap_N == pytest.approx(np.full(len(place), 0.1 / 1.1), rel=1e-4)
    assert kl_N.max() > 1e-3
