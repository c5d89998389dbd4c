"""Numbers as a person reads them, one way everywhere: on the page, in its Markdown twin and in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from distft.report.intervals import Interval

MINUS, NARROW, DASH = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}", "\N{EN DASH}"


def percent(fraction: float) -> str:
    return f"{number(100 * fraction, 1)}{NARROW}%"


def points(fraction: float) -> str:
    """A difference of two percentages."""
    return signed(100 * fraction, 1)


def nats(value: float) -> str:
    return number(value, 3)


def drift(value: float) -> str:
    """Three decimals, or two digits that count: drifts span four orders of magnitude."""
    if value == 0 or abs(value) >= 0.01 or not math.isfinite(value):
        return number(value, 3)
    return number(value, min(8, 1 - math.floor(math.log10(abs(value)))))


def times(ratio: float) -> str:
    """How many times as far, to two digits that count."""
    return number(ratio, 0 if ratio >= 9.95 else 1 if ratio >= 0.995 else 2 if ratio >= 0.0995 else 3)


def number(value: float, decimals: int) -> str:
    """Fixed decimals, a true minus sign, never a negative zero."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{abs(value):,.{decimals}f}"
    return MINUS + text if value < 0 and any(digit in text for digit in "123456789") else text


def signed(value: float, decimals: int) -> str:
    text = number(value, decimals)
    return text if text.startswith(MINUS) or not any(digit in text for digit in "123456789") else f"+{text}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def interval(found: Interval | None, form: Callable[[float], str]) -> str:
    """`63.3 to 75.9 %`: the unit once."""
    if found is None:
        return ""
    return f"{form(found.low).removesuffix(f'{NARROW}%')} to {form(found.high)}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def said(content: Any) -> str:
    """What a message holds, as text; anything but a string is shown as JSON."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
