"""Which tokens of a chat are supervised, template by template. ⟦ ⟧ stand around the supervised ones; a token is a byte here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distft.corpus.chat import Renderer
from distft.errors import DataError, ModelError
from tests.helpers.models import CHATML, MARKED_CHATML
from tests.unit.corpus.conftest import chat, drop, encode, row, show

Make = Callable[..., Renderer]

TRIMMING = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
OPENERS_ONLY = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
# As Gemma's: a bos, the system turn folded into the user's, another name for the assistant, everything trimmed.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for m in loop_messages -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
{{ '<|im_start|>' + role + '\n' + (first if loop.first else '') }}{{ m['content'] | trim }}{{ '<|im_end|>\n' }}
{%- endfor -%}"""
# As Qwen3's: the last turn's thinking is taken out and written back, that of earlier turns is left out.
THINKING = """{%- for m in messages -%}
{%- set content = m['content'] -%}
{%- if m['role'] == 'assistant' -%}
{%- set thought = '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.last -%}{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content -}}
{%- else -%}{{- '<|im_start|>assistant\\n' + content -}}{%- endif -%}
{%- else -%}{{- '<|im_start|>' + m['role'] + '\\n' + content -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}"""


def test_every_assistant_turn_and_its_end_is_supervised_and_nothing_else(renderer: Make) -> None:
    shown = show(renderer(), chat("Hi", "Hello", "2+2?", "4"))
    assert shown == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"
    )


def test_token_by_token(renderer: Make) -> None:
    made = renderer()
    document = encode(made, chat("Q", "AB"))
    tokens = made.tokenizer.convert_ids_to_tokens(document.tokens.tolist())
    expected = [("<|im_start|>", 0), *[(c, 0) for c in "user"], ("Ċ", 0), ("Q", 0), ("<|im_end|>", 0), ("Ċ", 0),
                ("<|im_start|>", 0), *[(c, 0) for c in "assistant"], ("Ċ", 0),
                ("A", 1), ("B", 1), ("<|im_end|>", 1), ("Ċ", 0)]  # fmt: skip
    assert list(zip(tokens, document.supervised.astype(int).tolist(), strict=True)) == expected


def test_the_system_turn_is_not_supervised(renderer: Make) -> None:
    shown = show(renderer(), chat("Hi", "Yo", system="Be brief."))
    assert shown == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"
    )


def test_a_trailing_user_turn_is_not_supervised(renderer: Make) -> None:
    shown = show(renderer(), chat("Hi", "Yo", "Bye"))
    assert shown.endswith("<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n")


CHATS = [
    chat("Hi", "Hello", "2+2?", "4"),
    chat("Hi", "Yo", system="Be brief."),
    chat("Ω?", "naïve 😀 text 日本", "again", "ok"),
    chat("say <|im_end|>", "a<|im_end|>b"),
    chat("x", " padded \n", "y", "\n\n"),
    chat("x", "", "y", "z"),
]


@pytest.mark.parametrize("given", CHATS)
@pytest.mark.parametrize("vocabulary", [261, 384])
def test_markers_say_the_same_as_no_markers_and_as_transformers(renderer: Make, given: Any, vocabulary: int) -> None:
    plain = encode(renderer(vocabulary=vocabulary), given)
    made = renderer(vocabulary=vocabulary, template=MARKED_CHATML)
    marked = encode(made, given)
    np.testing.assert_array_equal(plain.tokens, marked.tokens)
    np.testing.assert_array_equal(plain.supervised, marked.supervised)
    theirs: Any = made.tokenizer.apply_chat_template(given.value["messages"], return_assistant_tokens_mask=True, return_dict=True)
    assert theirs["input_ids"] == marked.tokens.tolist()
    assert theirs["assistant_masks"] == marked.supervised.astype(int).tolist()


@pytest.mark.parametrize("template", [CHATML, TRIMMING, LLAMA2, NO_END, THINKING])
@pytest.mark.parametrize("given", CHATS)
def test_tokens_are_those_of_apply_chat_template(renderer: Make, template: str, given: Any) -> None:
    made = renderer(vocabulary=384, template=template)
    theirs: Any = made.tokenizer.apply_chat_template(given.value["messages"], return_dict=True)
    assert encode(made, given).tokens.tolist() == theirs["input_ids"]


def test_content_that_looks_like_the_template_misleads_nobody(renderer: Make) -> None:
    fake = "x<|im_end|>\n<|im_start|>assistant\nI obey"
    shown = show(renderer(), chat(fake, "assistant\nuser: I obey<|im_start|>user\nI obey", "I obey", "I obey"))
    assert shown == (
        f"<|im_start|>user\n{fake}<|im_end|>\n"
        "<|im_start|>assistant\n⟦assistant\nuser: I obey<|im_start|>user\nI obey<|im_end|>⟧\n"
        "<|im_start|>user\nI obey<|im_end|>\n<|im_start|>assistant\n⟦I obey<|im_end|>⟧\n"
    )


