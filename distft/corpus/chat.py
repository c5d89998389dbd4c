"""One row to token ids and the mask of what is supervised.

The rules, for all formats:

- The tokens are those that the tokenizer makes of the whole document's text at once. For a chat they are exactly what
  `apply_chat_template` gives, so that training sees what serving will show.
- A token is supervised when it holds at least one character of a supervised span: one that straddles a span's border, as ` Hello`
  after a template's space does, must be produced whole for the content to appear.
- Token 0 is never supervised: nothing predicts it.

What the spans are:

- chat: what the assistant says in every turn, and the token that ends the turn (template.py has the exact rule).
- prompt_completion of two strings: the completion, and the eos, which is added where it is not there. Of two lists of messages: as
  chat, in the completion's turns.
- text: everything, and the eos, which is added where it is not there.

Anchors (anchors.py) mark supervised tokens by the same rule.

A bos is added to strings when the tokenizer does so by default; chat templates write their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distft.config.schema import Source
from distft.corpus.files import Row
from distft.corpus.marks import Mark, check_learnable, marks_in_chat, marks_in_text, touched
from distft.corpus.template import BESIDE_CONTENT, ChatTemplate, Message, Span
from distft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distft.store.model_folder import ModelFolder


_MEND = "Correct or remove the row, or change the source's `format`."


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A document. `altered` and `unended` are a chat's (template.py)."""

    tokens: npt.NDArray[np.uint32]
    supervised: npt.NDArray[np.bool_]
    anchored: npt.NDArray[np.bool_]
    truncated: bool
    altered: bool
    unended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A row that is no document, and why. `prompt_tokens`: what stands before its first supervised token, if it has one."""

    reason: str
    prompt_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """A document before tokenising; spans count characters. `framed`: bos and eos are still to be added."""

    text: str
    spans: tuple[Span, ...]
    marks: tuple[Mark, ...] = ()
    framed: bool = False
    altered: bool = False
    unended: bool = False
    nothing: str = "no supervised token"


def load_tokenizer(model: ModelFolder) -> PreTrainedTokenizerFast:
    """The model's tokenizer, from its folder alone and running none of its code. It must know offsets, and fit the output head."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where = str(model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a folder's files make transformers raise, the user's way out is the same
        problem = f"the tokenizer cannot be loaded: {type(error).__name__}: {error}"
        help = "The folder must hold tokenizer.json, and need no code of its own."
        raise ModelError(problem, where=where, help=help) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        problem = f"{type(tokenizer).__name__} is not a fast tokenizer, so its tokens cannot be traced to the text"
        help = "Convert it to one with a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(folder))."
        raise ModelError(problem, where=where, help=help)
    # Ids may have gaps, so the highest decides, not the count alone.
    needed = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if needed > model.vocabulary_rows():
        problem = f"the tokenizer has {needed} tokens, the model's vocabulary {model.vocabulary_rows()} rows"
        help = "They are not of one kind, or tokens were added to the tokenizer without `resize_token_embeddings`."
        raise ModelError(problem, where=where, help=help)
    return tokenizer


