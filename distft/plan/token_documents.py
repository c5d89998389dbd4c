"""Which documents are on the page of tokens, and their text as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distft.plan.token_text import TokenTexts, visible
from distft.plan.tokens import BOTH, LEARNED, TREATMENTS, TokenPlan

PAGE_DOCUMENTS = 20
PAGE_TOKENS = 20_000
"""Supervised tokens on the page, which keep it below 3 MB; longer documents are cut."""
PROMPT_EDGE, PROMPT_TOKENS = 80, 1_500
"""A prompt shows so many tokens at both ends where it is longer; and a document so many outside its answers."""
STEPS = 4
"""Shades of a treatment, by weight."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A document on the page: tokens `start` to `stop` of the plan's arrays, which may leave out its end."""

    number: int
    why: str
    start: int
    stop: int


def chosen_documents(plan: TokenPlan, documents: int = PAGE_DOCUMENTS, tokens: int = PAGE_TOKENS) -> list[Shown]:
    """An even spread for one half, and for the other the documents of which most cross-entropy is not learned; in the corpus's order.
    Where the run's objective learns every token, most cross-entropy of all."""
    one = plan.applied[0]
    idle = ~np.isin(one.codes, (LEARNED, BOTH))
    lost = np.where(idle if idle.any() else True, plan.ce, 0.0)
    per_document = np.add.reduceat(np.append(lost, 0.0), plan.starts[:-1]) if len(plan.seen) else np.zeros(0)
    per_document[np.diff(plan.starts) == 0] = 0.0
    first: dict[tuple[str, bytes], int] = {}
    for number, seen in enumerate(plan.seen):  # rows of one text may differ in what is marked, and then in what is learned
        first.setdefault((seen.document.digest, seen.document.anchors.tobytes()), number)
    unique = list(first.values())
    even = unique if len(unique) <= documents else [unique[(2 * n + 1) * len(unique) // documents] for n in range(documents // 2)]
    reason = f"most CE that {one.name} does not learn" if idle.any() else "most CE"
    why = dict.fromkeys(even, "evenly spread" if len(unique) > documents else "")
    for number in sorted(unique, key=lambda number: -per_document[number]):
        if len(why) >= min(documents, len(unique)):
            break
        why.setdefault(number, reason)
    lengths = {number: int(plan.starts[number + 1] - plan.starts[number]) for number in sorted(why)}
    kept, left = {}, tokens
    for place, (number, length) in enumerate(sorted(lengths.items(), key=lambda item: item[1])):
        kept[number] = min(length, left // (len(lengths) - place))  # what short ones leave, long ones get
        left -= kept[number]
    return [Shown(n, why[n], int(plan.starts[n]), int(plan.starts[n]) + kept[n]) for n in lengths]


def document_html(plan: TokenPlan, one: Shown, marks: npt.NDArray[np.int64], texts: TokenTexts) -> str:
    """The document's text: an element per supervised token, in the arrays' order; the rest as plain text, long runs shortened."""
    document = plan.seen[one.number].document
    supervised = np.flatnonzero(document.supervised)[: one.stop - one.start]
    whole = one.stop == plan.starts[one.number + 1]
    end = len(document) if whole else int(supervised[-1]) + 1 if len(supervised) else 0
    ids = document.tokens[:end].tolist()
    pieces = texts.pieces(ids)
    out: list[str] = []
    place, plain_left = 0, PROMPT_TOKENS
    for at, position in enumerate([*supervised.tolist(), end]):
        if position > place:
            run = list(zip(ids[place:position], pieces[place:position], strict=True))
            edge = max(10, min(PROMPT_EDGE, plain_left // 2))
            plain_left = max(0, plain_left - min(len(run), 2 * edge))
            out.append(f'<span class="prompt">{_plain(run, edge, texts)}</span>')
        if position < end:
            code = int(marks[one.start + at])
            name, shade = TREATMENTS[code // STEPS], code % STEPS
            given = f'"{name} s{shade}"' if shade else name
            out.append(f"<i class={given}>{_token(ids[position], pieces[position], texts)}</i>")
        place = position + 1
    return "".join(out) + ("" if whole else " <em>… the rest is not shown</em>")


def _plain(run: Sequence[tuple[int, str]], edge: int, texts: TokenTexts) -> str:
    parts = [_token(number, piece, texts, alone=False) for number, piece in run]
    if len(parts) > 2 * edge + 20:
        parts[edge:-edge] = [f" <em>… {len(parts) - 2 * edge:,} tokens …</em> "]
    return "".join(parts)


def _token(number: int, piece: str, texts: TokenTexts, *, alone: bool = True) -> str:
    text = visible(piece, alone=alone)
    return f"<u>{text}</u>" if number in texts.special and piece.strip() else text
