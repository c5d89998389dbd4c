"""A tokenizer's chat template: the text that it makes of a chat, and where in it the assistant's words are.

Where the template has {% generation %} markers, those words are exactly what stands between them. Where it has none, they are the
content of each assistant turn and, if the template writes the end-of-turn token right after it (white space between them included),
that token too, or the model would not learn to stop. They are nothing else that the template writes. Which token ends a turn is
learnt from the template itself, by rendering one exchange; the tokenizer's eos always counts.

How contents are found without markers: the chat is rendered twice, plainly and with private-use characters at the borders of each
content. The second rendering counts only when it equals the first but for those characters, so a position is proven, never searched
for, and content that looks like template text cannot mislead. A template that trims white space is met by marking inside it; one that
drops a part of the content (earlier thinking) by moving the opening mark until it survives. What cannot be proven is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from distft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
Message = dict[str, Any]
Span = tuple[int, int]
"""Characters [start, end)."""

TODAY = datetime(2024, 7, 26)
"""What `strftime_now` says to templates that write the date: the same row must be the same tokens on every day."""

BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What else an assistant's message may hold that a template writes out."""

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLANES = (0xF0000, 0x100000)  # supplementary private-use areas, 65,534 characters each
_PLANE_MARKS = {plane: re.compile(f"[{chr(plane)}-{chr(plane + 0xFFFD)}]") for plane in _PLANES}
_SUFFIX_TRIES = 64
_HELP = "Give the template {% generation %} markers around what the assistant writes, or change the message."


def _left(text: str) -> int:
    return len(text) - len(text.lstrip())


def _right(text: str) -> int:
    return len(text.rstrip())


_CUTS: tuple[Callable[[str], Span], ...] = (
    lambda text: (0, len(text)),
    lambda text: (_left(text), max(_left(text), _right(text))),
    lambda text: (_left(text), len(text)),
    lambda text: (0, _right(text)),
)
"""What templates keep of a content: all of it, or what is left after trimming both, the left or the right end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A rendered chat. `altered`: an assistant's content came out otherwise than it went in, white space at its ends aside.
    `unended`: a turn has no token that ends it."""

    text: str
    spans: tuple[Span, ...]
    altered: bool = False
    unended: bool = False


