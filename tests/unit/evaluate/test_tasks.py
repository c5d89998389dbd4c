"""What a task file may hold; what it may not is in tests/faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.config.schema import GenerateTask
from distft.evaluate.tasks import read_items


def task(path: Path, rows: list[Any], **settings: Any) -> GenerateTask:
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    return GenerateTask(name="t", path=str(path), **settings)


@pytest.mark.parametrize(
    ("answer", "text"), [("b", "b"), (5, "5"), (2.5, "2.5"), ("\u2028 é", "\u2028 é"), (-3, "-3")]
)  # a line separator of Unicode is no end of line
def test_prompts_and_answers(tmp_path: Path, answer: Any, text: str) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    items = read_items(
        task(tmp_path / "t.jsonl", [{"prompt": "a\u2028é", "answer": answer, "more": 1}, {"prompt": chat, "answer": answer}])
    )
    assert [item.messages for item in items] == [[{"role": "user", "content": "a\u2028é"}], chat]
    assert [item.answer for item in items] == [text, text]


def test_limit_takes_the_first_and_reads_no_further(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": str(i), "answer": i} for i in range(5)]
    assert [item.answer for item in read_items(task(tmp_path / "t.jsonl", [*rows, "bad"], limit=3))] == ["0", "1", "2"]
    assert len(read_items(task(tmp_path / "t.jsonl", rows, limit=9))) == 5
