"""Building a corpus: same rows, same documents, whatever the workers, the interruptions or the company."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.config.schema import Data
from distft.corpus import build, tabulate, workers
from distft.corpus.build import build_corpus, corpus_identity
from distft.corpus.reader import Corpus
from distft.errors import CorruptArtifactError, DataError, DistftError, MissingArtifactError, ModelError, StaleArtifactError
from distft.store.digest import document_digest
from distft.store.location import Location, open_location
from distft.store.manifest import Manifest, describe, differences
from distft.store.model_folder import ModelFolder, resolve_model
from tests.helpers.models import tiny_tokenizer_folder
from tests.unit.corpus.conftest import write_jsonl

PART_TOKENS = 800  # a handful of parts for the data below
CHUNK_ROWS = 10


def chats(count: int, tag: str = "row") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{tag} {n}?"}, {"role": "assistant", "content": f"the answer {n} " * (n % 5)}]}
        for n in range(count)
    ]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHUNK_ROWS", CHUNK_ROWS)


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    folder = tiny_tokenizer_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 384, "model_type": "llama"}))
    return resolve_model(str(folder), None)


@pytest.fixture
def store(tmp_path: Path) -> Location:
    return open_location(str(tmp_path / "store"))


@pytest.fixture
def config(tmp_path: Path) -> Data:
    write_jsonl(tmp_path / "data" / "train.jsonl", chats(100))
    write_jsonl(tmp_path / "data" / "heldout.jsonl", chats(25, "held"))
    return data(tmp_path)


def data(tmp_path: Path, **settings: Any) -> Data:
    sources = {name: {"path": str(tmp_path / "data" / f"{name}.jsonl")} for name in ("train", "heldout")}
    return Data.model_validate({**sources, "workers": 1, "max_tokens": 512, **settings})


class Tokenised:
    """Counts the rows that go through a tokenizer in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        encode = workers.Renderer.encode

        def counting(renderer: Any, rows: Any, max_tokens: int) -> Any:
            self.rows += len(rows)
            return encode(renderer, rows, max_tokens)

        monkeypatch.setattr(workers.Renderer, "encode", counting)


def content(manifest: Manifest) -> tuple[str, list[int], dict[str, Any]]:
    """What must be equal of two builds: every byte, in order, and the figures."""
    return manifest.content_digest, [entry.size for entry in manifest.files], manifest.facts


def names_of(manifest: Manifest, store: Location) -> list[str]:
    return store.child("corpus", manifest.id).names(recursive=True)


def read(manifest: Manifest, store: Location, tmp_path: Path) -> Corpus:
    return Corpus.open(store.child("corpus", manifest.id), tmp_path / "staging")


def test_documents_come_back_in_the_order_of_the_rows(config: Data, model: ModelFolder, store: Location, tmp_path: Path) -> None:
    manifest = build_corpus(config, model, store, part_tokens=PART_TOKENS)
    corpus = read(manifest, store, tmp_path)
    assert corpus.splits == ("train", "heldout")
    assert [entry.facts["split"] for entry in corpus.manifest.files].count("train") > 2
    for split, count, tag in (("train", 100, "row"), ("heldout", 25, "held")):
        documents = list(corpus.documents(split))
        assert [document.row for document in documents] == list(range(1, count + 1))
        assert {document.file for document in documents} == {f"{split}.jsonl"}
        facts = manifest.facts[split]
        lengths, supervised = corpus.lengths(split), corpus.supervised_counts(split)
        assert lengths.tolist() == [len(document) for document in documents]
        assert supervised.tolist() == [int(document.supervised.sum()) for document in documents]
        assert corpus.digests(split) == [document.digest for document in documents]
        assert (corpus.count(split), facts["documents"], facts["rows"]) == (count, count, count)
        assert (facts["tokens"], facts["supervised_tokens"], facts["longest"]) == (lengths.sum(), supervised.sum(), lengths.max())
        assert (facts["dropped"], facts["truncated"], facts["altered"], facts["unended"]) == (0, 0, 0, 0)
        for number in (count - 1, 0, count // 2):
            document = corpus.document(split, number)
            assert (document.row, document.digest) == (number + 1, documents[number].digest)
            assert document.digest == document_digest(document.tokens.copy(), document.supervised)
            assert (document.tokens.dtype, document.supervised.dtype) == (np.uint32, np.bool_)
            assert not document.tokens.flags.owndata  # a view of the file, not a copy
            assert f"{tag} {number}?" in tokenizer_of(model).decode(document.tokens)
        with pytest.raises(IndexError):
            corpus.document(split, count)


def tokenizer_of(model: ModelFolder) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path)


