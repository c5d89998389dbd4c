"""Which teacher caches a store has, told from their manifests alone: whose they are, what they hold, which runs used them.

Torch-free, and no data file is opened. A cache whose manifests are damaged is listed with its trouble, so that one bad file does not
hide the others.
"""

from __future__ import annotations

import json
import re
import time
from calendar import timegm
from dataclasses import dataclass
from typing import Any

import yaml

from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError, UserInputError
from distft.store.location import Location, open_location
from distft.store.manifest import Manifest, parse_manifest, read_manifest
from distft.teacher.head_file import head_bytes
from distft.teacher.identity import FORMAT, IDENTITY, held_documents, is_whole, quarantined_documents, read_parts
from distft.train.record import newest_checkpoint

_ID = re.compile(r"[0-9a-f]{1,16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCache:
    """A cache's folder and whose it is. `store` is the one that the folder lies in; None for a copy that lies elsewhere."""

    folder: Location
    store: Location | None
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def identity(self) -> dict[str, Any]:
        return self.manifest.identity


def find_cache(text: str, store: str) -> FoundCache:
    """The cache that a person means: a folder or s3:// address, or the beginning of an id in `store`. What can be read is of the
    format that this distft reads."""
    found = _by_id(text, open_location(store)) if _ID.fullmatch(text) else _by_place(text)
    form = found.identity.get("format")
    if form != FORMAT:
        raise StaleArtifactError(f"The cache has the format {form!r}; this distft reads {FORMAT!r}.", where=found.folder.url,
                                 help="Run `distft score` with the run file that it was made for; it makes a new one.")  # fmt: skip
    return found


def _by_id(text: str, store: Location) -> FoundCache:
    there = store.child("teacher").folders()
    fitting = [name for name in there if name.startswith(text)]
    if not fitting:
        listed = ", ".join(there[:10]) or "none"
        raise MissingArtifactError(f"No teacher cache here begins with {text}. Caches here: {listed}.", where=store.url,
                                   help="Give the right --store, or the cache's folder.")  # fmt: skip
    if len(fitting) > 1:
        raise UserInputError(f"{len(fitting)} caches begin with {text}: {', '.join(fitting[:10])}.", where=store.url,
                             help="Give more digits of the one that you mean.")  # fmt: skip
    return _read(store.child("teacher", fitting[0]), store)


def _by_place(text: str) -> FoundCache:
    folder, store = open_location(text), None
    parent, _, name = folder.url.rpartition("/")
    above = parent.removesuffix("/teacher")
    if above not in (parent, "", "s3:/"):
        store = open_location(above)
        folder = store.child("teacher", name)
    return _read(folder, store)


def _read(folder: Location, store: Location | None) -> FoundCache:
    try:
        data = folder.read(IDENTITY)
    except MissingArtifactError:
        raise MissingArtifactError(
            f"There is no teacher cache in this folder: it has no {IDENTITY}.", where=folder.url,
            help="Give the folder that `distft score` printed; `distft cache list --store STORE` shows all of a store.",
        ) from None  # fmt: skip
    manifest = parse_manifest(data, f"{folder.url}/{IDENTITY}")
    if manifest.kind != "teacher":
        raise CorruptArtifactError(f"A {manifest.kind} where a teacher cache should be.", where=folder.url,
                                   help="Give the folder that `distft score` printed.")  # fmt: skip
    return FoundCache(folder=folder, store=store, manifest=manifest)


def cache_folders(store: Location) -> list[Location]:
    """The folders of a store's caches; what has no identity is none."""
    folders = (store.child("teacher", name) for name in store.child("teacher").folders())
    return [folder for folder in folders if folder.exists(IDENTITY)]


def list_caches(store: Location) -> list[dict[str, Any]]:
    """One object per cache, the oldest first. A document that two parts hold counts once; its tokens, entries and bytes are there
    twice and count so."""
    users = run_uses(store)
    return sorted(
        (_entry(store.child("teacher", name), users) for name in store.child("teacher").folders()),
        key=lambda entry: (entry["created"] or "", entry["id"]),
    )


def _entry(folder: Location, users: list[RunUse]) -> dict[str, Any]:
    name = folder.url.rpartition("/")[2]
    entry: dict[str, Any] = {"id": name, "cache": folder.url, "problem": None, "created": None, "age_seconds": None, "runs": []}
    try:
        found = _read(folder, None)
        entry |= _dates(folder) | {
            "teacher": {key: found.identity.get(key) for key in ("weights", "vocabulary", "dtype")},
            "policy": {key: found.identity.get(key) for key in ("distribution", "positions")},
            "runs": [use.run for use in users if use.used(found.manifest)],
        }
        told = figures(folder)
        entry |= told | {"bytes": told["bytes"] + told["head_bytes"]}
        if found.identity.get("format") != FORMAT:
            entry["problem"] = f"format {found.identity.get('format')!r}; this distft reads {FORMAT!r}"
    except (CorruptArtifactError, MissingArtifactError) as error:
        entry["problem"] = error.problem
    return entry


def figures(folder: Location) -> dict[str, Any]:
    """What a cache's committed parts add up to. `head_bytes` stand beside `bytes`: however many tokens there are, a head is one."""
    parts, rooms = read_parts(folder), folder.child("coverage")
    coverage = [read_manifest(rooms, name) for name in rooms.names()]
    size, scored = sum(entry.size for part in parts for entry in part.files), sum(part.facts["scored_tokens"] for part in parts)
    return {
        "documents": len(held_documents(parts)),
        "quarantined": len(quarantined_documents(parts)),
        "tokens": sum(part.facts["tokens"] for part in parts),
        "scored_tokens": scored,
        "entries": sum(part.facts["entries"] for part in parts),
        "bytes": size,
        "bytes_per_token": size / max(1, scored),
        "head_bytes": head_bytes(folder),
        "parts": len(parts),
        "corpora_covered": sum(stated is not None and is_whole(stated) for stated in coverage),
    }


def _dates(folder: Location) -> dict[str, Any]:
    """When the cache was begun. The clock is outside of every identity, so a manifest's reader does not return it."""
    created = json.loads(folder.read(IDENTITY)).get("created")
    try:
        began = timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ"))
    except (TypeError, ValueError):
        return {}
    return {"created": created, "age_seconds": max(0.0, time.time() - began)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunUse:
    """What a run with a committed checkpoint says of the cache that it used."""

    run: str
    teacher: str | None
    """The id of the cache that it was trained against."""
    meter: dict[str, Any] | None
    """Fields of the identity of the cache that its drift was measured with; None without one, or where the teacher was another
    model, which its checkpoint does not name."""

    def used(self, cache: Manifest) -> bool:
        if self.teacher is not None:
            return self.teacher == cache.id
        return self.meter is not None and self.meter.items() <= {k: _hashable(v) for k, v in cache.identity.items()}.items()


def run_uses(store: Location) -> list[RunUse]:
    """What each run of the store used. A run without a committed checkpoint has used nothing yet; one that cannot be read is left
    out: the verbs that need it say what is wrong with it."""
    found = []
    for name in store.child("runs").folders():
        folder = store.child("runs", name)
        try:
            newest = newest_checkpoint(folder.child("checkpoints"))
            if newest is None:
                continue
            identity = newest[1].identity["run"]
            teacher = identity["teacher"]
            meter = None if teacher else _meter(yaml.safe_load(folder.read("config.yaml")), identity)
        except (CorruptArtifactError, MissingArtifactError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            continue
        found.append(RunUse(run=name, teacher=teacher, meter=meter))
    return found


def _meter(config: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any] | None:
    """The cache of the forgetting meter, of a run whose objective reads none: the model's own, as the run file asks for it."""
    if config["data"].get("heldout") is None or config["teacher"].get("path") is not None:
        return None
    fields = {
        "weights": identity["weights"], "dtype": config["teacher"].get("dtype") or config["model"]["dtype"],
        "distribution": config["score"]["distribution"], "positions": config["score"]["positions"],
    }  # fmt: skip
    return {key: _hashable(value) for key, value in fields.items()}


def _hashable(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