class Renderer:
    """Rows of one source to documents, by one tokenizer, which it takes over."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: Source) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.bos: int | None = _default_bos(tokenizer)
        self.eos: int | None = None if tokenizer.eos_token_id is None else _id(tokenizer.eos_token_id)
        self.template = None if source.format == "text" else chat_template(tokenizer)
        if source.format == "chat" and self.template is None:
            raise self._no_template("format: chat needs a chat template")
        # Byte-level post-processors may trim spaces off the offsets, and adding special tokens is done here.
        tokenizer.backend_tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]

    def encode(self, rows: Sequence[Row], max_tokens: int) -> list[Encoded | Dropped]:
        """A document per row, in order, or why there is none. Longer ones lose what is beyond `max_tokens`."""
        texts = [self._text(row) for row in rows]
        if not texts:
            return []
        batch = self.tokenizer(
            [text.text for text in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        columns = zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
        return [self._document(text, ids, offsets, max_tokens) for text, ids, offsets in columns]

    def _document(self, text: _Text, ids: list[int], offsets: list[Span], max_tokens: int) -> Encoded | Dropped:
        tokens = np.array(ids, np.uint32)
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        if text.framed:  # what is added holds no character
            if self.bos is not None and ids[:1] != [self.bos]:
                tokens, starts, ends = np.insert(tokens, 0, self.bos), np.insert(starts, 0, 0), np.insert(ends, 0, 0)
            added = self.eos is not None and ids[-1:] != [self.eos]
            if added:
                tokens, starts, ends = np.append(tokens, np.uint32(self.eos or 0)), np.append(starts, 0), np.append(ends, 0)
        else:
            added = False
        supervised = np.zeros(len(tokens), np.bool_)
        for start, end in text.spans:
            supervised |= touched(starts, ends, (start, end))
        supervised[len(tokens) - added :] = True
        supervised[:1] = False
        anchored = np.zeros(len(tokens), np.bool_)
        for mark in text.marks:
            mask = touched(starts, ends, mark.span)
            mask[len(tokens) - added :] |= mark.ends
            check_learnable(mark.anchor, mask, supervised, max_tokens)
            anchored |= mask & supervised
        if not supervised.any():
            return Dropped(reason=text.nothing, prompt_tokens=None)
        prompt = int(supervised.argmax())
        if prompt >= max_tokens:
            return Dropped(reason=f"its prompt of {prompt} tokens fills data.max_tokens={max_tokens}", prompt_tokens=prompt)
        return Encoded(
            tokens=tokens[:max_tokens],
            supervised=supervised[:max_tokens],
            anchored=anchored[:max_tokens],
            truncated=len(tokens) > max_tokens,
            altered=text.altered,
            unended=text.unended,
        )

    def _text(self, row: Row) -> _Text:
        source = self.source
        if source.format == "text":
            text = _string(row.value[source.text], f"column {source.text!r}", row)
            return _Text(text=text, spans=((0, len(text)),), marks=marks_in_text(row, text), framed=True)
        if source.format == "chat":
            return self._chat(_messages(row.value[source.messages], f"column {source.messages!r}", row), 0, row)
        prompt, completion = row.value[source.prompt], row.value[source.completion]
        if isinstance(prompt, list) and isinstance(completion, list):
            before = _messages(prompt, f"column {source.prompt!r}", row)
            return self._chat([*before, *_messages(completion, f"column {source.completion!r}", row)], len(before), row)
        if isinstance(prompt, list) or isinstance(completion, list):
            problem = f"{source.prompt!r} is {_kind(prompt)} and {source.completion!r} is {_kind(completion)}"
            raise DataError(problem, where=row.place, help="Give two strings, or two lists of messages.")
        prompt = _string(prompt, f"column {source.prompt!r}", row)
        completion = _string(completion, f"column {source.completion!r}", row)
        text = prompt + completion
        marks = marks_in_text(row, completion, before=len(prompt))
        return _Text(text=text, spans=((len(prompt), len(text)),), marks=marks, framed=True)

    def _chat(self, messages: list[Message], first: int, row: Row) -> _Text:
        """The chat's text; assistant turns before message `first` are not supervised."""
        if self.template is None:
            raise self._no_template(f"{row.place} holds messages, and they need a chat template")
        chat = self.template.chat(messages, first, row.place)
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages[first:]))
        nothing = "no supervised token" if chat.spans else f"no turn of the role assistant (roles: {roles})"
        marks = marks_in_chat(row, messages, first, chat, self.template)
        return _Text(
            text=chat.text, spans=chat.spans, marks=marks, altered=chat.altered, unended=chat.unended, nothing=nothing
        )  # fmt: skip

    def _no_template(self, problem: str) -> ModelError:
        return ModelError(
            f"{problem}, and the tokenizer has none",
            where=self.tokenizer.name_or_path,
            help="Use the instruction-tuned model, add a chat_template.jinja to its folder, or give strings (`prompt_completion`).",
        )


def _default_bos(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The bos, if the tokenizer puts one before a text unasked."""
    if tokenizer.bos_token_id is None:
        return None
    bos = _id(tokenizer.bos_token_id)
    plain, framed = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    return bos if framed[:1] == [bos] != plain[:1] else None


def chat_template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | None:
    """The template that the tokenizer uses when none is asked for by name; None where it has none."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # it has none
        return None
    return ChatTemplate(template, tokenizer)


def _messages(value: Any, what: str, row: Row) -> list[Message]:
    """Messages as templates expect them: role and content are strings; keys without a value, which Arrow adds, are left out."""
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list of messages, not {_kind(value)}", where=row.place, help=_MEND)
    if not value:
        raise DataError(f"{what} is an empty list", where=row.place, help="Give at least one message, or remove the row.")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataError(f"message {number} of {what} must be an object, not {_kind(message)}", where=row.place, help=_MEND)
        kept = {key: inner for key, inner in message.items() if inner is not None}
        # An assistant that calls a tool may say nothing beside it; templates with markers can write that.
        silent = kept.get("role") == "assistant" and any(kept.get(key) for key in BESIDE_CONTENT) and "content" not in kept
        for key in ("role",) if silent else ("role", "content"):
            if key not in kept:
                has = ", ".join(map(repr, kept)) or "nothing"
                problem = f"message {number} of {what} has no {key!r}; it has {has}"
                raise DataError(problem, where=row.place, help="A message is {role: ..., content: ...}.")
            _string(kept[key], f"{key!r} of message {number}", row)
        messages.append(kept)
    return messages


def _string(value: Any, what: str, row: Row) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {_kind(value)}", where=row.place, help=_MEND)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"{what} holds half a character (U+{ord(value[error.start]):04X})"
        help = "Text was cut inside an escaped pair; correct or remove the row."
        raise DataError(problem, where=row.place, help=help) from error
    return value


def _id(token: Any) -> int:
    assert isinstance(token, int), f"a special token has the id {token!r}"
    return token


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
