"""Documents that a teacher cannot read: they are set apart by name, and all others are scored as if they were not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.corpus.reader import Corpus, Document
from distft.errors import CorruptArtifactError, DistftError, MissingArtifactError
from distft.store.location import Location
from distft.store.manifest import Manifest, read_manifest
from distft.store.model_folder import ModelFolder, resolve_model
from distft.teacher.catalogue import figures, find_cache
from distft.teacher.forward import score_documents
from distft.teacher.identity import documents_key, quarantined_documents, read_parts
from distft.teacher.prune import prune
from distft.teacher.quarantine import attempt, positions_limit, read_apart
from distft.teacher.reuse import before_scoring
from distft.teacher.rows import Documents, find_row
from distft.teacher.scores import Scores
from distft.teacher.statistics import cache_statistics
from distft.teacher.verify import verify_cache
from tests.helpers.caches import killed_after, only_cache
from tests.helpers.models import tiny_model_folder
from tests.helpers.stores import Lab, document, lab, loaded, random_documents, shared_model, write_corpus

SPOILT = 275
"""The token whose embedding is no number."""
HEALTHY = random_documents(24, seed=80, shortest=6, vocabulary=270)
SICK = [
    document([10, 20, SPOILT, 30, 40], [1, 3, 4]),
    document([10, 20, 30, 40, 50, 60, 70, 80, 90, SPOILT, 11], [10]),
    document([SPOILT, 21], [1]),
]
DOCUMENTS = [*HEALTHY[:5], SICK[0], *HEALTHY[5:15], SICK[1], SICK[2], *HEALTHY[15:]]
NAMES = {one.digest for one in SICK}


def spoilt_model(path: Path, value: float = float("nan")) -> ModelFolder:
    """A model that goes wrong on one token, and on whatever comes behind it."""
    tiny_model_folder(path, vocabulary=280, hidden=32, tied=False, initializer_range=0.5)
    file = path / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][SPOILT] = value
    save_file(weights, file, metadata={"format": "pt"})
    return resolve_model(str(path), None)


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    return lab(tmp_path, documents=DOCUMENTS, model=spoilt_model(tmp_path / "model"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """The documents of each pass of a teacher."""
    seen: list[list[bytes]] = []

    def watching(model: Any, documents: Sequence[Any], *rest: Any) -> list[Scores]:
        seen.append([one.tobytes() for one in documents])
        return score_documents(model, documents, *rest)

    monkeypatch.setattr("distft.teacher.scorer.score_documents", watching)
    return seen


def over(made: Lab, documents: Sequence[Document]) -> Lab:
    return replace(made, corpus=write_corpus(made.store, made.staging, train=documents))


def without(made: Lab, *names: str) -> Lab:
    return replace(made, corpus=Corpus.open(made.corpus.folder, made.staging, names))


def contents(made: Lab) -> dict[str, Scores]:
    cache = made.cache()
    found = {one.digest: cache.scores(one) for one in made.corpus.documents("train")}
    return {name: Scores(**{f.name: getattr(scores, f.name).copy() for f in fields(Scores)}) for name, scores in found.items()}


def assert_close(one: dict[str, Scores], two: dict[str, Scores]) -> None:
    assert one.keys() == two.keys()
    for name, scores in one.items():
        assert np.array_equal(scores.positions, two[name].positions)
        for column in ("label_logprob", "entropy", "tail"):
            np.testing.assert_allclose(getattr(scores, column), getattr(two[name], column), atol=2e-5)


def sound(made: Lab) -> dict[str, Any]:
    return verify_cache(find_cache(only_cache(made.store).url, ""), Documents(made.store, made.staging), made.staging)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["topk", "sample", "none"])
def test_healthy_documents_are_scored_as_if_alone(tmp_path: Path, kind: str, value: float) -> None:
    score = {"distribution": {"kind": kind}}
    model = spoilt_model(tmp_path / "model", value)
    objective = {"kind": "stm"}
    made = lab(tmp_path / "sick", documents=DOCUMENTS, model=model, score=score, objective=objective)
    clean = lab(tmp_path / "clean", documents=HEALTHY, model=model, score=score, objective=objective)
    done = made.score()
    assert (done.documents_scored, clean.score().documents_scored) == (len(HEALTHY), len(HEALTHY))
    assert done.coverage.quarantined.keys() == NAMES
    assert set(done.coverage.quarantined.values()) == {"the teacher's distribution over it is not finite"}
    assert (len(done.coverage.held), done.coverage.missing) == (len(HEALTHY), [])
    excluded = without(made, *NAMES)
    assert excluded.score().documents_scored == 0
    assert_close(contents(excluded), contents(clean))


def test_what_is_spoilt_spoils_its_row_and_no_other_document(made: Lab) -> None:
    """The reason for reading again one by one: without it, neighbours would be called unreadable."""
    model = loaded(made.model)
    mixed = [SICK[0], *HEALTHY[:4]]
    places = [np.flatnonzero(one.supervised).astype(np.uint32) for one in mixed]
    together = score_documents(model, [one.tokens for one in mixed], places, made.run.score.distribution)
    assert not all(score.finite for score in together[1:])


def test_training_refuses_by_name_and_says_the_way_out(made: Lab) -> None:
    made.score()
    with pytest.raises(MissingArtifactError) as told:
        made.cache()
    assert told.value.exit_status == 3
    assert f"3 of the corpus's {len(DOCUMENTS)} documents" in told.value.problem
    for row, one in ((6, SICK[0]), (17, SICK[1]), (18, SICK[2])):
        assert f"{one.digest}  rows.jsonl:{row}: the teacher's distribution over it is not finite" in told.value.problem
        assert one.digest in told.value.help
    assert "data.exclude=[" in told.value.help
    rest = without(made, SICK[0].digest)
    rest.score()
    with pytest.raises(MissingArtifactError, match="2 of the corpus's") as told:
        rest.cache()
    assert f"data.exclude=[{','.join(one.digest for one in SICK)}]" in told.value.help, "what is left out already stays out"


def test_they_are_not_tried_again_unless_asked(made: Lab, read: list[list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    made.score()
    read.clear()
    again = made.changed(score={"retry_quarantined": True})
    tried = again.score()
    sick = {one.tokens.tobytes() for one in SICK}
    others = {one for batch in read for one in batch} - sick
    assert sick <= {one for batch in read for one in batch}
    assert len(others) <= 1, "one that it can read shows that the teacher is not to blame"
    assert (tried.documents_scored, tried.coverage.quarantined.keys()) == (0, NAMES)
    again.score()  # under yet another name
    assert sound(made)["quarantined"] == len(SICK)
    monkeypatch.setattr("distft.teacher.scorer.load_model", lambda *_, **__: pytest.fail("the teacher was loaded"))
    plain = made.score()
    assert (plain.documents_scored, plain.coverage.quarantined.keys()) == (0, NAMES)
    before_scoring(made.store, made.identity(), made.corpus.digests("train"), reuse_only=True)


def test_one_new_document_that_is_sick(made: Lab) -> None:
    """Its unit has no other: others of the corpus show that the teacher is not to blame."""
    before = over(made, HEALTHY)
    before.score()
    grown = over(made, [*HEALTHY, SICK[0]])
    assert grown.score().coverage.quarantined.keys() == {SICK[0].digest}
    empty = [part for part in read_parts(only_cache(made.store)) if not part.files]
    assert [part.facts["digests"] for part in empty] == [[]]
    assert (sound(made)["quarantined"], sound(made)["documents"]) == (1, len(HEALTHY))
    assert len(contents(before)) == len(HEALTHY), "the smaller corpus is still whole"


def test_a_teacher_that_reads_nothing_is_to_blame(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=SICK, model=spoilt_model(tmp_path / "model"))
    with pytest.raises(DistftError, match="could read no document that was tried") as told:
        made.score()
    assert told.value.exit_status == 1
    assert told.value.where.startswith("rows.jsonl:")
    assert read_parts(only_cache(made.store)) == []


# --- memory and positions --------------------------------------------------------------------------------------------


def hungry(limit: int, teacher: Any, seen: list[int]) -> Any:
    """Reads, and asks torch for more memory than there is when it gets more tokens than `limit` at once."""

    def read(documents: list[Document]) -> list[Scores]:
        seen.append(len(documents))
        if sum(len(one) for one in documents) > limit:
            torch.empty(1 << 60, dtype=torch.uint8)
        places = [np.flatnonzero(one.supervised).astype(np.uint32) for one in documents]
        return score_documents(teacher, [one.tokens for one in documents], places, lab_distribution())

    return read


def lab_distribution() -> Any:
    from distft.config.schema import TopK

    return TopK()


def test_what_does_not_fit_in_memory() -> None:
    long = random_documents(1, seed=81, shortest=60, longest=60, vocabulary=270)[0]
    documents, seen = [*HEALTHY, long], []
    kept: list[Document] = []

    def keep(rows: list[tuple[Document, Scores]]) -> None:
        kept.extend(document for document, _ in rows)

    steps = read_apart(documents, hungry(50, loaded(shared_model()), seen), keep, tokens_per_batch=200, room=None)
    amounts = []
    while True:
        try:
            amounts.append(next(steps))
        except StopIteration as ended:
            reading = ended.value
            break
    assert sum(amounts) == sum(len(one) for one in documents)
    assert reading.documents == len(HEALTHY)
    assert {one.digest for one in kept} == {one.digest for one in HEALTHY}
    assert reading.quarantined.keys() == {long.digest}
    assert reading.quarantined[long.digest].startswith("out of memory: ")
    assert "you tried to allocate 1152921504606846976 bytes" in reading.quarantined[long.digest]
    assert reading.crowded == sum(count > 1 for count in seen) > 1
    assert seen.count(1) == len(documents)


def test_batches_that_are_too_large_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = lab(tmp_path, documents=random_documents(64, seed=83))

    def small(model: Any, documents: Sequence[Any], *rest: Any) -> list[Scores]:
        if len(documents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return score_documents(model, documents, *rest)

    monkeypatch.setattr("distft.teacher.scorer.score_documents", small)
    assert made.score().documents_scored == 64
    told = capsys.readouterr().err
    assert "batches did not fit in memory and were read document by document" in told
    assert "score.tokens_per_batch, which is 16,384" in told
    made.cache()


def test_other_errors_of_a_teacher_pass() -> None:
    def raises(error: Exception) -> Any:
        def read(_: list[Document]) -> list[Scores]:
            raise error

        return read

    for error in (RuntimeError("shapes"), DistftError("a rank was lost")):
        with pytest.raises(type(error), match=str(error)):
            attempt(raises(error), HEALTHY[:1])


def test_more_memory_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coverage with quarantined documents gives way once they could be read."""
    made = lab(tmp_path, documents=HEALTHY, model=spoilt_model(tmp_path / "model"))
    longest = max(HEALTHY, key=len)

    def small(model: Any, documents: Sequence[Any], *rest: Any) -> list[Scores]:
        if any(len(one) == len(longest) for one in documents):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return score_documents(model, documents, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("distft.teacher.scorer.score_documents", small)
        first = made.score()
    assert longest.digest in first.coverage.quarantined
    with pytest.raises(MissingArtifactError, match="Tried to allocate 2 GiB"):
        made.cache()
    again = made.changed(score={"retry_quarantined": True}).score()
    assert again.documents_scored == len(first.coverage.quarantined)
    assert not again.coverage.quarantined
    assert len(contents(made)) == len(HEALTHY)
    assert made.score().documents_scored == 0
    assert figures(only_cache(made.store))["quarantined"] == sound(made)["quarantined"] == 0


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("gpt2", {"max_position_embeddings": 48}, 48),
        ("opt", {"max_position_embeddings": 48, "word_embed_proj_dim": 32, "ffn_dim": 64}, 48),
        ("gptj", {"max_position_embeddings": 48, "rotary_dim": 4}, 48),
        ("llama", {"max_position_embeddings": 48}, None),
        ("qwen3", {"max_position_embeddings": 48}, None),
        ("gemma3_text", {"max_position_embeddings": 48}, None),
    ],
)
def test_how_long_a_document_may_be(tmp_path: Path, family: Any, settings: dict[str, Any], limit: int | None) -> None:
    tiny_model_folder(tmp_path, family=family, vocabulary=280, hidden=32, **settings)
    model = loaded(resolve_model(str(tmp_path), None), attention="eager")  # GPT-J has no other
    assert positions_limit(model) == limit