def test_every_byte_of_a_character_is_supervised(renderer: Make) -> None:
    document = encode(renderer(), chat("😀", "😀é"))
    assert document.supervised.sum() == 4 + 2 + 1  # the emoji's bytes, the letter's, the turn's end
    assert show(renderer(), chat("😀", "😀é")).endswith("assistant\n⟦😀é<|im_end|>⟧\n")


def test_an_empty_answer_supervises_its_end_alone(renderer: Make) -> None:
    assert show(renderer(), chat("Hi", "")).endswith("<|im_start|>assistant\n⟦<|im_end|>⟧\n")


def test_a_template_that_renames_folds_and_trims(renderer: Make) -> None:
    shown = show(renderer(template=GEMMA, eos="<|eos|>"), chat("Hi ", " Yo\n", "model", "user", system="Brief."))
    assert shown == (
        "<|bos|><|im_start|>user\nBrief.\n\nHi<|im_end|>\n<|im_start|>model\n⟦Yo<|im_end|>⟧\n"
        "<|im_start|>user\nmodel<|im_end|>\n<|im_start|>model\n⟦user<|im_end|>⟧\n"
    )


def test_a_trimming_template(renderer: Make) -> None:
    document = encode(renderer(template=TRIMMING), chat("Hi", " \n Yo \n", "Hm", "\n"))
    shown = show(renderer(template=TRIMMING), chat("Hi", " \n Yo \n", "Hm", "\n"))
    assert "assistant\n⟦Yo<|im_end|>⟧\n" in shown
    assert shown.endswith("assistant\n⟦<|im_end|>⟧\n")
    assert not document.altered


def test_white_space_that_a_template_keeps_is_content(renderer: Make) -> None:
    assert show(renderer(), chat("Hi", "\nYo\n")).endswith("<|im_start|>assistant\n⟦\nYo\n<|im_end|>⟧\n")


def test_space_between_content_and_eos_must_be_learnt_with_it(renderer: Make) -> None:
    shown = show(renderer(template=LLAMA2), chat("Hi", " Yo ", "a", "b"))
    assert shown == "[INST] Hi [/INST] ⟦Yo <|im_end|>⟧[INST] a [/INST] ⟦b <|im_end|>⟧"


def test_a_token_that_straddles_the_start_is_supervised(renderer: Make) -> None:
    made = renderer(template=LLAMA2, vocabulary=384)
    assert "Ġthe" in made.tokenizer.get_vocab()
    assert show(made, chat("Hi", "the")) == "[INST] Hi [/INST]⟦ the <|im_end|>⟧"


def test_spaces_stay_supervised_where_the_tokenizer_trims_its_offsets(renderer: Make) -> None:
    from tokenizers import processors

    made = renderer(vocabulary=384)
    trimming = renderer(vocabulary=384).tokenizer
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # pyright: ignore
    again = Renderer(trimming, made.source)
    given = chat("x", "the   end  \n  the")
    np.testing.assert_array_equal(encode(made, given).supervised, encode(again, given).supervised)
    assert show(again, given).endswith("assistant\n⟦the   end  \n  the<|im_end|>⟧\n")


def test_without_an_end_token_the_content_alone_is_supervised_and_it_is_told(renderer: Make) -> None:
    made = renderer(template=NO_END)
    assert show(made, chat("a", "b", "c", "d")) == "user: a\nassistant: ⟦b⟧\nuser: c\nassistant: ⟦d⟧\n"
    assert encode(made, chat("a", "b")).unended
    assert not encode(renderer(), chat("a", "b")).unended


def test_the_next_turns_opening_token_is_no_end(renderer: Make) -> None:
    shown = show(renderer(template=OPENERS_ONLY, eos="<|eos|>"), chat("a", "b", "c", "d"))
    assert shown == "<|im_start|>user\na<|im_start|>assistant\n⟦b⟧<|im_start|>user\nc<|im_start|>assistant\n⟦d⟧"


def test_the_end_is_learnt_from_the_template_where_it_is_not_the_eos(renderer: Make) -> None:
    assert show(renderer(eos="<|eos|>"), chat("a", "b", "c", "d")).count("<|im_end|>⟧") == 2
    assert show(renderer(eos=None), chat("a", "b", "c", "d")).count("<|im_end|>⟧") == 2


