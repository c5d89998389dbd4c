"""Documents that the teacher cannot read: found by reading them alone, and set apart with a reason, so that all others are scored.

A document is quarantined when its distribution is not finite, when it does not fit in memory even alone, or when it is longer than
a model with a table of positions can count. In a packed row one such document spoils its neighbours (0 times NaN is NaN), so whatever
fails together is read again one by one, and only what fails alone is to blame.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from distft.corpus.reader import Corpus, Document
from distft.engine.load import LanguageModel
from distft.engine.memory import enough_memory
from distft.engine.pack import batches_by_tokens
from distft.errors import DistftError
from distft.teacher.scores import Scores

LESS_MEMORY = "Lower score.tokens_per_batch; what was scored so far is kept. `distft plan` estimates what is needed."
NOT_FINITE = "the teacher's distribution over it is not finite"
WITNESSES = 8
"""Other documents that are tried before a teacher is called broken."""

_POSITIONS = re.compile(r"wpe|position|pos_emb")
_OFFSET = 16
"""By how much a table of positions may exceed max_position_embeddings; OPT's does by 2."""

Read = Callable[[list[Document]], list[Scores]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What became of some documents: each was read, or has a reason why it could not be."""

    documents: int
    """Those that were read."""
    scored_tokens: int
    quarantined: dict[str, str]
    """Reasons by digest."""
    crowded: int
    """Batches that did not fit in memory at once."""


def read_apart(
    documents: list[Document],
    read: Read,
    keep: Callable[[list[tuple[Document, Scores]]], None],
    *,
    tokens_per_batch: int,
    room: int | None,
) -> Generator[float, None, Reading]:
    """Reads documents in batches of like lengths, which follow from the documents alone: so do the scores, to the bit, where memory
    suffices, and the order in which `keep` gets them. `room` is what `positions_limit` found. Yields tokens as they are read."""
    quarantined: dict[str, str] = {}
    documents_read = scored_tokens = crowded = 0

    def sort_out(chosen: list[Document], told: list[Scores | str]) -> None:
        nonlocal documents_read, scored_tokens
        rows = [(document, one) for document, one in zip(chosen, told, strict=True) if not isinstance(one, str)]
        keep(rows)
        documents_read += len(rows)
        scored_tokens += sum(len(scores) for _, scores in rows)
        quarantined.update(
            {document.digest: one for document, one in zip(chosen, told, strict=True) if isinstance(one, str)}
        )  # fmt: skip

    fitting = [i for i, document in enumerate(documents) if room is None or len(document) <= room]
    for i in set(range(len(documents))) - set(fitting):
        reason = f"it has {len(documents[i]):,} tokens, and the teacher has positions for {room:,}"
        sort_out([documents[i]], [reason])
        yield len(documents[i])
    for batch in batches_by_tokens([len(documents[i]) for i in fitting], tokens_per_batch):
        chosen = [documents[fitting[place]] for place in batch]
        told = attempt(read, chosen)
        if len(chosen) == 1 or not any(isinstance(one, str) for one in told):
            sort_out(chosen, told)
            yield sum(len(document) for document in chosen)
            continue
        crowded += isinstance(told[0], str) and told[0] != NOT_FINITE
        for document in chosen:
            sort_out([document], attempt(read, [document]))
            yield len(document)
    return Reading(documents=documents_read, scored_tokens=scored_tokens, quarantined=quarantined, crowded=crowded)


def attempt(read: Read, documents: list[Document]) -> list[Scores | str]:
    """Of each document its scores, or the reason why there are none. Errors that are neither of memory nor of numbers pass."""
    try:
        with enough_memory(LESS_MEMORY):
            return [score if score.finite else NOT_FINITE for score in read(documents)]
    except DistftError as error:
        if not isinstance(error.__cause__, RuntimeError):  # what `enough_memory` translates comes from one
            raise
        reason = f"{error.problem[:1].lower()}{error.problem[1:]} ({error.where})"
    if torch.cuda.is_available():  # only here, where the failed pass holds nothing any more
        torch.cuda.empty_cache()
    return [reason for _ in documents]


def witnesses(corpus: Corpus, accused: set[str]) -> Iterator[Document]:
    """Documents of the training split, evenly spread, without those that could not be read: when none of these can be read either,
    the teacher is to blame."""
    for index in np.unique(np.linspace(0, corpus.count("train") - 1, WITNESSES).astype(int)):
        document = corpus.document("train", int(index))
        if document.digest not in accused:
            yield document


def positions_limit(teacher: LanguageModel) -> int | None:
    """The tokens that a model with a table of positions, learned (GPT-2, OPT) or computed (GPT-J), can tell apart; None for one that
    rotates by any position. A longer document would be read behind the table's end, which on a GPU ends the process."""
    limit = getattr(teacher.whole.config.get_text_config(), "max_position_embeddings", None)
    if not limit:
        return None
    backbone = teacher.whole.base_model
    named = (*backbone.named_parameters(), *backbone.named_buffers())
    tables = (tensor.shape[0] for name, tensor in named if tensor.ndim == 2 and _POSITIONS.search(name))
    return limit if any(limit <= rows <= limit + _OFFSET for rows in tables) else None
