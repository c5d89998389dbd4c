"""Which of the processes that torchrun started this one is, from the environment alone; torch-free, for whoever prints."""

from __future__ import annotations

import os

from distft.errors import ConfigError

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def size() -> int:
    """How many ranks there are; 1 where nothing was launched."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This one's number, from 0."""
    return _number("RANK", 0) if size() > 1 else 0


def check_launched() -> None:
    """Refuses a world that was described by halves: joining it would hang or name a variable that no user knows."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = os.environ.get(name, "0")
        if not text.isdecimal():
            raise ConfigError(f"{name}={text!r} is no number.", where="environment", help="torchrun sets it; else unset it.")
    if not 0 <= rank() < size():
        raise ConfigError(f"RANK={rank()} of WORLD_SIZE={size()} is no rank.", where="environment",
                          help="torchrun sets both; else unset them.")  # fmt: skip
    missing = [name for name in _NEEDED if name not in os.environ] if size() > 1 else []
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size()} is set, and {', '.join(missing)} not.", where="environment",
            help="Start ranks with torchrun, which sets all of them, or unset WORLD_SIZE.",
        )  # fmt: skip


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")  # what is no number is complained about where it matters, not by whoever prints
    return int(text) if text.isdecimal() else default
