"""Manifests: the list of files that makes a folder an artifact.

Data files have unique names and mean nothing until a manifest names them with size and sha256. The manifest is put if absent,
so it appears whole or not at all, and once. An artifact is the same as another when kind and identity are equal; paths, unique
names and the clock are outside of every digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from distft.progress import Meter
from distft.store.digest import file_sha256
from distft.store.local import explained
from distft.store.location import Location, check_name
from distft.store.lock import exclusively

FORMAT: Final = "distft-manifest"
VERSION: Final = 1
ABSENT: Final = "(absent)"
"""Stands for the value of a field that one side does not have."""

STREAM_BYTES = 16 << 20

_HEX = re.compile(r"[0-9a-f]{64}")
_verified: dict[tuple[object, ...], str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of an artifact; `facts` say what is in it (rows, a shard number) and belong to no digest."""

    name: str
    size: int
    sha256: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact is (`kind`, `identity`), which files it consists of, in an order with a meaning, and figures about it."""

    kind: str
    identity: dict[str, Any]
    files: tuple[FileEntry, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return fingerprint(self.kind, self.identity)[:16]

    @property
    def content_digest(self) -> str:
        """sha256 over kind, identity and the files' bytes in order: equal for two builds exactly when they made the same."""
        return _sha256({"kind": self.kind, "identity": self.identity, "files": [entry.sha256 for entry in self.files]})

    def to_json(self) -> bytes:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "id": self.id,
            "identity": self.identity,
            "files": [{"name": f.name, "size": f.size, "sha256": f.sha256, "facts": f.facts} for f in self.files],
            "facts": self.facts,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return json.dumps(document | {"sha256": _sha256(document)}, indent=1, allow_nan=False).encode()


@dataclass(frozen=True, slots=True)
class Difference:
    """A field (dotted path) of two identities that differ in it."""

    field: str
    old: Any
    new: Any


def fingerprint(kind: str, identity: dict[str, Any]) -> str:
    """sha256 of an identity. Any change of a value, a type (1 and 1.0) or a key changes it; the order of keys does not."""
    return _sha256({"kind": kind, "identity": identity})


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """The fields in which two identities differ, sorted; lists are compared whole."""
    found: list[Difference] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [Difference(f"{key}.{d.field}", d.old, d.new) for d in differences(before, after)]
        elif _canonical(before) != _canonical(after):
            found.append(Difference(key, before, after))
    return found


def describe(differences: Iterable[Difference]) -> str:
    """A line per field, for a person; long digests are cut to twelve digits."""

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{4,}\b", r"\1", text)
        return text if len(text) <= 120 else text[:117] + "..."

    return "\n".join(f"{d.field}: {short(d.old)} -> {short(d.new)}" for d in differences)


def commit(folder: Location, manifest: Manifest, name: str = "MANIFEST.json") -> Manifest:
    """Makes the folder's files an artifact. Where another process was first, theirs is returned when it is the same artifact: all
    that use it then agree on one set of files."""
    _check_present(folder, manifest)
    data = manifest.to_json()
    parse_manifest(data, folder.url)  # what cannot be read back must not be committed
    if folder.create(name, data):
        return manifest
    theirs = read_manifest(folder, name)
    if theirs is None:
        raise StaleArtifactError(f"{folder.url}/{name} was there and vanished", where=folder.url, help="Run the command again.")
    if fingerprint(theirs.kind, theirs.identity) == fingerprint(manifest.kind, manifest.identity):
        return theirs
    listed = describe(differences({"kind": theirs.kind, **theirs.identity}, {"kind": manifest.kind, **manifest.identity}))
    raise StaleArtifactError(
        f"another {theirs.kind} is here already, made from something else:\n{listed}",
        where=folder.url,
        help="Give the run another name, or remove that folder if nothing needs it.",
    )


