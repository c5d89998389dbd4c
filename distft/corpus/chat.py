"""One row to token ids and the mask of what is supervised.

The rules, for all formats:

- The tokens are those that the tokenizer makes of the whole document's text at once. For a chat they are exactly what
  `apply_chat_template` gives, so that training sees what serving will show.
- A token is supervised when it holds at least one character of a supervised span: one that straddles a span's border, as ` Hello`
  after a template's space does, must be produced whole for the content to appear.
- Token 0 is never supervised: nothing predicts it.

What the spans are:

- chat: the content of every assistant turn and, where the template writes the end-of-turn token right after it (white space between
  them included), that token too, or the model would not learn to stop. Nothing else that the template writes. Which token ends a turn
  is learnt from the template itself, by rendering one exchange; the tokenizer's eos always counts.
- chat, template with {% generation %} markers: exactly what is between the markers.
- prompt_completion of two strings: the completion and the eos after it. Of two lists of messages: as chat, the completion's turns.
- text: everything.

How contents are found in a rendering without markers: the chat is rendered twice, plainly and with private-use characters at the
borders of each content. The second rendering counts only when it equals the first but for those characters, so a position is proven,
never searched for, and content that looks like template text cannot mislead. A template that trims white space is met by marking
inside it; one that drops a part of the content (earlier thinking) by moving the opening mark until it survives. What cannot be
proven is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from distft.config.schema import Source
from distft.corpus.sources import Row
from distft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distft.store.model_folder import ModelFolder

T = TypeVar("T")
Message = dict[str, Any]
Span = tuple[int, int]
Cut = tuple[int, int]
"""Which part of a content lies between its marks."""

TODAY = datetime(2024, 7, 26)
"""What `strftime_now` says to templates that write the date: the same row must be the same tokens on every day."""

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLANES = (0xF0000, 0x100000)  # supplementary private-use areas, 65,534 characters each
_PLANE_MARKS = {plane: re.compile(f"[{chr(plane)}-{chr(plane + 0xFFFD)}]") for plane in _PLANES}
_SUFFIX_TRIES = 64
_UNTRACED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What else an assistant's message may hold that a template writes out."""

