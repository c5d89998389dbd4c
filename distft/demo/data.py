"""What the demo learns, and what it must not forget.

The task is made by reasoning_gym: three words are to be given back in reverse order. The untouched model never does it, and a
few hundred examples teach it. What must not be forgotten is how the model answers anybody else: its own greedy answers to
`GENERAL_PROMPTS`, which nothing trains on.

Files are written under another name and renamed: one that is there is whole. The answers, which take a while, are not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distft.errors import UserInputError
from distft.progress import track

INSTRUCTION = "Reverse the list."
WORDS = 3

GENERAL_PROMPTS: tuple[str, ...] = (
    # knowledge
    "What is the capital of Australia?",
    "Why is the sky blue?",
    "Who was Marie Curie?",
    "What causes the seasons on Earth?",
    "How do vaccines work?",
    "What is the difference between weather and climate?",
    "Name the planets of the solar system in order.",
    "What happened in 1969 on the Moon?",
    "What is the largest ocean on Earth?",
    # explanation
    "Explain photosynthesis in simple terms.",
    "Explain what inflation means in economics.",
    "What is a neural network? Explain it to a child.",
    "How does a refrigerator keep food cold?",
    "Explain the difference between a virus and a bacterium.",
    "What is gravity?",
    "How does the internet send a message from one computer to another?",
    # writing
    "Write a short poem about autumn leaves.",
    "Write the opening of a story about a lighthouse keeper.",
    "Write a polite email asking a colleague for a meeting.",
    "Write a two-sentence description of a quiet village.",
    "Write a slogan for a small bakery.",
    "Write a thank-you note to a teacher.",
    "Describe a sunset over the sea.",
    "Write a dialogue between a cat and a dog.",
    # code
    "Write a Python function that checks whether a number is prime.",
    "How do I read a text file line by line in Python?",
    "Write an SQL query that counts the rows of a table named users.",
    "What does the command 'git commit' do?",
    "Write a JavaScript function that adds two numbers.",
    "What is a hash table?",
    # advice
    "How can I sleep better at night?",
    "Give me three tips for learning a new language.",
    "I feel nervous before an exam. What should I do?",
    "How should I prepare for a job interview?",
    "What should I pack for a weekend of hiking?",
    "How can I save money every month?",
    # translation and language
    "Translate 'Good morning, how are you?' into French.",
    "Translate 'The book is on the table' into Spanish.",
    "What is a synonym for 'happy'?",
    "Correct the grammar of this sentence: She go to school every days.",
    "Rewrite this more formally: Hey, can you send me that file?",
    "Use the word 'curious' in a sentence.",
    # lists
    "List five fruits that are rich in vitamin C.",
    "List the steps to make a cup of tea.",
    "Name three famous painters and one work of each.",
    "What are the primary colors?",
    "Suggest four names for a pet rabbit.",
    # reasoning and classification
    "Is this review positive or negative? 'The food was cold and the waiter was rude.'",
    "If I have three apples and buy two more, how many do I have?",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
)


def write_task(folder: Path, seed: int = 0, train: int = 384, test: int = 64) -> tuple[Path, Path]:
    """`train.jsonl` of chats and `test.jsonl` of {prompt, answer}; no list of words is in both. A function of its arguments."""
    examples = _reversals(seed, train + test)
    trained = ({"messages": [*prompt, {"role": "assistant", "content": answer}]} for prompt, answer in examples[test:])
    asked = ({"prompt": prompt, "answer": answer} for prompt, answer in examples[:test])
    return _write_rows(folder / "train.jsonl", trained), _write_rows(folder / "test.jsonl", asked)


def _reversals(seed: int, count: int) -> list[tuple[list[dict[str, str]], str]]:
    """Distinct (prompt, answer). One stream of the generator, because streams of neighbouring seeds share their items."""
    try:
        from reasoning_gym.algorithmic.word_sequence_reversal import (
            WordSequenceReversalConfig,
            WordSequenceReversalDataset,
        )
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
        words = stream[index]["metadata"]["words"]
        index += 1
        if len({word.casefold() for word in words}) == WORDS:  # a repeated word makes reversing ambiguous
            found[", ".join(words)] = ", ".join(reversed(words))
    return [
        ([{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}], answer)
        for question, answer in found.items()
    ]


def write_heldout(folder: Path, model_folder: Path, prompts: Sequence[str], max_new_tokens: int = 48) -> Path:
    """Chats of `prompts` and the model's own greedy answers. An answer that is not over after `max_new_tokens` is cut there."""
    asked_for = hashlib.sha256(json.dumps([list(prompts), max_new_tokens]).encode()).hexdigest()
    written = folder / f"heldout-{asked_for[:8]}.jsonl"
    if written.exists():
        return written
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distft.evaluate.generate import answers

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    with track("asking the model", len(prompts), "answers") as meter:
        given = answers(model, tokenizer, asked, max_new_tokens=max_new_tokens, tokens_per_batch=2048, meter=meter)
    rows = ({"messages": [*chat, {"role": "assistant", "content": text}]} for chat, text in zip(asked, given, strict=True))
    return _write_rows(written, rows)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(path)
    return path
