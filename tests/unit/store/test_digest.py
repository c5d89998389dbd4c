"""Digests of documents and files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.errors import MissingArtifactError
from distft.store import digest
from distft.store.digest import document_digest, file_sha256, files_sha256


@pytest.fixture(autouse=True)
def _memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "_known", {})
    monkeypatch.setattr(digest, "_read", ())
    monkeypatch.setattr(digest, "YOUNG_SECONDS", 0.0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes are read, as they are read."""
    seen: list[str] = []
    real = digest.file_sha256
    monkeypatch.setattr(digest, "file_sha256", lambda path: (seen.append(path.name), real(path))[1])
    return seen


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would."""
    monkeypatch.setattr(digest, "_known", {})
    monkeypatch.setattr(digest, "_read", ())


def test_a_document_digest_is_what_its_format_says() -> None:
    tokens, supervised = np.array([1, 2, 2**32 - 1], np.uint32), np.array([False, True, True])
    data = b"distft document v1\0" + (3).to_bytes(8, "little") + tokens.astype("<u4").tobytes() + b"\0\1\1"
    assert document_digest(tokens, supervised) == hashlib.sha256(data).hexdigest()[:32]


def test_documents_that_differ_have_digests_that_differ() -> None:
    documents = [([], []), ([0], [0]), ([0], [1]), ([1], [0]), ([0, 0], [0, 0]), ([0, 0], [0, 1]), ([256], [0]), ([1, 0], [0, 0])]
    digests = {document_digest(np.array(t, np.uint32), np.array(s, bool)) for t, s in documents}
    assert len(digests) == len(documents)


def test_a_document_digest_does_not_depend_on_memory_layout() -> None:
    tokens, supervised = np.arange(10, dtype=np.uint32), np.arange(10) % 3 == 0
    again = document_digest(np.repeat(tokens, 2)[::2], np.repeat(supervised, 2)[::2])
    assert again == document_digest(tokens, supervised)


@pytest.mark.parametrize(
    ("tokens", "supervised"),
    [
        (np.zeros(2, np.int64), np.zeros(2, bool)),
        (np.zeros(2, np.uint32), np.zeros(2, np.uint8)),
        (np.zeros(2, np.uint32), np.zeros(3, bool)),
        (np.zeros((1, 2), np.uint32), np.zeros((1, 2), bool)),
    ],
)
def test_other_types_and_shapes_are_refused(tokens: np.ndarray, supervised: np.ndarray) -> None:
    with pytest.raises(TypeError, match="a document is"):
        document_digest(tokens, supervised)


def test_files_are_hashed_once_across_processes(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    first = files_sha256(paths)
    assert first == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert sorted(hashed) == ["a", "b", "c"]
    forget(monkeypatch)
    assert files_sha256(reversed(paths)) == first
    assert len(hashed) == 3


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_changed_bytes_are_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_mtime: bool) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    before = files_sha256([path])[path]
    times = path.stat()
    path.write_bytes(b"two")
    if keep_mtime:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_mtime_ns == times.st_mtime_ns
    forget(monkeypatch)
    assert files_sha256([path])[path] == hashlib.sha256(b"two").hexdigest() != before


def test_young_files_are_not_remembered(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "YOUNG_SECONDS", 3600.0)
    (tmp_path / "a").write_bytes(b"one")
    for _ in range(2):
        files_sha256([tmp_path / "a"])
    assert hashed == ["a", "a"]
    assert not digest.memo_path().exists()


@pytest.mark.parametrize(
    "memo", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 1, "digests": 3}', b"\xff", b'{"version": 2, "digests": {}}']
)
def test_a_corrupt_memo_costs_time_only(tmp_path: Path, memo: bytes) -> None:
    digest.memo_path().parent.mkdir()
    digest.memo_path().write_bytes(memo)
    (tmp_path / "a").write_bytes(b"one")
    assert files_sha256([tmp_path / "a"]) == {tmp_path / "a": file_sha256(tmp_path / "a")}
    assert json.loads(digest.memo_path().read_bytes())["version"] == 1


def test_a_cache_folder_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(tmp_path / "file"))
    assert files_sha256([tmp_path / "file"]) == {tmp_path / "file": hashlib.sha256(b"").hexdigest()}


def test_the_memo_keeps_what_others_wrote_and_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "MEMO_ENTRIES", 3)
    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode())
        forget(monkeypatch)
        files_sha256([tmp_path / name])
    kept = json.loads(digest.memo_path().read_bytes())["digests"]
    assert list(kept.values()) == [hashlib.sha256(name).hexdigest() for name in (b"b", b"c", b"d")]


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match="gone"):
        files_sha256([tmp_path / "gone"])


def test_the_memo_is_parsed_once_and_again_when_another_process_wrote_it(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    files_sha256([tmp_path / "a"])
    forget(monkeypatch)
    parsed: list[int] = []
    real = json.loads
    monkeypatch.setattr(digest.json, "loads", lambda data: (parsed.append(len(data)), real(data))[1])
    for _ in range(20):
        files_sha256([tmp_path / "a"])
    assert (len(parsed), hashed) == (1, ["a"])
    script = f"""
