"""Batched answers are those that each prompt would get alone, and end where an answer ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.corpus.chat import load_tokenizer
from distft.engine.load import load_model
from distft.errors import DataError, ModelError
from distft.evaluate.generate import answers, render_prompts, stop_tokens
from distft.store.model_folder import resolve_model
from tests.helpers.models import tiny_model_folder

CHATS = [[{"role": "user", "content": text}] for text in ("Hi", "What is the capital of France?", "Add two and three. " * 4, "")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    folder = resolve_model(str(tiny_model_folder(tmp_path_factory.mktemp("m") / "m", hidden=32, initializer_range=0.5)), None)
    model = load_model(folder, dtype="float32", attention="sdpa", head_rows=300, device=torch.device("cpu"))
    return folder, model.whole, load_tokenizer(folder)


def alone(whole: Any, tokenizer: Any, chat: list[dict[str, Any]], *, stops: list[int], length: int) -> list[int]:
    """The slow way: one token at a time, no cache, no padding."""
    [tokens] = render_prompts(tokenizer, [chat])
    said: list[int] = []
    with torch.no_grad():
        while len(said) < length and not (said and said[-1] in stops):
            said.append(int(whole(input_ids=torch.tensor([tokens + said]), use_cache=False).logits[0, -1].argmax()))
    return said


def text(tokenizer: Any, said: list[int]) -> str:
    return tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
def test_batches_change_no_answer(made: tuple[Any, Any, Any], tokens_per_batch: int) -> None:
    _, whole, tokenizer = made
    expected = [text(tokenizer, alone(whole, tokenizer, chat, stops=[4], length=12)) for chat in CHATS]
    assert answers(whole, tokenizer, CHATS, stops=[4], max_new_tokens=12, tokens_per_batch=tokens_per_batch) == expected
    assert len(set(expected)) > 1, "a model that always says the same proves nothing"


def test_an_answer_ends_at_any_of_its_stops(made: tuple[Any, Any, Any]) -> None:
    _, whole, tokenizer = made
    free = alone(whole, tokenizer, CHATS[1], stops=[], length=12)
    stops = [4, free[3]]
    cut = alone(whole, tokenizer, CHATS[1], stops=stops, length=12)
    assert cut == free[: len(cut)]
    assert len(cut) <= 4
    assert answers(whole, tokenizer, [CHATS[1]], stops=stops, max_new_tokens=12, tokens_per_batch=999) == [text(tokenizer, cut)]


def test_the_models_own_settings_of_generation_do_not_count(made: tuple[Any, Any, Any]) -> None:
    _, whole, tokenizer = made
    plain = answers(whole, tokenizer, CHATS, stops=[4], max_new_tokens=8, tokens_per_batch=999)
    whole.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_new_tokens=1, num_beams=2)
    assert answers(whole, tokenizer, CHATS, stops=[4], max_new_tokens=8, tokens_per_batch=999) == plain


def test_where_answers_end(made: tuple[Any, Any, Any], tmp_path: Path) -> None:
    _, _, tokenizer = made
    folder = resolve_model(str(tiny_model_folder(tmp_path / "m", hidden=32)), None)
    path = folder.path / "generation_config.json"
    eos = tokenizer.eos_token_id
    for named, ends in (([1, 2], {1, 2, eos}), (1, {1, eos}), (None, {eos}), (eos, {eos})):
        path.write_text(json.dumps({"eos_token_id": named}))
        assert stop_tokens(folder, tokenizer) == sorted(ends)
    path.unlink()
    assert stop_tokens(folder, tokenizer) == [eos]


def test_a_tokenizer_without_a_template(made: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, tokenizer = made
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="no chat template"):
        render_prompts(tokenizer, CHATS[:1])


def test_a_template_that_refuses(made: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, tokenizer = made
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.raises(DataError, match="no such role"):
        render_prompts(tokenizer, CHATS[:1])


def test_the_day_changes_no_prompt(made: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that writes the date must not make two days' figures differ; the corpus stops the same clock."""
    _, _, tokenizer = made
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%Y-%m-%d') }}: {{ messages[0].content }}")
    [tokens] = render_prompts(tokenizer, [[{"role": "user", "content": "x"}]])
    assert tokens == tokenizer("2024-07-26: x", add_special_tokens=False)["input_ids"]