def read_manifest(folder: Location, name: str = "MANIFEST.json") -> Manifest | None:
    """The artifact in a folder, or None where none is committed."""
    try:
        try:
            return parse_manifest(folder.read(name), f"{folder.url}/{name}")
        except CorruptArtifactError:
            # As in `fetch`: a reply with wrong bytes may pass, and a second try decides.
            return parse_manifest(folder.read(name), f"{folder.url}/{name}")
    except MissingArtifactError:
        return None


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Reads a manifest's bytes, which anyone may have written: everything is checked before anything is believed."""

    def corrupt(why: str) -> CorruptArtifactError:
        help = "Restore the file, or remove the artifact's folder and run the stage again."
        return CorruptArtifactError(f"{where} is not a sound manifest: {why}", where=where, help=help)

    try:
        document = json.loads(data)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise corrupt(f"it is not a {FORMAT}")
        if document.get("version") != VERSION:
            help = "Upgrade distft here, or build the artifact again."
            problem = f"{where} has format version {document.get('version')!r}; this distft reads version {VERSION}"
            raise CorruptArtifactError(problem, where=where, help=help)
        claimed = document.pop("sha256", None)
        if claimed != _sha256(document):
            raise corrupt("its own sha256 does not fit: it was changed or damaged")
        files = tuple(_parse_entry(item, where) for item in document["files"])
        kind, identity, facts = document["kind"], document["identity"], document["facts"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise corrupt(f"{type(error).__name__}: {error}"[:300]) from error
    if not isinstance(kind, str) or not isinstance(identity, dict) or not isinstance(facts, dict):
        raise corrupt("kind, identity or facts are not of their types")
    if len({entry.name for entry in files}) != len(files):
        raise corrupt("it names a file twice")
    manifest = Manifest(kind=kind, identity=identity, files=files, facts=facts)
    if manifest.id != document.get("id"):
        raise corrupt(f"its id {document.get('id')!r} is not that of its identity, {manifest.id}")
    return manifest


def _parse_entry(item: dict[str, Any], where: str) -> FileEntry:
    name, size, sha256, facts = item["name"], item["size"], item["sha256"], item["facts"]
    if not isinstance(name, str) or type(size) is not int or size < 0 or not isinstance(facts, dict):
        raise TypeError(f"file entry {item!r}")
    if not isinstance(sha256, str) or not _HEX.fullmatch(sha256):
        raise ValueError(f"sha256 of {name!r}")
    return FileEntry(name=check_name(name, where), size=size, sha256=sha256, facts=facts)


def verify_files(folder: Location, manifest: Manifest, progress: Meter | None = None) -> None:
    """Reads every byte of every file, and names all that are not as promised. `progress` counts bytes."""
    wrong: list[str] = []
    for entry in manifest.files:
        try:
            found = _sha256_at(folder, entry, progress)
        except MissingArtifactError:
            wrong.append(f"{entry.name}: missing")
        except CorruptArtifactError as error:
            wrong.append(f"{entry.name}: {error.problem}")
        else:
            if found != entry.sha256:
                wrong.append(f"{entry.name}: sha256 {found[:12]}, not {entry.sha256[:12]}")
    if wrong:
        raise _corrupt(folder, f"{len(wrong)} of {len(manifest.files)} files are not as the manifest says:\n" + "\n".join(wrong))


def fetch(folder: Location, entry: FileEntry, staging: Path) -> Path:
    """A local path of a file whose bytes are those promised. A local store's file is checked where it is; one on S3 is brought to
    `staging`, once for all processes of this machine. A process checks the same unchanged file once."""
    path = folder.local(entry.name)
    if path is not None:
        problem = _problem(path, entry)
        if problem:
            raise _corrupt(folder, f"{entry.name}: {problem}")
        return path
    check_name(entry.name, folder.url)
    target = staging / entry.sha256
    with exclusively(staging / f"{entry.sha256}.lock"):
        if _problem(target, entry) is None:
            return target
        # A reply with wrong bytes may pass; bytes that are wrong in the store do not, so a second try decides.
        problem = _download(folder, entry, target) and _download(folder, entry, target)
    if problem:
        raise _corrupt(folder, f"{entry.name}: {problem}")
    return target


def _download(folder: Location, entry: FileEntry, target: Path) -> str | None:
    """Brings a file to `target` if its bytes are right; else says what is wrong with them, and nothing is there."""
    partial = target.with_name(f".{uuid4().hex}")
    try:
        try:
            if folder.size(entry.name) != entry.size:
                return f"{folder.size(entry.name)} bytes, not {entry.size}"
            folder.download(entry.name, partial)
        except MissingArtifactError:
            return "missing"
        except CorruptArtifactError as error:
            return error.problem
        problem = _problem(partial, entry)
        if problem is None:
            with explained("write", target):
                os.replace(partial, target)
            _problem(target, entry)  # remembers it under its final name and times
        return problem
    finally:
        with suppress(OSError):
            partial.unlink()


def _problem(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with a local file; None when its bytes are those promised, as far as this process has seen them unchanged."""
    try:
        before = path.stat()
        # ctime as well: nothing can be written without changing it, even where mtime is put back.
        key = (str(path), before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, before.st_dev)
        if before.st_size != entry.size:
            return f"{before.st_size} bytes, not {entry.size}"
        if key not in _verified:
            _verified[key] = file_sha256(path)
    except FileNotFoundError:
        return "missing"
    found = _verified[key]
    return None if found == entry.sha256 else f"sha256 {found[:12]}, not {entry.sha256[:12]}"


def _sha256_at(folder: Location, entry: FileEntry, progress: Meter | None) -> str:
    size = folder.size(entry.name)
    if size != entry.size:
        raise CorruptArtifactError(f"{size} bytes, not {entry.size}")
    digest = hashlib.sha256()
    for start in range(0, size, STREAM_BYTES):
        block = folder.read_range(entry.name, start, min(STREAM_BYTES, size - start))
        digest.update(block)
        if progress is not None:
            progress.advance(len(block))
    return digest.hexdigest()


def _check_present(folder: Location, manifest: Manifest) -> None:
    def problem(entry: FileEntry) -> str | None:
        try:
            size = folder.size(entry.name)
        except MissingArtifactError:
            return f"{entry.name}: missing"
        return None if size == entry.size else f"{entry.name}: {size} bytes, not {entry.size}"

    with ThreadPoolExecutor(8) as pool:
        wrong = [found for found in pool.map(problem, manifest.files) if found]
    if wrong:
        raise _corrupt(folder, "the manifest was not written, for its files are not all there:\n" + "\n".join(wrong))


def _corrupt(folder: Location, problem: str) -> CorruptArtifactError:
    help = "Restore the files from a copy, or remove the artifact's folder and run its stage again."
    return CorruptArtifactError(problem, where=folder.url, help=help)


def _sha256(document: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(document).encode()).hexdigest()


def _canonical(value: Any) -> str:
    """One text per JSON value: keys sorted, floats in the shortest form that reads back exactly, nothing else let through."""
    _check_json(value, "")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_json(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path or 'document'} has the key {key!r}; JSON keys are strings")
            _check_json(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_json(inner, f"{path}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}; identities hold finite numbers")
    elif value is not None and not isinstance(value, str | int):
        raise TypeError(f"{path} is {type(value).__name__}, which JSON does not know")
