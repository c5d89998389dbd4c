"""Task files: JSONL with a prompt and the answer that is right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config.schema import GenerateTask, NllTask
from distft.corpus.sources import rows
from distft.errors import DataError

_MEND = 'A line is {"prompt": text or messages, "answer": text or number}. Correct or remove it.'
_SAID = ("role", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question. `messages` is a chat that ends with the user's turn."""

    messages: list[dict[str, Any]]
    answer: str


def read_items(task: GenerateTask) -> list[Item]:
    """All items of a task, or its first `limit`; a bad line is an error that names it."""
    try:
        path = Path(task.path).expanduser()
        lines = path.read_bytes().splitlines()
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"The task {task.name} cannot be read: {getattr(error, 'strerror', None) or error}.",
            where=task.path,
            help=f"Check the task's `path`; it is seen from {Path.cwd()}.",
        ) from error
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            items.append(_item(line, where=f"{path}:{number}"))
        if task.limit is not None and len(items) == task.limit:
            break
    if not items:
        raise DataError(f"The task {task.name} has no items.", where=str(path), help="Give a file with a line per question.")
    return items


def look_at(task: GenerateTask | NllTask) -> None:
    """Reads what can be read of a task without a model, before hours are spent on what it would measure."""
    if isinstance(task, GenerateTask):
        read_items(task)
    else:
        next(rows(task.source))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in _SAID)


def _item(line: bytes, *, where: str) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"Not a JSON object in UTF-8: {error}.", where=where, help=_MEND) from error
    if not isinstance(row, dict) or "prompt" not in row or "answer" not in row:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"A task's line needs `prompt` and `answer`; this has {keys}.", where=where, help=_MEND)
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt or not all(_is_message(message) for message in prompt):
        raise DataError("`prompt` is neither a string nor a list of {role, content}, both strings.", where=where, help=_MEND)
    if not isinstance(row["answer"], str | int | float) or isinstance(row["answer"], bool):
        raise DataError(f"`answer` is a {type(row['answer']).__name__}; a string or a number is wanted.", where=where, help=_MEND)
    return Item(messages=prompt, answer=str(row["answer"]))
