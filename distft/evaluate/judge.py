"""Is an answer right: pure functions from (answer, reference) to yes or no."""

from __future__ import annotations

import math
import re

from distft.config.schema import ExactJudge, Judge, NumberJudge

# A sign belongs to a number that nothing precedes (7-3 ends in 3), a comma when three digits follow it (1,234; 1,00,000; not 2,3).
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+−])?(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII
)


def is_right(judge: Judge, answer: str, reference: str) -> bool:
    if isinstance(judge, ExactJudge):
        return _trimmed(judge, answer) == _trimmed(judge, reference)
    return _same_number(judge, answer, reference)


def _trimmed(judge: ExactJudge, text: str) -> str:
    text = text.strip().strip(judge.strip).strip() if judge.strip else text.strip()
    return text.casefold() if judge.ignore_case else text


def _same_number(judge: NumberJudge, answer: str, reference: str) -> bool:
    given, wanted = _last_number(answer), _last_number(reference)
    if given is None or wanted is None or not (math.isfinite(given) and math.isfinite(wanted)):
        return False
    return abs(given - wanted) <= judge.tolerance * max(1.0, abs(wanted))


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None
