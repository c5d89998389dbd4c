"""Documents without a store: a small source rendered in memory, and what the tokenizer says of the output head."""

from __future__ import annotations

from distft.config.schema import Source
from distft.corpus.chat import Encoded, Renderer, load_tokenizer
from distft.corpus.reader import Document
from distft.corpus.sources import rows
from distft.errors import DataError
from distft.progress import say
from distft.store.digest import document_digest
from distft.store.model_folder import ModelFolder


def render_source(source: Source, model: ModelFolder, *, max_tokens: int) -> list[Document]:
    """The documents of a source by the same rules as a corpus; says how many rows were dropped."""
    found = list(rows(source))
    encoded = Renderer(load_tokenizer(model), source).encode(found, max_tokens)
    documents = [
        Document(document_digest(one.tokens, one.supervised), one.tokens, one.supervised, one.anchored, row.file, row.number)
        for row, one in zip(found, encoded, strict=True)
        if isinstance(one, Encoded)
    ]
    dropped = len(found) - len(documents)
    if dropped:
        say(f"{source.path}: {dropped} of {len(found)} rows dropped: no supervised token within {max_tokens} tokens")
    if not documents:
        raise DataError("No row of the source gives a document.", where=source.path, help="Check its `format` and columns.")
    return documents


def token_rows(model: ModelFolder) -> int:
    """Head rows that stand for a token: one more than the tokenizer's highest id. A head may have more, for alignment's sake."""
    return max(load_tokenizer(model).get_vocab().values()) + 1
