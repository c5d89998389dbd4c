"""Which files a process opens. Python's own ways are heard by an audit hook; libraries that open files by themselves (safetensors in
Rust, Arrow in C++) are not, and show in what the process has mapped or holds open."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def listen(asked: Callable[[str], bool], *, active: Callable[[], bool] = lambda: True) -> list[str]:
    """What is opened from Python from now on, of the files that are asked for. A hook can never be taken off: it hears nothing while
    it is not `active`."""
    opened: list[str] = []

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and active() and asked(str(arguments[0])):
            opened.append(str(arguments[0]))

    sys.addaudithook(hear)
    return opened


@contextmanager
def listening(asked: Callable[[str], bool]) -> Iterator[list[str]]:
    """The same while it lasts."""
    active = True
    try:
        yield listen(asked, active=lambda: active)
    finally:
        active = False


def held(asked: Callable[[str], bool]) -> set[str]:
    """Files that this process has mapped or holds open now, of those that are asked for."""
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            mapped.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # closed meanwhile
            continue
    return {path for path in mapped if asked(path)}
