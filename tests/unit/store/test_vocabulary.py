"""Vocabularies of real tokenizer files, and how two of them are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.store.model_folder import ModelFolder
from distft.store.vocabulary import compare_vocabularies, difference, read_vocabulary
from tests.helpers.models import tiny_tokenizer_folder

Edit = Callable[[dict[str, Any]], None]


def folder(path: Path, **settings: Any) -> ModelFolder:
    return ModelFolder(tiny_tokenizer_folder(path, **settings), {})


def edited(path: Path, edit: Edit, **settings: Any) -> ModelFolder:
    made = folder(path, **settings)
    document = json.loads((path / "tokenizer.json").read_text())
    edit(document)
    (path / "tokenizer.json").write_text(json.dumps(document))
    return made


def swap(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    for one, other in ((7, 8), (10, 11), (20, 21), (30, 31)):
        vocabulary[by_id[one]], vocabulary[by_id[other]] = other, one


@pytest.mark.parametrize("vocabulary", [261, 384])
def test_what_is_read_is_what_transformers_says(tmp_path: Path, vocabulary: int) -> None:
    from transformers import AutoTokenizer

    made = folder(tmp_path / "a", vocabulary=vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(made.path, local_files_only=True)
    tokenizer.add_tokens(["<tool>", "<|end of tool|>"])
    tokenizer.save_pretrained(made.path)
    found = read_vocabulary(made)
    assert found == {number: token for token, number in tokenizer.get_vocab().items()}
    assert found is not None
    assert found[len(tokenizer) - 1] == "<|end of tool|>", "an added token is a token"


def test_a_list_with_scores_is_a_vocabulary(tmp_path: Path) -> None:
    """As sentencepiece's unigram models are converted."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(["one two three four five", "six seven eight nine ten"] * 5, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(ModelFolder(tmp_path, {})) == {number: token for token, number in tokenizer.get_vocab().items()}


def test_older_files_are_read_too(tmp_path: Path) -> None:
    bert, gpt = tmp_path / "bert", tmp_path / "gpt"
    bert.mkdir()
    (bert / "vocab.txt").write_text("[PAD]\n[UNK]\na\n\N{LINE SEPARATOR}\n##b\n", encoding="utf-8")
    assert read_vocabulary(ModelFolder(bert, {})) == {0: "[PAD]", 1: "[UNK]", 2: "a", 3: "\N{LINE SEPARATOR}", 4: "##b"}
    gpt.mkdir()
    (gpt / "vocab.json").write_text('{"a": 0, "b": 1}')
    (gpt / "added_tokens.json").write_text('{"<pad>": 2}')
    assert read_vocabulary(ModelFolder(gpt, {})) == {0: "a", 1: "b", 2: "<pad>"}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"model": 3}', '{"model": {"vocab": {"a": "0"}}}', '{"model": {"vocab": [3]}}',
             '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": "1"}]}', '{"model": {"vocab": {"a": 0}}, "added_tokens": 1}',
             "[" * 100_000],
)  # fmt: skip
def test_a_file_of_another_form_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "tokenizer.json").write_text(text)
    unknown = ModelFolder(tmp_path / "one", {})
    assert not read_vocabulary(unknown)
    known = folder(tmp_path / "two")
    assert compare_vocabularies(unknown, known) == compare_vocabularies(known, unknown) == ""


def test_no_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\n\x0e")
    assert read_vocabulary(ModelFolder(tmp_path, {})) is None


def test_ids_that_mean_another_token(tmp_path: Path) -> None:
    model, teacher = folder(tmp_path / "model"), edited(tmp_path / "teacher", swap)
    found = read_vocabulary(model)
    assert found is not None
    lines = compare_vocabularies(teacher, model).splitlines()
    assert lines == [
        f"8 of the {len(found):,} ids that both have mean another token:",
        "  id: teacher's token / model's token",
        f"  7: {found[8]!r} / {found[7]!r}",
        f"  8: {found[7]!r} / {found[8]!r}",
        f"  10: {found[11]!r} / {found[10]!r}",
        f"  11: {found[10]!r} / {found[11]!r}",
        f"  20: {found[21]!r} / {found[20]!r}",
        "  ... and 3 more",
    ]


def test_ids_that_one_side_alone_has(tmp_path: Path) -> None:
    """A teacher of the same family with more tokens at the end: its ids mean the same, and yet it may speak of others."""

    def add(document: dict[str, Any]) -> None:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        document["added_tokens"] += [{"id": 151_643 + n, "content": f"<tool {n}>", **plain} for n in range(22)]

    model, teacher = folder(tmp_path / "model"), edited(tmp_path / "teacher", add)
    found = read_vocabulary(model)
    assert found is not None
    assert compare_vocabularies(teacher, model).splitlines() == [
        f"0 of the {len(found):,} ids that both have mean another token.",
        "22 ids are only in the teacher: 151,643 to 151,664",
    ]
    assert compare_vocabularies(model, teacher).endswith("22 ids are only in the model: 151,643 to 151,664")


def test_scattered_ids_and_odd_tokens_are_told_short() -> None:
    model = {number: f"t{number}" for number in range(40)}
    teacher = {number: f"t{number}" for number in range(40) if number % 4} | {1: " \n\t", 2: "x" * 500}
    told = str(difference(teacher, model)).splitlines()
    assert told == [
        "2 of the 30 ids that both have mean another token:",
        "  id: teacher's token / model's token",
        r"  1: ' \n\t' / 't1'",
        f"  2: {'x' * 40 + '...'!r} / 't2'",
        "10 ids are only in the model: 0; 4; 8; 12; 16; and 5 more runs",
    ]
    assert str(difference({0: "a"}, {0: "a", 2: "b"})).endswith("1 id is only in the model: 2")


def test_other_bytes_and_the_same_ids_are_told_as_such(tmp_path: Path) -> None:
    def other_rules(document: dict[str, Any]) -> None:
        document["model"]["merges"].pop()
        document["normalizer"] = {"type": "NFC"}

    model, teacher = folder(tmp_path / "model"), edited(tmp_path / "teacher", other_rules)
    told = compare_vocabularies(teacher, model)
    assert "ids mean the same tokens, but the files differ in model.merges, normalizer:" in told
    rewritten = edited(tmp_path / "rewritten", lambda document: None)
    assert "differ in how they are written" in compare_vocabularies(rewritten, model)


def test_no_tokenizer_is_loaded_for_it() -> None:
    tell = "import sys, distft.store.vocabulary; print({'torch', 'transformers', 'tokenizers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
