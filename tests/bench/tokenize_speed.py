"""How fast rows become documents: about a million tokens of chat, from the file to the committed corpus.

    python -m pytest -m bench -s tests/bench/tokenize_speed.py

DISTFT_BENCH_MODEL names a folder with a tokenizer and its chat template; without it a tiny one is made, whose tokens are short.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from distft.config.schema import Data
from distft.corpus.build import build_corpus
from distft.store.location import open_location
from distft.store.model_folder import ModelFolder
from tests.helpers.models import tiny_tokenizer_folder

ROWS = 7_000
QUESTION = (
    "A farmer has {n} hens, and each lays {k} eggs a week; he sells a dozen for $3. What does he earn in a month of four weeks?"
)
ANSWER = (
    "The hens lay {n} * {k} eggs in a week. In four weeks these are 4 * {n} * {k} eggs, so the dozens are that number divided by "
    "twelve, rounded down, as he sells whole dozens only. Each brings $3, and the answer is three times the number of dozens.\n"
)


@pytest.mark.bench
@pytest.mark.parametrize("workers", [1, 2])
def test_tokenize_speed(tmp_path: Path, workers: int) -> None:
    given = os.environ.get("DISTFT_BENCH_MODEL")
    folder = Path(given) if given else tiny_tokenizer_folder(tmp_path / "model")
    model = ModelFolder(folder, {"vocab_size": 1 << 20})  # a tokenizer's folder is enough here
    with (tmp_path / "train.jsonl").open("w", encoding="utf-8") as file:
        for n in range(ROWS):
            question, answer = QUESTION.format(n=n, k=n % 7), ANSWER.format(n=n, k=n % 7)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    config = Data.model_validate({"train": {"path": str(tmp_path / "train.jsonl")}, "workers": workers})
    start = time.perf_counter()
    facts = build_corpus(config, model, open_location(str(tmp_path / "store"))).facts["train"]
    seconds = time.perf_counter() - start
    rate, million = facts["tokens"] / seconds, 1e6 * seconds / facts["tokens"]
    print(f"\n{workers} worker(s): {facts['documents']:,} chats, {facts['tokens']:,} tokens in {seconds:.1f} s", end=": ")
    print(f"{rate:,.0f} tokens/s, a million in {million:.1f} s")
