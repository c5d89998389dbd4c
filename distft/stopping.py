"""Ctrl-C and SIGTERM: stop where it is safe, keep what was done, and let the same command go on.

Most stages commit as they go, so that an interruption may fall anywhere: there the signal raises KeyboardInterrupt at once. A stage
that would lose work (training, between checkpoints) enters `gracefully()`, and looks at `requested()` where it can stop; a second
signal does not wait for that. Ranks that another process started get no signals: it has them told, by `tell()`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distft.progress import say

_state = {"graceful": False, "requested": False, "told": False, "begun": False}


class Interrupted(KeyboardInterrupt):
    """A stage stopped where it was asked to; the message says what was kept."""


def install() -> None:
    """Makes both signals mean the same. For the main thread of a command, once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)


def requested() -> bool:
    """Whether a signal has come since `gracefully` was entered, or this process was told at any time."""
    return _state["requested"] or _state["told"]


def tell() -> None:
    """From any thread, for good: this process is to stop at the next place where it can."""
    _state["told"] = True


def begun() -> bool:
    """Whether a stage that looks at `requested()` was ever entered; what comes before the first has nothing to lose."""
    return _state["begun"]


@contextmanager
def gracefully() -> Iterator[None]:
    """While inside, the first signal only makes `requested()` true. One that nobody heeded is not forgotten: it stops the command
    at the end of the block, when all of its work is done."""
    _state["graceful"] = _state["begun"] = True
    _state["requested"] = False
    try:
        yield
    finally:
        _state["graceful"] = False
    if requested():
        raise Interrupted("Stopped at the end of training, which is kept.")


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state["graceful"] and not _state["requested"]:
        _state["requested"] = True
        say(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint. Once more to stop at once.")
        return
    raise KeyboardInterrupt
