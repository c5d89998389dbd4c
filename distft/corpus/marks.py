"""Anchors as characters of a document's text, and as tokens: between what somebody marked in a message and what is learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distft.corpus.anchors import Anchor, AnnotatedRow, Span
from distft.corpus.files import Row
from distft.corpus.template import Chat, ChatTemplate, Message
from distft.errors import DataError


@dataclass(frozen=True, slots=True)
class Mark:
    """An anchor's characters in the document's text. `ends`: with the eos that is still to be added."""

    anchor: Anchor
    span: Span
    ends: bool


def marks_in_chat(row: Row, messages: list[Message], first: int, chat: Chat, template: ChatTemplate) -> tuple[Mark, ...]:
    """The row's anchors in the chat that the template made; they count messages from message `first` on."""
    anchors = _anchors(row)
    turns = [_turn(anchor, messages, first) for anchor in anchors]
    if not turns:
        return ()
    try:
        contents = template.contents(messages, sorted(set(turns)), chat.text, row.place)
    except DataError as error:
        raise anchors[0].refused(f"cannot be traced: {error.problem}", error.help) from error
    marks = []
    for anchor, turn in zip(anchors, turns, strict=True):
        begin, end = contents[turn]
        start, stop = anchor.carried(messages[turn]["content"], chat.text[begin:end])
        if anchor.end is None:  # with the token that ends the turn, which is supervised with it
            stop = max((to for since, to in chat.spans if since < end <= to), default=end) - begin
        marks.append(Mark(anchor, (begin + start, begin + stop), ends=False))
    return tuple(marks)


def _anchors(row: Row) -> tuple[Anchor, ...]:
    return row.anchors if isinstance(row, AnnotatedRow) else ()


def marks_in_text(row: Row, content: str, *, before: int = 0) -> tuple[Mark, ...]:
    """The row's anchors in a text that has `before` characters before the content."""
    marks = []
    for anchor in _anchors(row):
        if anchor.message is not None:
            raise anchor.refused(f"is in message {anchor.message}, and the row has no messages", "Leave `message` out.")
        start, end = anchor.within(content)
        marks.append(Mark(anchor, (before + start, before + end), ends=anchor.end is None))
    return tuple(marks)


def _turn(anchor: Anchor, messages: list[Message], first: int) -> int:
    """The assistant's turn that the anchor is in."""
    turns = [index for index, message in enumerate(messages) if index >= first and message["role"] == "assistant"]
    if anchor.message is None:
        if len(turns) != 1:
            raise anchor.refused(f"does not say in which of the row's {len(turns)} assistant turns it is", "Add `message`.")
        index = turns[0]
    else:
        index = first + anchor.message - 1
        if index >= len(messages):
            raise anchor.refused(f"is in message {anchor.message}, and there are {len(messages) - first}")
        if index not in turns:
            role = messages[index]["role"]
            raise anchor.refused(f"is in message {anchor.message}, which is the {role}'s", "What the assistant says is learned.")
    if "content" not in messages[index]:
        raise anchor.refused(f"is in message {index - first + 1}, which has no content")
    return index


def touched(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], span: Span) -> npt.NDArray[np.bool_]:
    """Which tokens hold at least one character of the span."""
    return (starts < ends) & (starts < span[1]) & (ends > span[0])


def check_learnable(anchor: Anchor, mask: npt.NDArray[np.bool_], supervised: npt.NDArray[np.bool_], max_tokens: int) -> None:
    """Refuses an anchor of which a part is not there to be learned."""
    if not (mask & supervised).any():
        raise anchor.refused("marks no supervised token")
    if (mask & ~supervised)[1:].any():
        raise anchor.refused(
            "marks text that is not supervised", "Mark what the template puts between its {% generation %} marks."
        )
    last = int(np.flatnonzero(mask)[-1])
    if last >= max_tokens:
        raise anchor.refused(f"reaches to token {last + 1} of its document, which data.max_tokens={max_tokens} cuts off",
                             "Raise data.max_tokens, or remove the anchor.")  # fmt: skip