def test_a_digest_is_stable() -> None:
    """Teacher caches are joined by it: a change here throws them all away."""
    tokens, supervised = np.array([1, 2, 3], np.uint32), np.array([False, True, True])
    assert document_digest(tokens, supervised) == "ea3e1f8362ddc295dbed569e99fd3e48"


def test_the_same_row_is_the_same_document_in_any_data_set(
    config: Data, model: ModelFolder, store: Location, tmp_path: Path
) -> None:
    before = read(build_corpus(config, model, store), store, tmp_path).digests("train")
    write_jsonl(tmp_path / "data" / "train.jsonl", [*chats(3, "new"), *reversed(chats(100))])
    after = read(build_corpus(config, model, store), store, tmp_path).digests("train")
    assert after[3:] == before[::-1]
    assert len(set(after)) == 103


def test_a_second_run_reads_the_manifest_and_nothing_else(
    config: Data, model: ModelFolder, store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_corpus(config, model, store)
    monkeypatch.setattr(workers, "load_tokenizer", None)
    monkeypatch.setattr(build, "rows", None)
    assert build_corpus(config, model, store).files == first.files


def test_workers_leave_no_trace(config: Data, model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = build_corpus(config, model, open_location(str(tmp_path / "one")), part_tokens=PART_TOKENS)
    monkeypatch.setattr(workers, "SPAWN_CHUNKS", 2)
    tokenised = Tokenised(monkeypatch)
    two = build_corpus(
        config.model_copy(update={"workers": 2}), model, open_location(str(tmp_path / "two")), part_tokens=PART_TOKENS
    )
    assert tokenised.rows == 0  # it was done elsewhere
    assert content(one) == content(two)


def test_little_work_starts_no_process(
    config: Data, model: ModelFolder, store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)
    monkeypatch.setattr(build, "CHUNK_ROWS", 256)
    assert build_corpus(config.model_copy(update={"workers": 8}), model, store).facts["train"]["documents"] == 100


def test_errors_in_a_worker_come_back_whole(
    config: Data, model: ModelFolder, store: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SPAWN_CHUNKS", 2)
    given = chats(60)
    given[41]["messages"][0]["content"] = 3
    write_jsonl(tmp_path / "data" / "train.jsonl", given)
    with pytest.raises(DataError, match="'content' of message 1 must be a string, not int") as error:
        build_corpus(config.model_copy(update={"workers": 2}), model, store)
    assert error.value.where == f"{tmp_path / 'data' / 'train.jsonl'}, row 42"


def test_a_worker_that_dies_is_told(config: Data, model: ModelFolder, store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SPAWN_CHUNKS", 2)
    start = workers.ProcessPoolExecutor.submit

    def killing(pool: Any, *args: Any) -> Any:
        future = start(pool, *args)
        for process in list(pool._processes.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return future

    monkeypatch.setattr(workers.ProcessPoolExecutor, "submit", killing)
    with pytest.raises(DistftError, match="a process that was tokenising died") as error:
        build_corpus(config.model_copy(update={"workers": 2}), model, store)
    assert error.value.exit_status == 1


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def parts_of(manifest: Manifest) -> int:
    return len(manifest.files)


def test_a_build_cut_off_anywhere_goes_on_and_makes_the_same(
    config: Data, model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = build_corpus(config, model, open_location(str(tmp_path / "whole")), part_tokens=PART_TOKENS)
    commit = build.commit
    for survivors in range(parts_of(undisturbed) + 1):
        store = open_location(str(tmp_path / f"cut{survivors}"))
        committed: list[Manifest] = []

        def failing(folder: Location, manifest: Manifest, *args: Any, survivors: int = survivors, **kw: Any) -> Manifest:
            if len(committed) == survivors:  # noqa: B023
                raise Interrupted
            committed.append(commit(folder, manifest, *args, **kw))  # noqa: B023
            return committed[-1]  # noqa: B023

        monkeypatch.setattr(build, "commit", failing)
        with pytest.raises(Interrupted):
            build_corpus(config, model, store, part_tokens=PART_TOKENS)
        monkeypatch.setattr(build, "commit", commit)
        with monkeypatch.context() as patch:
            tokenised = Tokenised(patch)
            resumed = build_corpus(config, model, store, part_tokens=PART_TOKENS)
        assert content(resumed) == content(undisturbed)
        assert tokenised.rows == 125 - sum(part.facts["rows"] for part in committed)  # nothing twice


def test_an_interruption_amid_a_part_leaves_only_what_was_committed(
    config: Data, model: ModelFolder, store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = workers.Renderer.encode, [0]

    def failing(renderer: Any, rows: Any, max_tokens: int) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return encode(renderer, rows, max_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(workers.Renderer, "encode", failing)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(config, model, store, part_tokens=PART_TOKENS)
    (folder,) = store.child("corpus").folders()
    names = store.child("corpus", folder).names(recursive=True)
    assert "MANIFEST.json" not in names
    assert (
        len([name for name in names if name.startswith("data/")])
        == len([name for name in names if name.startswith("parts/")])
        > 0
    )
    with pytest.raises(MissingArtifactError, match="no corpus is committed"):
        Corpus.open(store.child("corpus", folder), Path("/nowhere"))
    assert build_corpus(config, model, store, part_tokens=PART_TOKENS).facts["train"]["documents"] == 100


def test_two_builds_at_once_end_with_one_result(
    config: Data, model: ModelFolder, store: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each commit of the one build, the other overtakes it."""
    commit, other = build.commit, []

    def overtaken(folder: Location, manifest: Manifest, *args: Any, **kw: Any) -> Manifest:
        if not other:
            with monkeypatch.context() as patch:
                patch.setattr(build, "commit", commit)
                other.append(build_corpus(config, model, store, part_tokens=PART_TOKENS))
        return commit(folder, manifest, *args, **kw)

    monkeypatch.setattr(build, "commit", overtaken)
    mine = build_corpus(config, model, store, part_tokens=PART_TOKENS)
    assert mine.files == other[0].files
    data_files = [name for name in names_of(mine, store) if name.startswith("data/")]
    assert sorted(data_files) == sorted(entry.name for entry in mine.files)  # the loser's files are gone
    assert list(read(mine, store, tmp_path).digests("train"))


def test_a_build_that_cuts_its_parts_otherwise_is_not_mixed_with_this_one(
    config: Data, model: ModelFolder, store: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, overtook = build.commit, []
    config = config.model_copy(update={"heldout": None})

    def overtaken(folder: Location, manifest: Manifest, *args: Any, **kw: Any) -> Manifest:
        if not overtook:
            overtook.append(True)
            with monkeypatch.context() as patch:
                patch.setattr(build, "commit", first_only)
                with pytest.raises(Interrupted):
                    build_corpus(config, model, store, part_tokens=2 * PART_TOKENS)
        return commit(folder, manifest, *args, **kw)

    def first_only(folder: Location, manifest: Manifest, *args: Any, **kw: Any) -> Manifest:
        commit(folder, manifest, *args, **kw)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(build, "commit", overtaken)
        with pytest.raises(StaleArtifactError, match="in parts of"):
            build_corpus(config, model, store, part_tokens=PART_TOKENS)
    assert build_corpus(config, model, store, part_tokens=PART_TOKENS).facts["train"]["documents"] == 100


def test_threads_that_build_at_once_agree(config: Data, model: ModelFolder, store: Location) -> None:
    made: list[Manifest] = []
    threads = [
        threading.Thread(target=lambda: made.append(build_corpus(config, model, store, part_tokens=PART_TOKENS)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3
    assert made[0].files == made[1].files == made[2].files


def changed(config: Data, model: ModelFolder, before: dict[str, Any], **updates: Any) -> str:
    after = corpus_identity(config.model_copy(update=updates), resolve_model(str(model.path), None))
    return describe(differences(before, after))


def test_identity_ignores_names_places_and_workers(config: Data, model: ModelFolder, tmp_path: Path) -> None:
    assert config.heldout is not None
    before = corpus_identity(config, model)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    (tmp_path / "moved" / "train.jsonl").rename(tmp_path / "moved" / "renamed.jsonl")
    shutil.move(model.path, tmp_path / "other")
    moved = config.train.model_copy(update={"path": str(tmp_path / "moved" / "renamed.jsonl")})
    held = config.heldout.model_copy(update={"path": str(tmp_path / "moved" / "heldout.jsonl")})
    model = replace(model, path=tmp_path / "other")
    assert changed(config, model, before, train=moved, heldout=held, workers="auto") == ""
    assert str(tmp_path) not in json.dumps(before)


def test_identity_names_what_changed(config: Data, model: ModelFolder, tmp_path: Path) -> None:
    before, path = corpus_identity(config, model), tmp_path / "data" / "train.jsonl"
    assert changed(config, model, before, max_tokens=513) == "max_tokens: 512 -> 513"
    assert changed(config, model, before, heldout=None).startswith("heldout: ")
    whole = path.read_text()
    path.write_text(whole.replace("row 7?", "row 7!"))
    assert changed(config, model, before).startswith("train.content: ")
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert changed(config, model, before).startswith("train.content: ")
    path.write_text(whole)
    assert changed(config, model, before) == ""

    template = model.path / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "Assistant"))
    assert changed(config, model, before).startswith("tokenizer.template: ")
    tiny_tokenizer_folder(model.path)
    assert changed(config, model, before) == ""

    vocabulary = model.path / "tokenizer.json"
    document = json.loads(vocabulary.read_text())
    ids = document["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    vocabulary.write_text(json.dumps(document))
    assert changed(config, model, before).startswith("tokenizer.vocabulary: ")


def test_dropped_and_cut_documents_are_counted_and_named(
    tmp_path: Path, model: ModelFolder, store: Location, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [{"role": "user", "content": "why? " * 100}, {"role": "assistant", "content": "so"}]}
    nobody = {"messages": [{"role": "user", "content": "hello"}]}
    chatty = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "on and on " * 100}]}
    write_jsonl(tmp_path / "data" / "train.jsonl", [*chats(3), long, nobody, chatty])
    manifest = build_corpus(data(tmp_path, heldout=None, max_tokens=64), model, store)
    facts = manifest.facts["train"]
    assert (facts["rows"], facts["documents"], facts["dropped"], facts["truncated"], facts["longest"]) == (6, 4, 2, 1, 64)
    assert [name.partition(" ")[0] for name in facts["dropped_names"]] == ["train.jsonl:4", "train.jsonl:5"]
    assert "data.max_tokens=64" in facts["dropped_names"][0]
    assert "no turn of the role assistant (roles: user)" in facts["dropped_names"][1]
    assert str(tmp_path) not in json.dumps(facts)
    corpus = read(manifest, store, tmp_path)
    assert [document.row for document in corpus.documents("train")] == [1, 2, 3, 6]
    assert corpus.supervised_counts("train").min() > 0
    told = capsys.readouterr().err
    assert "train: 2 of 6 rows dropped: train.jsonl:4" in told
    assert "train: 1 of 4 documents cut to 64 tokens" in told


def test_only_so_many_names_are_kept(tmp_path: Path, model: ModelFolder, store: Location) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", [*chats(1), *[{"messages": [{"role": "user", "content": "a"}]}] * 50])
    facts = build_corpus(data(tmp_path, heldout=None), model, store).facts["train"]
    assert (facts["dropped"], len(facts["dropped_names"])) == (50, tabulate.NAMES_KEPT)


def test_a_max_tokens_that_drops_everything_is_refused(config: Data, model: ModelFolder, store: Location) -> None:
    with pytest.raises(DataError, match=r"all 25 rows were dropped.*the shortest prompt has \d+ tokens") as error:
        build_corpus(config.model_copy(update={"max_tokens": 4}), model, store)
    assert error.value.where == "data.max_tokens=4"
    assert error.value.exit_status == 2
    shortest = int(error.value.problem.split("the shortest prompt has ")[1].split()[0])
    with pytest.raises(DataError):
        build_corpus(config.model_copy(update={"max_tokens": shortest}), model, store)
    assert build_corpus(config.model_copy(update={"max_tokens": shortest + 1}), model, store).facts["heldout"]["documents"] > 0


def test_roles_that_no_template_knows_drop_everything_and_are_named(tmp_path: Path, model: ModelFolder, store: Location) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"messages": [{"role": "gpt", "content": "a"}]}])
    with pytest.raises(DataError, match=r"all 1 rows were dropped; the first is train.jsonl:1 \(no turn of the role assistant"):
        build_corpus(data(tmp_path, heldout=None), model, store)


@pytest.mark.parametrize("which", ["train", "heldout"])
def test_an_empty_split_commits_nothing(config: Data, model: ModelFolder, store: Location, tmp_path: Path, which: str) -> None:
    (tmp_path / "data" / f"{which}.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the file is empty"):
        build_corpus(config, model, store)
    assert not [name for name in store.names(recursive=True) if name.endswith("MANIFEST.json")]
    if which == "heldout":
        assert store.names(recursive=True) == []


@pytest.mark.parametrize("bad", ['{"messages": [', '{"message": []}', "[]"])
def test_a_bad_row_stops_the_build(config: Data, model: ModelFolder, store: Location, tmp_path: Path, bad: str) -> None:
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write(bad + "\n")
    with pytest.raises(DataError) as error:
        build_corpus(config, model, store)
    assert error.value.where == f"{tmp_path / 'data' / 'train.jsonl'}, row 101"
    assert not [name for name in store.names(recursive=True) if name.endswith("MANIFEST.json")]


def test_data_that_changes_while_it_is_read_is_refused(
    config: Data, model: ModelFolder, store: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = workers.Renderer.encode

    def writing(renderer: Any, rows: Any, max_tokens: int) -> Any:
        with (tmp_path / "data" / "train.jsonl").open("a") as file:
            file.write("\n")
        return encode(renderer, rows, max_tokens)

    monkeypatch.setattr(workers.Renderer, "encode", writing)
    with pytest.raises(DataError, match="changed while it was read"):
        build_corpus(data(tmp_path, heldout=None), model, store)
    assert not [name for name in store.names(recursive=True) if name.endswith(".json")]


def test_a_tokenizer_larger_than_the_head_is_refused(config: Data, model: ModelFolder, store: Location) -> None:
    (model.path / "config.json").write_text(json.dumps({"vocab_size": 383}))
    with pytest.raises(ModelError, match="has 384 tokens, the model's vocabulary 383 rows") as error:
        build_corpus(config, resolve_model(str(model.path), None), store)
    assert error.value.exit_status == 2


def test_a_tokenizer_that_cannot_be_loaded(config: Data, model: ModelFolder, store: Location) -> None:
    (model.path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        build_corpus(config, model, store)


def test_a_slow_tokenizer_is_refused(config: Data, model: ModelFolder, store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: object())
    with pytest.raises(ModelError, match="object is not a fast tokenizer"):
        build_corpus(config, model, store)


def test_a_corpus_with_one_bit_flipped_is_not_read(config: Data, model: ModelFolder, store: Location, tmp_path: Path) -> None:
    manifest = build_corpus(config, model, store)
    path = store.child("corpus", manifest.id).local(manifest.files[0].name)
    assert path is not None
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptArtifactError):
        read(manifest, store, tmp_path).document("train", 0)


def test_a_split_that_is_not_there(tmp_path: Path, config: Data, model: ModelFolder, store: Location) -> None:
    manifest = build_corpus(data(tmp_path, heldout=None), model, store)
    corpus = read(manifest, store, tmp_path)
    assert corpus.splits == ("train",)
    with pytest.raises(MissingArtifactError, match="no split 'heldout'; it has train"):
        corpus.document("heldout", 0)


def test_the_same_on_s3(config: Data, model: ModelFolder, store: Location, s3_url: str, tmp_path: Path) -> None:
    here = build_corpus(config, model, store, part_tokens=PART_TOKENS)
    away = build_corpus(config, model, open_location(s3_url), part_tokens=PART_TOKENS)
    assert content(here) == content(away)
    there = read(away, open_location(s3_url), tmp_path)
    assert there.digests("train") == read(here, store, tmp_path).digests("train")
    assert there.document("train", 99).row == 100


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(count: int) -> int:
        monkeypatch.setattr(tabulate, "NAMES_KEPT", 0)
        write_jsonl(tmp_path / "data" / f"{count}.jsonl", [{"text": f"{n} " + "the user " * 100} for n in range(count)])
        given = Data.model_validate(
            {"train": {"path": str(tmp_path / "data" / f"{count}.jsonl"), "format": "text"}, "workers": 1}
        )
        tracemalloc.start()
        try:
            manifest = build_corpus(given, model, open_location(str(tmp_path / "store")), part_tokens=10_000)
            assert manifest.facts["train"]["documents"] == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # imports
    small, large = peak(100), peak(500)
    assert large < 1.5 * small, (small, large)


def test_workers_leave_with_a_parent_that_was_killed(config: Data, model: ModelFolder, tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(
        "import sys, pickle, distft.corpus.workers as w, distft.corpus.build as b\n"
        "from distft.store.location import open_location\n"
        "w.SPAWN_CHUNKS, b.CHUNK_ROWS = 1, 1\n"
        "real = w.ProcessPoolExecutor.submit\n"
        "def submit(pool, *args):\n"
        "    future = real(pool, *args)\n"
        "    future.result()\n"
        "    print(*pool._processes, flush=True)\n"
        "    sys.stdin.read()\n"
        "w.ProcessPoolExecutor.submit = submit\n"
        "if __name__ == '__main__':\n"
        "    b.build_corpus(*pickle.loads(bytes.fromhex(sys.argv[1])), open_location(sys.argv[2]))\n"
    )
    import pickle

    given = pickle.dumps((config.model_copy(update={"workers": 1 + 1}), model)).hex()
    parent = subprocess.Popen(
        [sys.executable, str(script), given, str(tmp_path / "store")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert children
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
