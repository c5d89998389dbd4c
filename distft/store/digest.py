"""Digests of files and of documents: what identity by content is made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distft.errors import MissingArtifactError, StoreError
from distft.progress import track
from distft.store.lock import exclusively

YOUNG_SECONDS = 2.0
"""A file touched this recently may change again without its times changing, so its digest is not kept (git does the same)."""
MEMO_ENTRIES = 20_000
READ_BYTES = 1 << 20
SHOWN_FROM_BYTES = 1 << 30
"""Reading so much takes a few seconds."""

_DOCUMENT_TAG = b"distft document v1\0"
_known: dict[str, str] = {}
_read: tuple[object, ...] = ()
"""Which memo `_known` holds: its path and what tells one state of it from the next."""


def document_digest(tokens: npt.NDArray[np.uint32], supervised: npt.NDArray[np.bool_]) -> str:
    """The name of a document: 128 bits of sha256 over its token ids and which of them are supervised, as 32 hex digits."""
    if tokens.dtype != np.uint32 or supervised.dtype != np.bool_ or tokens.ndim != 1 or tokens.shape != supervised.shape:
        raise TypeError(
            f"a document is uint32[n] and bool[n], not {tokens.dtype}{list(tokens.shape)} and"
            f" {supervised.dtype}{list(supervised.shape)}"
        )
    digest = hashlib.sha256(_DOCUMENT_TAG)
    digest.update(len(tokens).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(tokens, "<u4").data)
    digest.update(np.ascontiguousarray(supervised).view(np.uint8).data)
    return digest.hexdigest()[:32]


def file_sha256(path: Path, seen: Callable[[int], None] | None = None) -> str:
    """sha256 of a file's bytes, as hex. `seen` is told how many were read, time and again."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if seen is not None:
                seen(count)
    return digest.hexdigest()


def files_sha256(paths: Iterable[Path]) -> dict[Path, str]:
    """sha256 of each file. Digests are remembered across runs by (device, inode, size, mtime, ctime): a model of 140 GB is hashed
    once. Nothing can be written to a file without its ctime changing, even where its mtime is put back."""
    wanted = list(dict.fromkeys(paths))
    _recall()
    learnt: dict[str, str] = {}
    counting = threading.Lock()  # a meter is one thread's
    unread = sum(size for path in wanted if (size := _unread(path)))

    def digest(path: Path) -> str:
        try:
            key, changed = _key(path)
            if key in _known:
                return _known[key]
            value = file_sha256(path) if meter is None else file_sha256(path, seen)
            key_after, _ = _key(path)
        except FileNotFoundError as error:
            raise MissingArtifactError(f"no file {path}", where=str(path)) from error
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}", where=str(path), help="Check its permissions.") from error
        if key_after != key:
            raise StoreError(f"{path} changed while it was read", where=str(path), help="Wait until its writer is done.")
        if time.time() - changed >= YOUNG_SECONDS:
            learnt[key] = value
        return value

    def seen(count: int) -> None:
        with counting:
            assert meter is not None
            meter.advance(count)

    shown = track("checking files", unread, "bytes") if unread >= SHOWN_FROM_BYTES else contextlib.nullcontext()
    with shown as meter, ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(wanted, pool.map(digest, wanted), strict=True))
    if learnt:
        _known.update(learnt)
        _write_memo(learnt)
    return digests


def _unread(path: Path) -> int:
    """Bytes that have to be read for this file's digest."""
    with contextlib.suppress(OSError):  # whoever reads it says what is wrong
        return 0 if _key(path)[0] in _known else path.stat().st_size
    return 0


def _key(path: Path) -> tuple[str, float]:
    """What a digest is remembered by, and when the file last changed."""
    seen = path.stat()
    key = f"{seen.st_dev}:{seen.st_ino}:{seen.st_size}:{seen.st_mtime_ns}:{seen.st_ctime_ns}"
    return key, max(seen.st_mtime, seen.st_ctime)


def memo_path() -> Path:
    """Where digests are remembered between runs."""
    chosen = os.environ.get("DISTFT_CACHE_DIR")
    if chosen:
        return Path(chosen) / "digests.json"
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise StoreError(str(error), where="environment", help="Set DISTFT_CACHE_DIR to a folder of your own.") from error
    return cache / "distft" / "digests.json"


def _recall() -> None:
    """Takes up what the memo says, unless this process has read it as it is now: parsing thousands of digests takes a while."""
    global _read
    with contextlib.suppress(OSError, StoreError):
        path = memo_path()
        state = _state(path)
        if state != _read:
            _known.update(_read_memo(path))
            _read = state  # of before it was read: what came in between is read the next time


def _state(path: Path) -> tuple[object, ...]:
    seen = path.stat()
    return (path, seen.st_ino, seen.st_size, seen.st_mtime_ns)


def _read_memo(path: Path) -> dict[str, str]:
    # A memo that is absent, unreadable or nonsense costs time, nothing else.
    try:
        memo = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    digests = memo.get("digests") if isinstance(memo, dict) and memo.get("version") == 1 else None
    if not isinstance(digests, dict):
        return {}
    return {key: value for key, value in digests.items() if isinstance(value, str) and len(value) == 64}


def _write_memo(learnt: dict[str, str]) -> None:
    """Adds to the memo, of which those learnt longest ago go. Of processes that do so at once none loses what another has learnt."""
    global _read
    with contextlib.suppress(OSError, StoreError):
        path = memo_path()
        with exclusively(path.with_name(f"{path.name}.lock")):
            before = {key: value for key, value in _read_memo(path).items() if key not in learnt}
            newest = dict([*before.items(), *learnt.items()][-MEMO_ENTRIES:])
            partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
            try:
                partial.write_text(json.dumps({"version": 1, "digests": newest}))
                os.replace(partial, path)
                _known.update(newest)
                _read = _state(path)
            finally:
                partial.unlink(missing_ok=True)
