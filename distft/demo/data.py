"""What the demo learns, and what it must not forget.

The task is made by reasoning_gym: of four words the last is to be given, alone. The untouched model chats instead, and a few hundred
examples teach it. What must not be forgotten is how the model answers anybody else: its own greedy answers.

Files are written under another name and renamed: one that is there is whole. The answers, which take a while, are not made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distft.errors import UserInputError
from distft.progress import track
from distft.store.local import explained

INSTRUCTION = "Give the last word."
WORDS = 4


def write_task(folder: Path, *, seed: int = 0, train: int, test: int) -> None:
    """`train.jsonl` and `test-chats.jsonl` of chats, and `test.jsonl`, the same tests as {prompt, answer}. No list of words is in both
    train and test. A function of its arguments."""
    examples = _examples(seed, train + test)
    chats = [{"messages": [*prompt, {"role": "assistant", "content": answer}]} for prompt, answer in examples]
    _write_rows(folder / "test.jsonl", ({"prompt": prompt, "answer": answer} for prompt, answer in examples[:test]))
    _write_rows(folder / "test-chats.jsonl", chats[:test])
    _write_rows(folder / "train.jsonl", chats[test:])


def _examples(seed: int, count: int) -> list[tuple[list[dict[str, str]], str]]:
    """Distinct (prompt, answer). One stream of the generator, because streams of neighbouring seeds share their items."""
    try:
        from reasoning_gym.algorithmic.word_sequence_reversal import WordSequenceReversalConfig, WordSequenceReversalDataset
    except ImportError:
        raise UserInputError(
            "making the demo's task needs the package reasoning-gym", help="run: pip install 'distft[demo]'"
        ) from None
    stream = WordSequenceReversalDataset(
        WordSequenceReversalConfig(min_words=WORDS, max_words=WORDS, seed=1_000_000 * (seed + 1), size=1_000_000)
    )
    found: dict[str, str] = {}
    index = 0
    while len(found) < count:
        words = [word.lower() for word in stream[index]["metadata"]["words"]]
        index += 1
        if len(set(words)) == WORDS:  # where a word is repeated it is less clear which is meant
            found[", ".join(words)] = words[-1]
    return [
        ([{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}], answer)
        for question, answer in found.items()
    ]


def write_own_answers(path: Path, model_folder: Path, prompts: Sequence[str], *, max_new_tokens: int = 48) -> None:
    """Chats of `prompts` and the model's own greedy answers, at `path`. An answer that is not over after `max_new_tokens` is cut."""
    if path.exists() and [json.loads(line)["messages"][0]["content"] for line in path.read_text("utf-8").splitlines()] == list(
        prompts
    ):
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distft.evaluate.generate import answers

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    with track(f"answers: {path.stem}", len(prompts), "answers") as meter:
        given = answers(model, tokenizer, asked, max_new_tokens=max_new_tokens, tokens_per_batch=8192, meter=meter)
    rows = ({"messages": [*chat, {"role": "assistant", "content": text}]} for chat, text in zip(asked, given, strict=True))
    _write_rows(path, rows)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
