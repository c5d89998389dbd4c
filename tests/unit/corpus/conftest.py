"""What the tests of this folder share: a tokenizer that makes one token of each byte, so that masks can be read off the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.config.schema import Source
from distft.corpus.chat import Dropped, Encoded, Renderer
from distft.corpus.files import Row
from tests.helpers.models import CHATML, tiny_tokenizer_folder

BYTES = 261
"""A vocabulary without a single merge: five special tokens and a token per byte."""

Show = Callable[..., str]


@pytest.fixture(autouse=True)
def no_memo(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def renderer(tmp_path: Path) -> Callable[..., Renderer]:
    """A renderer for a source, over a tiny tokenizer; the settings are those of `tiny_tokenizer_folder`."""

    def make(format: str = "chat", *, vocabulary: int = BYTES, template: str | None = CHATML, **settings: Any) -> Renderer:
        from transformers import AutoTokenizer

        folder = tiny_tokenizer_folder(tmp_path / "tokenizer", vocabulary=vocabulary, template=template, **settings)
        return Renderer(AutoTokenizer.from_pretrained(folder), Source.model_validate({"path": "x.jsonl", "format": format}))

    return make


def row(**columns: Any) -> Row:
    return Row("some/folder/train.jsonl", 7, columns)


def chat(*contents: str, system: str | None = None) -> Row:
    """User and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return row(messages=[{"role": "system", "content": system}, *messages] if system is not None else messages)


def encode(renderer: Renderer, row: Row, max_tokens: int = 10_000) -> Encoded:
    (document,) = renderer.encode([row], max_tokens)
    assert isinstance(document, Encoded), document
    return document


def drop(renderer: Renderer, row: Row, max_tokens: int = 10_000) -> Dropped:
    (document,) = renderer.encode([row], max_tokens)
    assert isinstance(document, Dropped), document
    return document


def show(renderer: Renderer, row: Row, max_tokens: int = 10_000) -> str:
    """The document's text with each run of supervised tokens between ⟦ and ⟧."""
    document = encode(renderer, row, max_tokens)
    runs: list[tuple[bool, list[int]]] = []
    for token, supervised in zip(document.tokens.tolist(), document.supervised.tolist(), strict=True):
        if not runs or runs[-1][0] != supervised:
            runs.append((supervised, []))
        runs[-1][1].append(token)
    texts = [(supervised, renderer.tokenizer.decode(run)) for supervised, run in runs]
    return "".join(f"⟦{text}⟧" if supervised else str(text) for supervised, text in texts)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in rows), encoding="utf-8")
    return path
