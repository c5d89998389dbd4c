"""Is an answer right: pure functions from (answer, reference) to yes or no."""

from __future__ import annotations

import re

from distft.config.schema import ExactJudge, Judge, NumberJudge

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def is_right(judge: Judge, answer: str, reference: str) -> bool:
    if isinstance(judge, ExactJudge):
        return _trimmed(judge, answer) == _trimmed(judge, reference)
    return _same_number(judge, answer, reference)


def _trimmed(judge: ExactJudge, text: str) -> str:
    text = text.strip().strip(judge.strip).strip() if judge.strip else text.strip()
    return text.casefold() if judge.ignore_case else text


def _same_number(judge: NumberJudge, answer: str, reference: str) -> bool:
    given, wanted = _last_number(answer), _last_number(reference)
    return given is not None and wanted is not None and abs(given - wanted) <= judge.tolerance * max(1.0, abs(wanted))


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