def test_learned_positions_end(tmp_path: Path) -> None:
    tiny_model_folder(tmp_path / "model", family="gpt2", vocabulary=280, hidden=32, max_position_embeddings=24, initializer_range=0.5)  # pyright: ignore  # fmt: skip
    model = resolve_model(str(tmp_path / "model"), None)
    long = random_documents(2, seed=82, shortest=25, longest=40, vocabulary=270)
    made = lab(tmp_path / "long", documents=[*HEALTHY, *long], model=model)
    clean = lab(tmp_path / "clean", documents=HEALTHY, model=model)
    clean.score()
    done = made.score()
    assert done.coverage.quarantined == {
        one.digest: f"it has {len(one)} tokens, and the teacher has positions for 24" for one in long
    }
    excluded = without(made, *(one.digest for one in long))
    excluded.score()
    assert_close(contents(excluded), contents(clean))


# --- the cache around them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_part_with_a_quarantined_document_is_committed_like_any_other(made: Lab, read: list[list[bytes]], after: int) -> None:
    with killed_after(after) as parts:
        made.score()
    tried = {digest for one in parts for digest in (*one.facts["digests"], *one.facts["quarantined"])}
    held = tried - NAMES
    read.clear()
    done = made.score()
    assert done.documents_scored == len(HEALTHY) - len(held)
    assert not {one.tokens.tobytes() for one in DOCUMENTS if one.digest in tried} & {
        one for batch in read for one in batch if len(batch) > 1
    }
    assert done.coverage.quarantined.keys() == NAMES
    assert sound(made)["documents"] == len(HEALTHY)


