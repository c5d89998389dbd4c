"""Manifests: identity, commit, and what is believed of a file that anyone may have written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from distft.store import manifest as manifests
from distft.store.location import Location, open_location
from distft.store.manifest import (
    FileEntry,
    Manifest,
    commit,
    describe,
    differences,
    fetch,
    fingerprint,
    read_manifest,
    verify_files,
)
from tests.helpers.race import race

IDENTITY = {"model": {"weights": "ab" * 32, "dtype": "bfloat16"}, "k": 128, "min_prob": 1e-3}


def put(store: Location, name: str, data: bytes) -> FileEntry:
    assert store.create(name, data)
    return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), facts={"rows": 1})


def artifact(store: Location, *, contents: tuple[bytes, ...] = (b"one", b"two"), tag: str = "a", **identity: Any) -> Manifest:
    files = tuple(put(store, f"data/{tag}-{index}", data) for index, data in enumerate(contents))
    return Manifest(kind="teacher", identity=IDENTITY | identity, files=files, facts={"documents": 2})


def test_a_committed_manifest_reads_back(store: Location) -> None:
    assert read_manifest(store) is None
    manifest = commit(store, artifact(store))
    assert read_manifest(store) == manifest
    assert pickle.loads(pickle.dumps(manifest)) == manifest  # noqa: S301  our own bytes
    verify_files(store, manifest)


def test_identity_is_kind_and_values_and_nothing_else() -> None:
    same = fingerprint("teacher", {"b": 1, "a": {"y": 0.1, "x": None}})
    assert same == fingerprint("teacher", {"a": {"x": None, "y": 0.1}, "b": 1})
    others: list[dict[str, Any]] = [
        {"b": 1.0, "a": {"y": 0.1, "x": None}}, {"b": 1, "a": {"y": 0.1 + 2**-54, "x": None}},
        {"b": True, "a": {"y": 0.1, "x": None}}, {"b": 1, "a": {"y": 0.1}}, {"b": "1", "a": {"y": 0.1, "x": None}},
    ]  # fmt: skip
    assert (
        len({same, fingerprint("corpus", {"b": 1, "a": {"y": 0.1, "x": None}}), *(fingerprint("teacher", o) for o in others)})
        == 7
    )


def test_a_fingerprint_is_pinned() -> None:
    """Caches on disk are found by it: a change here orphans all of them and needs a format version."""
    assert fingerprint("teacher", {"k": 128, "min_prob": 1e-3, "name": "é"}) == (
        hashlib.sha256(b'{"identity":{"k":128,"min_prob":0.001,"name":"\\u00e9"},"kind":"teacher"}').hexdigest()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, b"x", {1, 2}, Path("x")])
def test_identities_are_plain_finite_json(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"a\.b"):
        fingerprint("teacher", {"a": {"b": value}})


def test_content_digest_knows_bytes_and_order_and_no_names(tmp_path: Path) -> None:
    def digest(tag: str, *contents: bytes, **identity: Any) -> str:
        return artifact(open_location(str(tmp_path / tag)), contents=contents, tag=tag, **identity).content_digest

    base = digest("a", b"one", b"two")
    assert digest("b", b"one", b"two") == base
    assert digest("c", b"two", b"one") != base
    assert digest("d", b"one", b"twp") != base
    assert digest("e", b"one", b"two", k=64) != base


def test_the_clock_is_in_the_file_and_in_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = artifact(open_location(str(tmp_path)))
    first = json.loads(manifest.to_json())
    monkeypatch.setattr(manifests.time, "gmtime", lambda: (2000, 1, 1, 0, 0, 0, 0, 1, 0))
    second = json.loads(manifest.to_json())
    assert first["created"] != second["created"]
    assert first["id"] == second["id"] == manifest.id == fingerprint("teacher", IDENTITY)[:16]


def test_differences_are_dotted_and_described() -> None:
    found = differences(IDENTITY, {"model": {"weights": "cd" * 32, "dtype": "bfloat16"}, "k": 128, "seed": 0})
    assert [(d.field, d.new) for d in found] == [("min_prob", manifests.ABSENT), ("model.weights", "cd" * 32), ("seed", 0)]
    assert describe(found) == "min_prob: 0.001 -> (absent)\nmodel.weights: abababababab -> cdcdcdcdcdcd\nseed: (absent) -> 0"
    assert differences(IDENTITY, dict(reversed(IDENTITY.items()))) == []
    assert [d.field for d in differences({"a": 1}, {"a": 1.0})] == ["a"]


def test_whoever_is_second_joins_the_first(store: Location) -> None:
    first = commit(store, artifact(store, tag="a"))
    second = artifact(store, tag="b")
    assert commit(store, second) == first
    assert read_manifest(store) == first


def test_another_artifact_in_the_same_place_is_refused_by_field(store: Location) -> None:
    first = commit(store, artifact(store, tag="a"))
    with pytest.raises(StaleArtifactError, match="k: 128 -> 64"):
        commit(store, artifact(store, tag="b", k=64))
    assert read_manifest(store) == first


def test_two_threads_commit_and_agree(store: Location) -> None:
    ready = [artifact(store, tag=tag) for tag in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        agreed = set(pool.map(lambda m: json.dumps([f.name for f in commit(store, m).files]), ready))
    assert len(agreed) == 1


COMMITTER = """
import hashlib, sys
from distft.store.location import open_location
from distft.store.manifest import FileEntry, Manifest, commit
store, me = open_location(sys.argv[1]), sys.argv[2]
data = me.encode()
store.create(f"data/{me}", data)
entry = FileEntry(name=f"data/{me}", size=len(data), sha256=hashlib.sha256(data).hexdigest())
manifest = Manifest(kind="corpus", identity={"a": 1}, files=(entry,))
"""


def test_two_processes_commit_at_once_and_agree(store: Location) -> None:
    answers = set(race(store.url, ["x", "y"], prepare=COMMITTER, act="print(commit(store, manifest).files[0].name)"))
    found = read_manifest(store)
    assert found is not None
    assert answers == {found.files[0].name}


@pytest.mark.parametrize("change", ["missing", "longer"])
def test_nothing_is_committed_over_files_that_are_not_there(store: Location, change: str) -> None:
    manifest = artifact(store)
    if change == "missing":
        store.delete("data/a-1")
    else:
        store.replace("data/a-1", b"two!")
    with pytest.raises(CorruptArtifactError, match="data/a-1"):
        commit(store, manifest)
    assert read_manifest(store) is None


def test_every_flipped_bit_of_a_manifest_is_found_or_harmless(tmp_path: Path) -> None:
    store = open_location(str(tmp_path))
    manifest = commit(store, artifact(store))
    good = store.read("MANIFEST.json")
    refused = 0
    for position in range(len(good)):
        for bit in range(8):
            torn = bytearray(good)
            torn[position] ^= 1 << bit
            try:
                assert manifests.parse_manifest(bytes(torn), "x") == manifest
            except CorruptArtifactError:
                refused += 1
    assert refused == 8 * len(good)


@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_a_truncated_manifest_is_corrupt(tmp_path: Path, length: int) -> None:
    store = open_location(str(tmp_path))
    commit(store, artifact(store))
    store.replace("MANIFEST.json", store.read("MANIFEST.json")[:length])
    with pytest.raises(CorruptArtifactError, match="not a sound manifest"):
        read_manifest(store)


def rewritten(manifest: Manifest, change: Any) -> bytes:
    """A manifest changed by someone who knows how to compute its sha256."""
    document = json.loads(manifest.to_json())
    del document["sha256"]
    change(document)
    return json.dumps(document | {"sha256": manifests._sha256(document)}).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["files"][0].update(name="../../etc/passwd"),
        lambda d: d["files"][0].update(name="/etc/passwd"),
        lambda d: d["files"][0].update(name="data/../../x"),
        lambda d: d["files"][0].update(size=-1),
        lambda d: d["files"][0].update(size=True),
        lambda d: d["files"][0].update(size="3"),
        lambda d: d["files"][0].update(sha256="short"),
        lambda d: d["files"].append(d["files"][0]),
        lambda d: d["files"][0].pop("facts"),
        lambda d: d.update(files=7),
        lambda d: d.update(identity=[]),
        lambda d: d.update(id="0" * 16),
        lambda d: d.update(version=2),
        lambda d: d.update(format="other"),
        lambda d: d["identity"].update(k=129),
    ],
)
def test_a_manifest_with_a_right_sha256_and_wrong_contents_is_refused(tmp_path: Path, change: Any) -> None:
    store = open_location(str(tmp_path))
    manifest = artifact(store)
    assert manifests.parse_manifest(rewritten(manifest, lambda d: None), "x") == manifest
    with pytest.raises(CorruptArtifactError):
        manifests.parse_manifest(rewritten(manifest, change), "x")


@pytest.mark.parametrize("data", [b"[" * 100_000, b"null", b"\xff", b'{"format": "distft-manifest", "version": 1, "k": NaN}'])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptArtifactError):
        manifests.parse_manifest(data, "x")


def test_a_newer_format_says_upgrade(tmp_path: Path) -> None:
    data = rewritten(artifact(open_location(str(tmp_path))), lambda d: d.update(version=2))
    with pytest.raises(CorruptArtifactError, match="Upgrade"):
        manifests.parse_manifest(data, "x")


def test_verify_names_every_bad_file(store: Location) -> None:
    manifest = commit(store, artifact(store, contents=(b"one", b"two", b"three", b"four")))
    store.replace("data/a-0", b"onf")
    store.delete("data/a-1")
    store.replace("data/a-2", b"thre")
    with pytest.raises(CorruptArtifactError) as found:
        verify_files(store, manifest)
    assert "3 of 4 files" in found.value.problem
    for name in ("data/a-0: sha256", "data/a-1: missing", "data/a-2: 4 bytes, not 5"):
        assert name in found.value.problem
    assert "data/a-3" not in found.value.problem


def test_verify_counts_every_byte(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "STREAM_BYTES", 7)
    manifest = artifact(store, contents=(b"x" * 100, b"y" * 33))

    class Meter:
        done = 0.0

        def advance(self, amount: float = 1.0, note: str = "", figures: Any = None) -> None:
            self.done += amount

    meter = Meter()
    verify_files(store, manifest, meter)
    assert meter.done == 133


def test_fetch_gives_a_path_whose_bytes_were_checked(store: Location, tmp_path: Path) -> None:
    entry = put(store, "data/x", b"payload")
    path = fetch(store, entry, tmp_path / "staging")
    assert path.read_bytes() == b"payload"
    assert fetch(store, entry, tmp_path / "staging") == path
    if store.local("data/x"):
        assert path == store.local("data/x")
        assert not (tmp_path / "staging").exists()


def test_fetch_refuses_changed_bytes_even_after_it_has_seen_good_ones(store: Location, tmp_path: Path) -> None:
    entry = put(store, "data/x", b"payload")
    fetch(store, entry, tmp_path / "one")
    store.replace("data/x", b"Payload")
    with pytest.raises(CorruptArtifactError, match="data/x"):
        fetch(store, entry, tmp_path / "two")
    store.replace("data/x", b"short")
    with pytest.raises(CorruptArtifactError, match="5 bytes, not 7"):
        fetch(store, entry, tmp_path / "two")
    store.delete("data/x")
    with pytest.raises(CorruptArtifactError, match="missing"):
        fetch(store, entry, tmp_path / "two")
    with pytest.raises(CorruptArtifactError):
        fetch(store, replace(entry, name="../x"), tmp_path / "two")
    left = (tmp_path / "two").glob("*") if (tmp_path / "two").exists() else []
    assert [path for path in left if not path.name.endswith(".lock")] == []


def test_fetch_sees_a_change_behind_a_restored_mtime(tmp_path: Path) -> None:
    store = open_location(str(tmp_path / "store"))
    entry = put(store, "data/x", b"payload")
    path = fetch(store, entry, tmp_path)
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"P")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CorruptArtifactError):
        fetch(store, entry, tmp_path)


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_location(str(tmp_path / "store"))
    entry = put(store, "data/x", b"payload")
    hashed: list[Path] = []
    real = manifests.file_sha256
    monkeypatch.setattr(manifests, "file_sha256", lambda path: (hashed.append(path), real(path))[1])
    for _ in range(3):
        fetch(store, entry, tmp_path)
    assert len(hashed) == 1


def test_a_staged_file_that_was_tampered_with_is_fetched_again(s3_url: str, tmp_path: Path) -> None:
    store = open_location(s3_url)
    entry = put(store, "data/x", b"payload")
    path = fetch(store, entry, tmp_path)
    path.write_bytes(b"Payload")
    assert fetch(store, entry, tmp_path).read_bytes() == b"payload"


def test_eight_fetches_download_once(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.store.s3 import S3Location

    store = open_location(s3_url)
    entry = put(store, "data/x", b"payload")
    downloads: list[str] = []
    real = S3Location.download
    monkeypatch.setattr(S3Location, "download", lambda self, name, path: (downloads.append(name), real(self, name, path))[1])
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: fetch(store, entry, tmp_path), range(8)))
    assert downloads == ["data/x"]
    assert paths == {tmp_path / entry.sha256}


def test_reading_what_is_absent_is_not_an_empty_artifact(store: Location) -> None:
    with pytest.raises(MissingArtifactError):
        store.read("MANIFEST.json")
