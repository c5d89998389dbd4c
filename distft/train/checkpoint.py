"""Checkpoints without pickle: float32 weights and both Adam moments as safetensors, committed by a manifest, last.

A checkpoint is complete or it is not one. Loading verifies every byte, and falls back to the one before, by name, when some are
wrong. The randomness of a step is a function of (seed, step, rank), so no generator state needs keeping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from distft.engine.base import Engine
from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from distft.progress import say
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit, describe, differences, fetch, read_manifest
from distft.store.put import put_file
from distft.train.owner import Owner
from distft.train.record import committed_steps, newest_checkpoint, step_folder

PARTS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    step: int
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. `identity` is what training depends on; one made from anything else is refused."""

    def __init__(self, folder: Location, identity: dict[str, Any], *, keep: int) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep
        self.owner = Owner(folder)

    def save(self, step: int, engine: Engine, facts: dict[str, Any]) -> None:
        """Commits step's checkpoint, then removes those that are too old. Called by the leading rank alone."""
        from safetensors.torch import save_file

        self.owner.check()
        where = step_folder(self.folder, step)
        tensors: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        for name, tensor in engine.tensors():
            part, _, parameter = name.partition("/")
            tensors[part][parameter] = tensor.detach().cpu().contiguous()
        entries = []
        for part in PARTS:
            entries.append(put_file(where, part, "safetensors", partial(save_file, tensors[part]), {"part": part}))
        identity = {"step": step, "run": self.identity}
        ours = Manifest(kind="checkpoint", identity=identity, files=tuple(entries), facts=facts)
        if commit(where, ours).files != ours.files:  # a former owner was writing the same: its bytes are as good
            for entry in entries:
                where.delete(entry.name)
            if not self.owner.claimed:
                raise StaleArtifactError(f"Step {step} was committed by another process.", where=where.url)
        self.owner.check()  # before anything is removed: a new owner may go on from what looks old here
        for old in self.steps()[: -self.keep]:
            _remove(step_folder(self.folder, old))

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return committed_steps(self.folder)

    def restore(self, engine: Engine, staging: Path) -> Restored | None:
        """Puts the newest good checkpoint into the engine; None when there is none to go on from."""
        for step in reversed(self.steps()):
            where = step_folder(self.folder, step)
            try:
                manifest = self._read(where)
                tensors = {
                    f"{entry.facts['part']}/{name}": tensor
                    for entry in manifest.files
                    for name, tensor in read_tensors(where, entry, staging)
                }
            except CorruptArtifactError as error:
                say(f"{error}\nGoing on from the checkpoint before it; the bad one is set aside.")
                set_aside(where)
                continue
            engine.restore(tensors, optimizer_steps=step)
            return Restored(step=step, facts=manifest.facts)
        return None

    def newest(self) -> tuple[Location, Manifest] | None:
        """The newest checkpoint's folder and manifest, its files unread."""
        found = newest_checkpoint(self.folder)
        return None if found is None else (found[0], self._own(*found))

    def _read(self, where: Location) -> Manifest:
        manifest = read_manifest(where)
        if manifest is None:
            raise CorruptArtifactError("The checkpoint's manifest vanished.", where=where.url)
        return self._own(where, manifest)

    def _own(self, where: Location, manifest: Manifest) -> Manifest:
        """The manifest itself, when it is of this very run."""
        changed = differences(manifest.identity["run"], self.identity)
        if changed:
            raise StaleArtifactError(
                f"This run's checkpoint was made from something else:\n{describe(changed)}", where=where.url,
                help="Undo the change to go on with the run, or give the new one another `name`.",
            )  # fmt: skip
        return manifest


def read_tensors(where: Location, entry: FileEntry, staging: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one verified file."""
    from safetensors import safe_open

    with safe_open(fetch(where, entry, staging), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
            yield name, file.get_tensor(name)


def _remove(where: Location) -> None:
    """The manifest first: what it named may then vanish in any order."""
    where.delete("MANIFEST.json")
    for name in where.names(recursive=True):
        where.delete(name)


def set_aside(where: Location) -> None:
    """Takes a damaged checkpoint out of the run: keeps the bytes for whoever wants to look, and takes the name that made them one."""
    with suppress(MissingArtifactError):  # another rank was first
        where.create(f"SET-ASIDE-{uuid4().hex}.json", where.read("MANIFEST.json"))
    where.delete("MANIFEST.json")
