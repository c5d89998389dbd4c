"""How often a request to S3 is tried: every failure is first understood (`Trouble`), then the request is tried again, a bounded
number of times, or the user is told."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from distft.errors import DistftError
from distft.progress import say
from distft.store.trouble import Trouble, understand

T = TypeVar("T")

LONGEST_PAUSE = 30.0
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, *(LONGEST_PAUSE,) * 5)
"""Seconds between tries, three minutes in all: a bucket that many processes meet slows them down for longer than a moment. A server
that never answered this process gets the first three alone: a wrong address is told soon."""

TOLD_AFTER = 15.0
"""Seconds of waiting for one request after which the user is told, once."""
SILENT_SECONDS = 60.0
"""Between two such lines of a process, however many requests wait."""

REREADS = 2
"""Tries after the first of a request whose bytes were wrong, whatever else it suffers: on their way they are wrong once, in the store
always."""

_answered: set[str] = set()
"""Endpoints that have answered this process."""
_lock = threading.Lock()
_waiting_told = float("-inf")


def patiently(attempt: Callable[[], T], *, endpoint: str, bucket: str, tell: Callable[[Trouble, Exception], DistftError]) -> T:
    """The result of a request, asked again, a bounded number of times, while the trouble may pass; else raises what `tell` makes of
    it."""
    tries, rereads, told, began = 0, 0, False, time.monotonic()
    while True:
        try:
            result = attempt()
        except DistftError:
            raise  # told already, by a request inside the request
        except Exception as error:
            trouble = understand(error)
            if trouble is Trouble.OTHER and not isinstance(error, OSError):
                raise  # not the store's doing: a bug keeps its traceback
            known = trouble is Trouble.BUSY or endpoint in _answered  # who is busy is there
            garbled = trouble is Trouble.GARBLED
            spent, most = (rereads, REREADS) if garbled else (tries, len(PAUSES) if known else 3)
            if not trouble.passing or spent >= most:
                raise tell(trouble, error) from error
            why = trouble.explain(endpoint=endpoint, bucket=bucket, error=error)[0]
        else:
            _answered.add(endpoint)
            return result
        pause = min(LONGEST_PAUSE, PAUSES[spent] * random.uniform(0.5, 1.5))
        if not told and time.monotonic() + pause - began >= TOLD_AFTER:
            told = True
            _say_waiting(why)
        time.sleep(pause)
        tries, rereads = tries + (not garbled), rereads + garbled


def _say_waiting(why: str) -> None:
    global _waiting_told
    with _lock:
        now = time.monotonic()
        due = now - _waiting_told >= SILENT_SECONDS
        _waiting_told = now if due else _waiting_told
    if due:
        say(f"Waiting for the store: {why}. Tries go on for about {sum(PAUSES) / 60:.0f} minutes.")
