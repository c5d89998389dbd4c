"""Locks of this machine, for staging and memos alone: a store has none."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from distft.store.local import explained


@contextlib.contextmanager
def exclusively(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """One process or thread of this machine at a time, by a lock file at `path`; freed by the system when its holder dies. Without
    `wait`, False where another holds it. Whoever holds it may remove the lock file."""
    descriptor, held = _locked(path, wait)
    try:
        yield held
    finally:
        os.close(descriptor)


def _locked(path: Path, wait: bool) -> tuple[int, bool]:
    """The open lock file, and whether it is ours. A lock on a file that has lost its name keeps nobody out: it is taken anew."""
    while True:
        with explained("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)  # another user's will do
        try:
            with contextlib.suppress(OSError):  # some network mounts lock nothing; then work may be done twice, never wrongly
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return descriptor, False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor, True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