class ChatTemplate:
    """One template with its tokenizer's special tokens."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.template = _without_clock(template)
        self.special = dict(tokenizer.special_tokens_map)
        self.marked = bool(_MARKERS.search(template))
        self.turn_end = None if self.marked else self._turn_end(tokenizer)

    def chat(self, messages: list[Message], first: int, place: str) -> Chat:
        """The chat's text, and its spans: those of assistant turns from message `first` on. `place` is for errors."""
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [index for index in turns if index >= first]
        if not self.marked:
            _refuse_untraced(messages, turns, place)
        text, generated = self._render(messages, place)
        if not wanted:
            return Chat(text=text, spans=())
        if self.marked:
            return Chat(text=text, spans=_of_turns(generated, turns, wanted, place))
        contents = self._contents(messages, turns, text, place)
        spans: list[Span] = []
        altered = unended = False
        for index in wanted:
            start, end = contents[index]
            altered |= text[start:end].strip() != messages[index]["content"].strip()
            stop = self.turn_end.match(text, end) if self.turn_end else None
            unended |= stop is None
            spans.append((start, stop.end() if stop else end))
        return Chat(text=text, spans=tuple(spans), altered=altered, unended=unended)

    def contents(self, messages: list[Message], turns: list[int], text: str, place: str) -> dict[int, Span]:
        """Where the contents of these assistant turns are in `text`, what `chat` made of the messages."""
        return self._contents(messages, turns, text, place)

    def prompt(self, messages: list[Message], place: str) -> str:
        """The chat's text up to where the assistant is to speak."""
        return self._render(messages, place, prompt=True)[0]

    def _contents(self, messages: list[Message], turns: list[int], text: str, place: str) -> dict[int, Span]:
        """Where the contents of `turns` are in `text`, the plain rendering."""
        marks = _Marks(messages, place)
        for cut in _distinct([{index: cut(messages[index]["content"]) for index in turns} for cut in _CUTS]):
            found = self._trace(messages, cut, marks, text)
            spans = {index: span for index in turns if found and (span := found.span(index))}
            if len(spans) == len(turns):
                return spans
        return {index: self._content(messages, index, marks, text, place) for index in turns}

    def _content(self, messages: list[Message], index: int, marks: _Marks, text: str, place: str) -> Span:
        """Where one content is that is not written as the others are."""
        content: str = messages[index]["content"]
        for start, end in _distinct([cut(content) for cut in _CUTS]):
            found = self._trace(messages, {index: (start, end)}, marks, text)
            if found is None or index not in found.ends:
                continue
            span, close = found.span(index), found.ends[index]
            if span:
                return span
            # The opening mark is lost: the template took the content apart. Either it wrote all of it back...
            if text.endswith(content[:end], 0, close):
                return close - end, close
            # ...or only the end of it, which begins at the first place where a mark survives.
            kept = _common_suffix(content[:end], text[:close])
            for begin in range(end - kept, min(end, end - kept + _SUFFIX_TRIES)):
                found = self._trace(messages, {index: (begin, end)}, marks, text)
                span = found.span(index) if found else None
                if span:
                    return span
        problem = f"message {index + 1} (assistant) cannot be traced in what the chat template makes of it"
        raise DataError(problem, where=place, help=_HELP)

    def _trace(self, messages: list[Message], cuts: Mapping[int, Span], marks: _Marks, text: str) -> _Places | None:
        """Where marks at the cuts come out in `text`; None where they changed the rendering, which then proves nothing."""
        marked = list(messages)
        for index, (start, end) in cuts.items():
            marked[index] = {**messages[index], "content": marks.around(messages[index]["content"], index, start, end)}
        try:
            rendered, _ = self._render(marked, "")
        except DataError:
            return None
        return marks.places(rendered, text)

    def _render(self, messages: list[Message], place: str, *, prompt: bool = False) -> tuple[str, list[Span]]:
        """The chat as text, and what lies between {% generation %} markers; a prompt has none."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = self.marked and not prompt
        options: dict[str, Any] = {"return_assistant_tokens_mask": marked, "add_generation_prompt": prompt, **self.special}
        try:
            texts, spans = render_jinja_template([messages], chat_template=self.template, **options)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            help = "Correct the roles, their order or the contents; the template is the model's own."
            raise DataError(f"the chat template refuses the row: {error}", where=place, help=help) from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if marked else []

    def _turn_end(self, tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str] | None:
        """Matches what ends a turn, right after its content: the eos, or the added token that ends a trial answer."""
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()}
        ends = {str(tokenizer.eos_token)} if tokenizer.eos_token else set[str]()
        trial = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text, _ = self._render(trial, "")
            _, end = self._contents(trial, [1], text, "")[1]
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

    def span(self, index: int) -> Span | None:
        return (self.starts[index], self.ends[index]) if index in self.starts and index in self.ends else None


class _Marks:
    """Two characters per message that nothing in the chat uses."""

    def __init__(self, messages: list[Message], place: str) -> None:
        free = [p for p in _PLANES if not any(_PLANE_MARKS[p].search(message.get("content", "")) for message in messages)]
        if not free or 2 * len(messages) > 0xFFFD:
            problem = "the chat uses all private-use characters, or too many messages, to be traced"
            raise DataError(problem, where=place, help="Split the row, or remove these characters.")
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


def _without_clock(template: str) -> str:
    """The template with its clock stopped, where it reads one."""
    if "strftime_now" not in template:
        return template
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # The comment gives this text a compiled template of its own, whose clock stops without touching anyone else's.
    template += "{# distft stops the clock #}"
    _compile_jinja_template(template).environment.globals["strftime_now"] = TODAY.strftime
    return template


def _of_turns(generated: list[Span], turns: list[int], wanted: list[int], place: str) -> tuple[Span, ...]:
    """What is between markers, of the wanted turns."""
    if turns == wanted and generated:
        return tuple(generated)
    if len(generated) != len(turns):
        problem = f"the chat template marks {len(generated)} generations in a chat of {len(turns)} assistant turns"
        raise DataError(problem, where=place, help="Mark each turn with {% generation %} once, or remove the markers.")
    return tuple(span for turn, span in zip(turns, generated, strict=True) if turn in wanted)


def _refuse_untraced(messages: list[Message], turns: list[int], place: str) -> None:
    for index in turns:
        extra = [key for key in BESIDE_CONTENT if messages[index].get(key)]
        if extra:
            problem = (
                f"message {index + 1} (assistant) has {extra[0]!r}, and the chat template does not mark what it makes of that"
            )
            raise DataError(problem, where=place, help=_HELP)


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