_CUTS: tuple[Callable[[str], Cut], ...] = (
    lambda text: (0, len(text)),
    lambda text: (len(text) - len(text.lstrip()), max(len(text.rstrip()), len(text) - len(text.lstrip()))),
    lambda text: (len(text) - len(text.lstrip()), len(text)),
    lambda text: (0, len(text.rstrip())),
)
"""What templates keep of a content: all of it, or what is left after trimming both, the left or the right end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A document. `altered`: the template wrote an assistant's content otherwise than the row has it, white space at its ends aside.
    `unended`: a supervised turn has no token that ends it."""

    tokens: npt.NDArray[np.uint32]
    supervised: npt.NDArray[np.bool_]
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
    except Exception as error:
        problem = f"the tokenizer cannot be loaded: {type(error).__name__}: {error}"
        raise ModelError(
            problem, where=where, help="The folder must hold tokenizer.json, and need no code of its own."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        problem = f"{type(tokenizer).__name__} is not a fast tokenizer, so its tokens cannot be traced to the text"
        raise ModelError(
            problem, where=where, help="Convert it once: AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
        )
    # Ids may have gaps, so the highest decides, not the count alone.
    needed = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if needed > model.vocabulary_rows():
        raise ModelError(
            f"the tokenizer has {needed} tokens and the model's vocabulary {model.vocabulary_rows()} rows",
            where=where,
            help="Tokenizer and model are not of one kind, or tokens were added without `resize_token_embeddings`.",
        )
    return tokenizer


class Renderer:
    """Rows of one source to documents, by one tokenizer, which it takes over."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: Source) -> None:
        self.tokenizer, self.source = tokenizer, source
        plain, framed = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
        adds_bos = tokenizer.bos_token_id is not None and framed[:1] == [tokenizer.bos_token_id] != plain[:1]
        self.bos = tokenizer.bos_token_id if adds_bos else None
        self.eos = tokenizer.eos_token_id
        self.special = dict(tokenizer.special_tokens_map)
        # Byte-level post-processors may trim spaces off the offsets, and it is the only thing left for them to do here.
        tokenizer.backend_tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        self.template = self._template()
        self.marked = bool(self.template and _MARKERS.search(self.template))
        self.turn_end = self._turn_end() if self.template and not self.marked else None

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
        supervised = np.zeros(len(tokens), np.bool_)
        for start, end in text.spans:
            supervised |= (starts < end) & (ends > start)
        if text.framed:
            if self.bos is not None and (not ids or ids[0] != self.bos):
                tokens, supervised = np.insert(tokens, 0, self.bos), np.insert(supervised, 0, False)
            if self.eos is not None and (not ids or ids[-1] != self.eos):
                tokens, supervised = np.append(tokens, np.uint32(self.eos)), np.append(supervised, True)
        supervised[:1] = False
        if not supervised.any():
            return Dropped(reason=text.nothing, prompt_tokens=None)
        prompt = int(supervised.argmax())
        if prompt >= max_tokens:
            return Dropped(reason=f"its prompt of {prompt} tokens fills data.max_tokens={max_tokens}", prompt_tokens=prompt)
        return Encoded(
            tokens=tokens[:max_tokens],
            supervised=supervised[:max_tokens],
            truncated=len(tokens) > max_tokens,
            altered=text.altered,
            unended=text.unended,
        )

    # From a row to its text

    def _text(self, row: Row) -> _Text:
        source = self.source
        if source.format == "text":
            text = _string(row.value[source.text], f"column {source.text!r}", row)
            return _Text(text=text, spans=((0, len(text)),), framed=True)
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
        text = prompt + _string(completion, f"column {source.completion!r}", row)
        return _Text(text=text, spans=((len(prompt), len(text)),), framed=True)

    def _chat(self, messages: list[Message], first: int, row: Row) -> _Text:
        """The chat's text; assistant turns before message `first` are not supervised."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [index for index in turns if index >= first]
        if not self.marked:
            _refuse_untraced(messages, turns, row)
        text, generated = self._render(messages, row)
        if not wanted:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages[first:]))
            return _Text(text=text, spans=(), nothing=f"no turn of the role assistant (roles: {roles})")
        if self.marked:
            return _Text(text=text, spans=self._between_markers(generated, turns, wanted, row))
        contents = self._contents(messages, turns, text, row)
        spans, altered, unended = [], False, False
        for index in wanted:
            start, end = contents[index]
            altered |= text[start:end].strip() != messages[index]["content"].strip()
            stop = self.turn_end.match(text, end) if self.turn_end else None
            unended |= stop is None
            spans.append((start, stop.end() if stop else end))
        return _Text(text=text, spans=tuple(spans), altered=altered, unended=unended)

    def _between_markers(self, generated: list[Span], turns: list[int], wanted: list[int], row: Row) -> tuple[Span, ...]:
        if turns == wanted and generated:
            return tuple(generated)
        if len(generated) != len(turns):
            problem = f"the chat template marks {len(generated)} generations in a chat of {len(turns)} assistant turns"
            raise DataError(problem, where=row.place, help="Mark each turn with {% generation %} once, or remove the markers.")
        return tuple(span for turn, span in zip(turns, generated, strict=True) if turn in wanted)

    # From messages to the places of their contents

    def _contents(self, messages: list[Message], turns: list[int], text: str, row: Row) -> dict[int, Span]:
        """Where the contents of `turns` are in `text`, the plain rendering."""
        marks = _Marks(messages, row)
        cuts = [{index: cut(messages[index]["content"]) for index in turns} for cut in _CUTS]
        for cut in _distinct(cuts):
            found = self._trace(messages, cut, marks, text, row)
            if found and all(index in found.starts and index in found.ends for index in turns):
                return {index: (found.starts[index], found.ends[index]) for index in turns}
        return {index: self._content(messages, index, marks, text, row) for index in turns}

    def _content(self, messages: list[Message], index: int, marks: _Marks, text: str, row: Row) -> Span:
        """Where one content is that is not written as the others are."""
        content: str = messages[index]["content"]
        for start, end in _distinct([cut(content) for cut in _CUTS]):
            found = self._trace(messages, {index: (start, end)}, marks, text, row)
            if found is None or index not in found.ends:
                continue
            close = found.ends[index]
            if index in found.starts:
                return found.starts[index], close
            # The opening mark is lost: the template took the content apart. Either it wrote all of it back...
            if text.endswith(content[:end], 0, close):
                return close - end, close
            # ...or only the end of it: the first place where a mark survives is where that begins.
            kept = _common_suffix(content[:end], text[:close])
            for begin in range(end - kept, min(end, end - kept + _SUFFIX_TRIES)):
                found = self._trace(messages, {index: (begin, end)}, marks, text, row)
                if found and index in found.starts and index in found.ends:
                    return found.starts[index], found.ends[index]
        raise DataError(
            f"message {index + 1} (assistant) cannot be traced in what the chat template makes of it",
            where=row.place,
            help="Give the template {% generation %} markers around what the assistant writes, or change the message.",
        )

    def _trace(self, messages: list[Message], cuts: Mapping[int, Cut], marks: _Marks, text: str, row: Row) -> _Places | None:
        """Where marks at the cuts come out in `text`; None where they changed the rendering, which then proves nothing."""
        marked = list(messages)
        for index, (start, end) in cuts.items():
            marked[index] = {**messages[index], "content": marks.around(messages[index]["content"], index, start, end)}
        try:
            rendered, _ = self._render(marked, row)
        except DataError:
            return None
        return marks.places(rendered, text)

    # The tokenizer's template

    def _template(self) -> str | None:
        if self.source.format == "text":
            return None
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError as error:
            if self.source.format == "prompt_completion":
                return None  # two strings need none
            raise ModelError(
                "the tokenizer has no chat template",
                where=self.tokenizer.name_or_path,
                help="Use the instruction-tuned model, add a chat_template.jinja to the folder, or set `format: prompt_completion`.",
            ) from error
        if "strftime_now" not in template:
            return template
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # The comment gives this text a compiled template of its own, whose clock can be stopped without touching others.
        template += "{# distft stops the clock #}"
        _compile_jinja_template(template).environment.globals["strftime_now"] = TODAY.strftime
        return template

    def _render(self, messages: list[Message], row: Row) -> tuple[str, list[Span]]:
        """The chat as text, and what lies between {% generation %} markers."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.template is None:
            raise ModelError(
                "messages need a chat template, and the tokenizer has none",
                where=self.tokenizer.name_or_path,
                help="Use the instruction-tuned model, add a chat_template.jinja to the folder, or give plain strings.",
            )
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                **self.special,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(
                f"the chat template refuses the row: {error}",
                where=row.place,
                help="Correct the roles, their order or the contents; the template is the model's own.",
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if self.marked else []

    def _turn_end(self) -> re.Pattern[str] | None:
        """Matches what ends a turn, right after its content: the eos, or the added token that ends a trial answer."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if not token.content.isspace()}
        ends = {self.tokenizer.eos_token} if self.tokenizer.eos_token else set()
        trial = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        row = Row("trial", 1, {})
        try:
            text, _ = self._render(trial, row)
            _, end = self._contents(trial, [1], text, row)[1]
        except DataError:  # a template that wants more than one exchange: its eos is all that is known
            pass
        else:
            found = _any_of(added).match(text, end) if added else None
            ends |= {found[1]} if found else set()
        return _any_of(ends) if ends else None


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the marks of messages came out; one that the template dropped is absent."""

    starts: dict[int, int]
    ends: dict[int, int]


class _Marks:
    """Two characters per message that nothing in the chat uses."""

    def __init__(self, messages: list[Message], row: Row) -> None:
        free = [p for p in _PLANES if not any(_PLANE_MARKS[p].search(message["content"]) for message in messages)]
        if not free or 2 * len(messages) > 0xFFFD:
            problem = "the chat uses all private-use characters, or too many messages, to be traced"
            raise DataError(problem, where=row.place, help="Split the row, or remove these characters.")
        self.plane = free[0]
        self.pattern = _PLANE_MARKS[self.plane]

    def around(self, content: str, index: int, start: int, end: int) -> str:
        opening, closing = chr(self.plane + 2 * index), chr(self.plane + 2 * index + 1)
        return f"{content[:start]}{opening}{content[start:end]}{closing}{content[end:]}"

    def places(self, marked: str, plain: str) -> _Places | None:
        """None unless `marked` is `plain` but for the marks, each there once at most and each pair in order."""
        if self.pattern.sub("", marked) != plain:
            return None
        found: dict[int, int] = {}
        for count, match in enumerate(self.pattern.finditer(marked)):
            mark = ord(match[0]) - self.plane
            if mark in found or (mark % 2 == 0 and mark + 1 in found):
                return None
            found[mark] = match.start() - count
        return _Places(
            {mark // 2: place for mark, place in found.items() if mark % 2 == 0},
            {mark // 2: place for mark, place in found.items() if mark % 2 == 1},
        )


def _messages(value: Any, what: str, row: Row) -> list[Message]:
    """Messages as templates expect them: role and content are strings; keys without a value, which Arrow adds, are left out."""
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list of messages, not {_kind(value)}", where=row.place)
    if not value:
        raise DataError(f"{what} is an empty list", where=row.place, help="Give at least one message, or remove the row.")
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataError(f"message {number} of {what} must be an object, not {_kind(message)}", where=row.place)
        kept = {key: inner for key, inner in message.items() if inner is not None}
        # An assistant that calls a tool may say nothing beside it; templates with markers can write that.
        silent = kept.get("role") == "assistant" and any(kept.get(key) for key in _UNTRACED) and "content" not in kept
        for key in ("role",) if silent else ("role", "content"):
            if key not in kept:
                has = ", ".join(map(repr, kept)) or "nothing"
                problem = f"message {number} of {what} has no {key!r}; it has {has}"
                raise DataError(problem, where=row.place, help="A message is {role: ..., content: ...}.")
            _string(kept[key], f"{key!r} of message {number}", row)
        messages.append(kept)
    return messages


def _refuse_untraced(messages: list[Message], turns: list[int], row: Row) -> None:
    for index in turns:
        extra = [key for key in _UNTRACED if messages[index].get(key)]
        if extra:
            raise DataError(
                f"message {index + 1} (assistant) has {extra[0]!r}, and the chat template does not mark what the assistant writes",
                where=row.place,
                help="Give the template {% generation %} markers, or put the text into the message's content.",
            )


def _string(value: Any, what: str, row: Row) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {_kind(value)}", where=row.place)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"{what} holds half a character (U+{ord(value[error.start]):04X})"
        raise DataError(
            problem, where=row.place, help="Text was cut inside an escaped pair; correct or remove the row."
        ) from error
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _common_suffix(left: str, right: str) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return length


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(rf"\s*({'|'.join(map(re.escape, longest_first))})")


def _distinct(items: list[T]) -> Iterator[T]:
    """Without repetitions, in order."""
    for index, item in enumerate(items):
        if item not in items[:index]:
            yield item