from pathlib import Path
from distft.store import digest
digest.YOUNG_SECONDS = 0.0
digest.files_sha256([Path({str(tmp_path / "b")!r})])
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])
    for _ in range(20):
        files_sha256([tmp_path / "a", tmp_path / "b"])
    assert (len(parsed), hashed) == (2, ["a"]), "what the other learnt is taken up"


def test_processes_that_learn_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from distft.store import digest
digest.YOUNG_SECONDS = 0.0
for path in sys.argv[1:]:
    digest.files_sha256([Path(path)])
"""
    names = [[str(tmp_path / f"{who}-{n}") for n in range(40)] for who in range(4)]
    for path in (path for mine in names for path in mine):
        Path(path).write_text(path)
    started = [subprocess.Popen([sys.executable, "-c", script, *mine], cwd=Path(__file__).parents[3]) for mine in names]
    assert [one.wait() for one in started] == [0] * 4
    assert len(json.loads(digest.memo_path().read_bytes())["digests"]) == 160


def test_much_to_read_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(digest, "SHOWN_FROM_BYTES", 100)
    for name, size in (("a", 60), ("b", 170)):
        (tmp_path / name).write_bytes(bytes(size))
    files_sha256([tmp_path / "a"])
    assert capsys.readouterr().err == ""
    files_sha256([tmp_path / "a", tmp_path / "b"])
    assert "checking files: 170 of 170 bytes" in capsys.readouterr().err
    with pytest.raises(MissingArtifactError):
        files_sha256([tmp_path / "a", tmp_path / "b", tmp_path / "none"])


def test_a_file_that_goes_once_its_digest_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each look at it: it is missing, or its digest is what it was."""
    monkeypatch.setattr(digest, "SHOWN_FROM_BYTES", 1)
    path, plain, looks = tmp_path / "a", digest._key, list[Path]()

    def key(path: Path) -> tuple[str, float]:
        found = plain(path)
        looks.append(path)
        if len(looks) == last:
            path.unlink()
        return found

    monkeypatch.setattr(digest, "_key", key)
    for last in (2, 3):
        looks.clear()
        path.write_bytes(b"one")
        if last == 2:
            with pytest.raises(MissingArtifactError, match="no file"):
                files_sha256([path])
        else:
            assert files_sha256([path]) == {path: hashlib.sha256(b"one").hexdigest()}
        assert not path.exists()


def test_a_large_file_is_shown_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "SHOWN_FROM_BYTES", 100)
    monkeypatch.setattr(digest, "READ_BYTES", 64)
    (tmp_path / "a").write_bytes(bytes(150))
    advanced: list[float] = []

    class Meter:
        def advance(self, amount: float = 1.0, note: str = "", figures: Any = None) -> None:
            advanced.append(amount)

    monkeypatch.setattr(digest, "track", lambda *_: contextlib.nullcontext(Meter()))
    assert files_sha256([tmp_path / "a"]) == {tmp_path / "a": hashlib.sha256(bytes(150)).hexdigest()}
    assert advanced == [64, 64, 22]
