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
    """What became of some documents: each has scores, or a reason why it has none."""

    documents: list[Document]
    """Those that were read, in the order in which they were given."""
    scores: list[Scores]
    """Of `documents`, one by one."""
    quarantined: dict[str, str]
    """Reasons by digest."""
    crowded: int
    """Batches that did not fit in memory at once."""


def read_apart(
    documents: list[Document], read: Read, *, tokens_per_batch: int, room: int | None
) -> Generator[float, None, Reading]:
    """Reads documents in batches of like lengths, which follow from the documents alone: so do the scores, to the bit, where memory
    suffices. `room` is what `positions_limit` found. Yields tokens as they are read."""
    found: dict[int, Scores | str] = {}
    crowded = 0
    fitting = [i for i, document in enumerate(documents) if room is None or len(document) <= room]
    for i in set(range(len(documents))) - set(fitting):
        found[i] = f"it has {len(documents[i]):,} tokens, and the teacher has positions for {room:,}"
        yield len(documents[i])
    for batch in batches_by_tokens([len(documents[i]) for i in fitting], tokens_per_batch):
        chosen = [fitting[place] for place in batch]
        told = attempt(read, [documents[i] for i in chosen])
        if len(chosen) == 1 or not any(isinstance(one, str) for one in told):
            found.update(zip(chosen, told, strict=True))
            yield sum(len(documents[i]) for i in chosen)
            continue
        crowded += isinstance(told[0], str) and told[0] != NOT_FINITE
        for i in chosen:
            [found[i]] = attempt(read, [documents[i]])
            yield len(documents[i])
    pairs = [(document, found[i]) for i, document in enumerate(documents)]
    return Reading(
        documents=[document for document, one in pairs if not isinstance(one, str)],
        scores=[one for _, one in pairs if not isinstance(one, str)],
        quarantined={document.digest: one for document, one in pairs if isinstance(one, str)},
        crowded=crowded,
    )


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