def test_what_is_told_of_the_cache(made: Lab) -> None:
    made.score()
    folder = only_cache(made.store)
    assert (figures(folder)["documents"], figures(folder)["quarantined"]) == (len(HEALTHY), 3)
    assert cache_statistics(folder, made.staging, tau=2.5)["quarantined"].keys() == NAMES
    with pytest.raises(MissingArtifactError, match=f"{SICK[1].digest} is quarantined: the teacher's distribution"):
        find_row(folder, SICK[1].digest[:12], made.staging)
    told = sound(made)
    assert (told["documents"], told["quarantined"], told["corpora_covered"]) == (len(HEALTHY), 3, 0)
    excluded = without(made, *NAMES)
    excluded.score()
    assert sound(made)["corpora_covered"] == figures(folder)["corpora_covered"] == 1
    assert prune(folder, grace_seconds=0).files == {}
    stated = read_manifest(folder.child("coverage"), f"{documents_key(made.corpus.digests('train'))}.json")
    assert stated is not None
    assert stated.facts["quarantined"].keys() == NAMES


def test_a_row_counts_more_than_a_quarantine(made: Lab) -> None:
    made.score()
    folder = only_cache(made.store)
    accuse(folder, HEALTHY[0].digest)
    assert quarantined_documents(read_parts(folder)).keys() == NAMES


def accuse(folder: Location, digest: str) -> None:
    """A part as another machine would have left it, on which a document did not fit."""
    facts = {"digests": [], "quarantined": {digest: "out of memory"}, "tokens": 0, "scored_tokens": 0, "entries": 0}
    identity = {"documents": documents_key([digest]), "teacher": folder.url.rpartition("/")[2]}
    folder.create("parts/ffff.json", Manifest(kind="teacher-part", identity=identity, files=(), facts=facts).to_json())


def test_a_quarantine_that_was_changed_is_found(made: Lab) -> None:
    made.score()
    folder = only_cache(made.store)
    name, part = next(
        (name, part)
        for name in folder.child("parts").names()
        if (part := read_manifest(folder.child("parts"), name)) is not None and part.facts["quarantined"]
    )
    folder.replace(f"parts/{name}", replace(part, facts=part.facts | {"quarantined": {}}).to_json())
    with pytest.raises(CorruptArtifactError, match="its identity is not that of its documents"):
        sound(made)