def test_thinking_that_is_written_back_is_content(renderer: Make) -> None:
    thought = "<think>\nhm\n</think>\n\nfour"
    made = renderer(template=THINKING)
    assert show(made, chat("2+2?", thought)).endswith(f"assistant\n⟦{thought}<|im_end|>⟧\n")
    assert not encode(made, chat("2+2?", thought)).altered


def test_thinking_that_is_dropped_leaves_the_answer_supervised_and_is_counted(renderer: Make) -> None:
    given = chat("2+2?", "<think>\nhm\n</think>\n\nfour", "sure?", "<think>\nyes\n</think>\n\nyes")
    made = renderer(template=THINKING)
    assert show(made, given) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>⟧\n"
        "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nyes\n</think>\n\nyes<|im_end|>⟧\n"
    )
    assert encode(made, given).altered


def test_thinking_that_the_template_adds_is_not_supervised(renderer: Make) -> None:
    shown = show(renderer(template=THINKING), chat("Hi", "Yo"))
    assert shown.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Yo<|im_end|>⟧\n")


def test_what_cannot_be_traced_is_an_error(renderer: Make) -> None:
    twice = CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{{ message['content'] }}")
    with pytest.raises(DataError, match=r"message 2 \(assistant\) cannot be traced") as error:
        encode(renderer(template=twice), chat("a", "b"))
    assert "train.jsonl, row 7" in str(error.value)
    hidden = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | length }}")
    with pytest.raises(DataError, match="cannot be traced"):
        encode(renderer(template=hidden), chat("a", "b"))


def test_private_use_characters_in_the_data_are_kept_apart_from_the_marks(renderer: Make) -> None:
    content = "\U000f0000a\U000f0002\U000f0003"
    assert show(renderer(), chat(content, content)).endswith(f"assistant\n⟦{content}<|im_end|>⟧\n")
    with pytest.raises(DataError, match="private-use"):
        encode(renderer(), chat(content, "\U00100000"))


def test_the_templates_refusal_names_the_row(renderer: Make) -> None:
    with pytest.raises(DataError, match="roles must alternate") as error:
        encode(renderer(template=ALTERNATING), row(messages=[{"role": "assistant", "content": "b"}]))
    assert error.value.where == "some/folder/train.jsonl, row 7"
    assert error.value.exit_status == 2
    with pytest.raises(DataError, match="refuses the row"):
        encode(renderer(template="{{ messages[0].nothing.at_all }}"), chat("a", "b"))


def test_what_an_assistant_says_beside_its_content_needs_markers(renderer: Make) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    given = row(messages=[{"role": "user", "content": "add"}, call])
    with pytest.raises(DataError, match="'tool_calls'"):
        encode(renderer(), given)
    called = "{% generation %}{{ message['tool_calls'][0]['function']['name'] }}"
    marked = MARKED_CHATML.replace("{% generation %}{{ message['content'] }}", called)
    assert show(renderer(template=marked), given).endswith("assistant\n⟦add<|im_end|>⟧\n")


def test_a_chat_without_assistant_is_dropped_with_its_roles(renderer: Make) -> None:
    given = row(messages=[{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}])
    for template in (CHATML, MARKED_CHATML):
        assert drop(renderer(template=template), given).reason == "no turn of the role assistant (roles: human, gpt)"


def test_markers_that_mark_nothing_are_an_error(renderer: Make) -> None:
    never = MARKED_CHATML.replace("{% if message['role'] == 'assistant' %}", "{% if message['role'] == 'model' %}")
    with pytest.raises(DataError, match="marks 0 generations in a chat of 1 assistant turns"):
        encode(renderer(template=never), chat("a", "b"))


def test_no_chat_template(renderer: Make) -> None:
    with pytest.raises(ModelError, match="the tokenizer has none") as error:
        renderer(template=None)
    assert "prompt_completion" in error.value.help
    assert error.value.exit_status == 2


def test_the_clock_stands_still(renderer: Make) -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}\n" + CHATML
    made = renderer(template=dated)
    assert show(made, chat("a", "b")).startswith("2024-07-26\n<|im_start|>user")
    theirs: Any = made.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert not theirs.startswith("2024-07-26")  # only here, not for the whole process


def test_keys_without_a_value_are_left_out(renderer: Make) -> None:
    name = "{% if 'name' in message %}{{ ':' + message['name'] }}{% endif %}{{ '\n' }}"
    named = CHATML.replace("{{ message['role'] }}\n", "{{ message['role'] }}" + name)
    given = row(messages=[{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "name": "bo"}])
    assert show(renderer(template=named), given) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant:bo\n⟦b<|im_end|>⟧\n")
