"""prompt_completion and text, what is cut and dropped, and rows that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distft.corpus.chat import Encoded, Renderer
from distft.errors import DataError, DistftError, ModelError
from tests.helpers.models import MARKED_CHATML
from tests.unit.corpus.conftest import chat, drop, encode, row, show

Make = Callable[..., Renderer]


def test_a_completion_and_its_eos_are_supervised(renderer: Make) -> None:
    assert show(renderer("prompt_completion"), row(prompt="2+2=", completion="4")) == "2+2=⟦4<|im_end|>⟧"


def test_an_eos_that_is_there_is_not_doubled(renderer: Make) -> None:
    assert show(renderer("prompt_completion"), row(prompt="2+2=", completion="4<|im_end|>")) == "2+2=⟦4<|im_end|>⟧"


def test_no_eos_where_the_tokenizer_has_none(renderer: Make) -> None:
    assert show(renderer("prompt_completion", eos=None), row(prompt="2+2=", completion="4")) == "2+2=⟦4⟧"


def test_prompt_and_completion_are_one_text_to_the_tokenizer(renderer: Make) -> None:
    made = renderer("prompt_completion", vocabulary=384)
    document = encode(made, row(prompt="Say th", completion="e word"))
    assert document.tokens.tolist()[:-1] == made.tokenizer("Say the word", add_special_tokens=False)["input_ids"]
    assert show(made, row(prompt="Say th", completion="e word")) == "Say⟦ the word<|im_end|>⟧"  # " the" is one token


def test_a_bos_that_the_tokenizer_adds_is_added_once_and_never_supervised(renderer: Make) -> None:
    made = renderer("prompt_completion", adds_bos=True)
    assert show(made, row(prompt="a", completion="b")) == "<|bos|>a⟦b<|im_end|>⟧"
    assert show(made, row(prompt="<|bos|>a", completion="b")) == "<|bos|>a⟦b<|im_end|>⟧"
    assert show(made, row(prompt="", completion="b")) == "<|bos|>⟦b<|im_end|>⟧"


def test_without_a_prompt_or_bos_the_first_token_has_no_predictor(renderer: Make) -> None:
    assert show(renderer("prompt_completion"), row(prompt="", completion="abc")) == "a⟦bc<|im_end|>⟧"


@pytest.mark.parametrize("template", [None, MARKED_CHATML])
def test_lists_of_messages_supervise_the_completions_turns_alone(renderer: Make, template: str | None) -> None:
    made = renderer("prompt_completion", **({"template": template} if template else {}))
    given = row(
        prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        completion=[
            {"role": "assistant", "content": "d"},
            {"role": "user", "content": "e"},
            {"role": "assistant", "content": "f"},
        ],
    )
    shown = show(made, given)
    assert "assistant\nb<|im_end|>\n" in shown
    assert [run.split("⟧")[0] for run in shown.split("⟦")[1:]] == ["d<|im_end|>", "f<|im_end|>"]


def test_a_string_and_a_list_do_not_mix(renderer: Make) -> None:
    with pytest.raises(DataError, match="'prompt' is str and 'completion' is list"):
        encode(renderer("prompt_completion"), row(prompt="a", completion=[{"role": "assistant", "content": "b"}]))


def test_messages_without_a_template_are_refused_where_they_occur(renderer: Make) -> None:
    made = renderer("prompt_completion", template=None)
    assert show(made, row(prompt="a", completion="b")) == "a⟦b<|im_end|>⟧"
    message = [{"role": "user", "content": "a"}]
    with pytest.raises(ModelError, match="row 7 holds messages"):
        encode(made, row(prompt=message, completion=message))


def test_all_of_a_text_but_its_first_token_is_supervised(renderer: Make) -> None:
    assert show(renderer("text"), row(text="abc")) == "a⟦bc<|im_end|>⟧"
    assert show(renderer("text", adds_bos=True), row(text="abc")) == "<|bos|>⟦abc<|im_end|>⟧"
    assert show(renderer("text", template=None, eos=None), row(text="abc")) == "a⟦bc⟧"


@pytest.mark.parametrize(
    ("format", "given"),
    [("text", row(text="abc")), ("prompt_completion", row(prompt="", completion="abc")), ("chat", chat("a", "b"))],
)
def test_token_0_is_never_supervised(renderer: Make, format: str, given: Any) -> None:
    everything = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    made = renderer(format, template=everything) if format == "chat" else renderer(format)
    assert not encode(made, given if format != "chat" else chat("abc", "b")).supervised[0]


def test_a_long_document_loses_its_end(renderer: Make) -> None:
    made = renderer("prompt_completion")
    whole = encode(made, row(prompt="abc", completion="defgh"))
    cut = encode(made, row(prompt="abc", completion="defgh"), max_tokens=5)
    assert (whole.truncated, cut.truncated) == (False, True)
    np.testing.assert_array_equal(cut.tokens, whole.tokens[:5])
    np.testing.assert_array_equal(cut.supervised, whole.supervised[:5])
    assert not encode(made, row(prompt="abc", completion="defgh"), max_tokens=9).truncated


def test_a_document_cut_before_its_first_supervised_token_is_dropped(renderer: Make) -> None:
    made = renderer("prompt_completion")
    assert encode(made, row(prompt="abc", completion="d"), max_tokens=4).supervised.sum() == 1
    dropped = drop(made, row(prompt="abc", completion="d"), max_tokens=3)
    assert (dropped.reason, dropped.prompt_tokens) == ("its prompt of 3 tokens fills data.max_tokens=3", 3)


def test_a_document_of_one_token_is_dropped(renderer: Make) -> None:
    assert drop(renderer("text"), row(text="")).reason == "no supervised token"
    assert drop(renderer("text", eos=None), row(text="a")).reason == "no supervised token"


def test_documents_do_not_depend_on_their_neighbours(renderer: Make) -> None:
    made = renderer("chat", vocabulary=384)
    given = [chat("a", "the user"), chat("longer question than the other", ""), chat("é", "😀")]
    together = made.encode(given, 100)
    for one, several in zip(given, together, strict=True):
        alone = encode(made, one)
        assert isinstance(several, Encoded)
        np.testing.assert_array_equal(alone.tokens, several.tokens)
        np.testing.assert_array_equal(alone.supervised, several.supervised)
    assert made.encode([], 100) == []


MESSAGE = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("format", "given", "told"),
    [
        ("chat", row(messages="hello"), "column 'messages' must be a list of messages, not str"),
        ("chat", row(messages=None), "not null"),
        ("chat", row(messages=[]), "is an empty list"),
        ("chat", row(messages=["hello"]), "message 1 of column 'messages' must be an object, not str"),
        ("chat", row(messages=[MESSAGE, {"from": "gpt", "value": "x"}]), "message 2 of .* has no 'role'; it has 'from', 'value'"),
        ("chat", row(messages=[{"role": "assistant", "content": None}]), "has no 'content'"),
        ("chat", row(messages=[{"role": "user", "content": [{"type": "text"}]}]), "'content' of message 1 must be a string, not list"),
        ("chat", row(messages=[{"role": 3, "content": "a"}]), "'role' of message 1 must be a string, not int"),
        ("chat", chat("a\ud800", "b"), r"half a character \(U\+D800\)"),
        ("prompt_completion", row(prompt="a", completion=3), "column 'completion' must be a string, not int"),
        ("prompt_completion", row(prompt=None, completion="b"), "column 'prompt' must be a string, not null"),
        ("text", row(text=["a"]), "column 'text' must be a string, not list"),
    ],
)  # fmt: skip
def test_a_row_of_the_wrong_type_is_refused_with_its_place(renderer: Make, format: str, given: Any, told: str) -> None:
    with pytest.raises(DistftError, match=told) as error:
        encode(renderer(format), given)
    assert isinstance(error.value, DataError)
    assert error.value.where == "some/folder/train.jsonl, row 7"
