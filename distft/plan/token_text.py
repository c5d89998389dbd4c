"""What each token of a document is as text, for eyes: pieces of words, marks where there is nothing to see.

A byte-level token may be a part of a character. Such a run of tokens is decoded together: the token that completes a character shows
it, and those before it show a placeholder. No text of a tokenizer is taken on trust: signs that cannot be seen, or that would turn the
text around, are written as their code.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from html import escape
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"
PART = "\N{DOTTED CIRCLE}"
"""Stands for a token that is a part of a character that a later token completes."""

WINDOW = 64
"""Tokens that are decoded together at most, where none of them ends a character: more than any text that means something has."""

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class TokenTexts:
    """Ids to pieces of text, by one fast tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers strip the space of a text's first token; behind another one it stays.
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)
        self._before = self._decode(self._anchor)
        self._known: dict[int, str] = {}
        self.special: frozenset[int] = frozenset(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; together they are the text of all, but for placeholders."""
        found = [self._alone(one) for one in ids]
        start = 0
        while start < len(found):
            stop = start
            while stop < len(found) and BROKEN in found[stop]:
                stop += 1
            if stop > start:
                found[start:stop] = self._together(ids[start:stop])
            start = max(stop, start + 1)
        return found

    def _alone(self, one: int) -> str:
        if one not in self._known:
            self._known[one] = self._behind([one])
        return self._known[one]

    def _together(self, ids: Sequence[int]) -> list[str]:
        """Parts of characters: each token shows what it completes, and what is broken shows once nothing can complete it any more."""
        found: list[str] = []
        window: list[int] = []
        told = 0  # signs of the window's text that are shown
        for one in ids:
            window.append(one)
            text = self._behind(window)
            whole = text.rstrip(BROKEN)
            found.append(whole[told:] or PART)
            told = max(told, len(whole))
            if whole == text or len(window) == WINDOW:
                window, told = [], 0
        for n in range(1, len(found) + 1):
            if found[-n] != PART:
                break
            found[-n] = BROKEN
        return found

    def _behind(self, ids: Sequence[int]) -> str:
        text = self._decode([*self._anchor, *ids])
        return text[len(self._before) :] if text.startswith(self._before) else self._decode(list(ids))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(text: str, *, alone: bool) -> str:
    """The text as HTML. Line ends get a mark before they break; of a token that is nothing but white space, every sign
    does where `alone`."""
    if text == "":
        return "<b>∅</b>"
    blank = alone and not text.strip()
    return "".join(_sign(sign, blank) for sign in text)


def coded(text: str) -> str:
    """The text with the code of each sign that cannot be seen or turns the text around in its place; to be escaped by who shows it."""
    return "".join(f"U+{ord(sign):04X}" if unicodedata.category(sign) in _INVISIBLE else sign for sign in text)


def _sign(sign: str, blank: bool) -> str:
    if sign == "\n":
        return "<b>↵</b>\n"
    if sign == "\t":
        return "<b>⇥</b>\t"
    if sign == "\r":
        return "<b>␍</b>"
    if sign == " ":
        return "<b>·</b>" if blank else " "
    if sign in (BROKEN, PART):
        return f"<b>{sign}</b>"
    return f"<b>{coded(sign)}</b>" if unicodedata.category(sign) in _INVISIBLE else escape(sign)
