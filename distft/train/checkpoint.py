"""Checkpoints without pickle: float32 weights and both Adam moments, a file per rank, committed by a manifest, last.

A checkpoint is complete or it is not one. Saving blocks for a copy in memory; a thread writes it while training goes on, and the
leading rank's commits what all have written. They meet in the store and not in a collective, which would have to wait for its turn
among those of training. Loading verifies every block that it reads, on any number of ranks, and falls back to the checkpoint before,
by name, when one is wrong. The randomness of a step is a function of (seed, step, rank), so no generator state needs keeping.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import torch

from distft.engine.base import Engine
from distft.engine.world import PATIENCE, World
from distft.errors import CorruptArtifactError, DistftError, MissingArtifactError, StaleArtifactError
from distft.progress import complain
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit, describe, differences, read_manifest
from distft.train.owner import Owner
from distft.train.rank_files import Memory, Snapshot, manifest_facts, put_rank_file, read_slices
from distft.train.record import committed_steps, newest_checkpoint, step_folder

SOONEST, LATEST = 0.02, 2.0
"""Seconds between two looks for what other ranks have written."""
GRACE = 20.0
"""Seconds that are left for a save when training ends in another way than it should."""
ORIGIN = "imported"
"""Among a checkpoint's facts: where the run's first steps were taken, if not in it. Every later checkpoint repeats it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    step: int
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. `identity` is what training depends on; one made from anything else is refused. Of those that are
    older than the newest `keep`, every one of a step that `keep_every` divides stays. `save`, `finish` and `restore` are called on all
    ranks alike."""

    def __init__(
        self, folder: Location, identity: dict[str, Any], *, keep: int, keep_every: int | None = None, world: World | None = None
    ) -> None:
        self.folder, self.identity, self.keep, self.keep_every = folder, identity, keep, keep_every
        self.world = world or World()
        self.owner = Owner(folder)
        self._memory = Memory()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None
        self._patience_ends = math.inf
        self._origin: dict[str, Any] = {}

    def save(self, step: int, engine: Engine, facts: dict[str, Any]) -> None:
        """Copies what this rank holds, and has it written. What goes wrong then is raised by `finish`, or by the next save, which
        waits for this one."""
        self.finish()
        self.owner.check()
        [attempt] = self.world.total(secrets.randbits(48) if self.world.leads else 0)
        snapshot = self._memory.copy(engine.slices())
        self._under_way = self._writer.submit(self._write, step, snapshot, f"{int(attempt):012x}", facts)

    def finish(self) -> None:
        """Returns when the save under way is committed. Where a rank could not do its part, it is not: that rank raises what went
        wrong, the others that it did, and no more can be saved."""
        pause = SOONEST
        while self.world.size > 1:
            failed, busy = self.world.total(self.failed, self.busy)
            if failed:
                self.close(grace=0)
                break
            if not busy:
                break
            time.sleep(pause)
            pause = min(2 * pause, LATEST)
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()
        if self._patience_ends < math.inf:
            raise DistftError("Another rank could not write its part of a checkpoint.", where=self.folder.url,
                              help="What it said is the cause. What was committed before stands.")  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._under_way is not None and not self._under_way.done()

    @property
    def failed(self) -> bool:
        """Whether this rank's thread could not do its part."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def close(self, grace: float = GRACE) -> None:
        """Ends with what is under way, for which other ranks have so many seconds more."""
        self._patience_ends = time.monotonic() + grace
        self._writer.shutdown()

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return committed_steps(self.folder)

    def restore(self, engine: Engine) -> Restored | None:
        """Puts the newest checkpoint that is good on all ranks into the engine; None when there is none. One that is not is set
        aside; after the last of them the engine is neither what it was nor a checkpoint, and that is an error."""
        bad: CorruptArtifactError | None = None
        # The leading rank's: disks may show ranks different things.
        seen = self.world.gather(torch.tensor(self.steps(), dtype=torch.int64))[0].tolist()
        for step in reversed(seen):
            where = step_folder(self.folder, step)
            wrong = manifest = None
            try:
                manifest = self._read(where)
                engine.restore_slices(read_slices(where, manifest, engine.wanted()), optimizer_steps=step)
            except CorruptArtifactError as error:
                wrong = error
                complain(
                    f"{error}\nGoing on from the checkpoint before step {step:,}; the bad one is set aside, and its files stay."
                )
            [damaged] = self.world.total(wrong is not None)
            if not damaged:
                assert manifest is not None
                self._origin = {key: manifest.facts[key] for key in (ORIGIN,) if key in manifest.facts}
                return Restored(step=step, facts=manifest.facts)
            bad = wrong or CorruptArtifactError(f"Another rank found step {step} damaged.", where=where.url)
            if self.world.leads:
                set_aside(where)
            self.world.barrier()
        if bad is not None:
            raise CorruptArtifactError(
                f"No checkpoint of this run is whole. {bad.problem}", where=bad.where,
                help="They are set aside. Restore them from a copy, or run the command again: it starts from the beginning.",
            )  # fmt: skip
        return None

    def newest(self) -> tuple[Location, Manifest] | None:
        """The newest checkpoint's folder and manifest, its files unread."""
        found = newest_checkpoint(self.folder)
        return None if found is None else (found[0], self._own(*found))

    def at(self, step: int) -> tuple[Location, Manifest] | None:
        """Those of the checkpoint of a step."""
        where = step_folder(self.folder, step)
        manifest = read_manifest(where)
        return None if manifest is None else (where, self._own(where, manifest))

    def _write(self, step: int, snapshot: Snapshot, attempt: str, facts: dict[str, Any]) -> None:
        """This rank's file; on the leading rank, all that makes it a checkpoint."""
        where = step_folder(self.folder, step)
        try:
            entry = put_rank_file(where, snapshot, self.world.rank)
        finally:
            self._memory.give_back(snapshot)
        if not self.world.leads:
            where.create(_note(attempt, self.world.rank), json.dumps(asdict(entry)).encode())
            return
        notes = [_note(attempt, rank) for rank in range(1, self.world.size)]
        entries = (entry, *(self._await(where, note) for note in notes))
        identity = {"step": step, "run": self.identity}
        told = {**facts, **self._origin, **manifest_facts(snapshot.parameters)}
        ours = Manifest(kind="checkpoint", identity=identity, files=entries, facts=told)
        committed = commit(where, ours)
        for note in notes:
            where.delete(note)
        if committed.files != ours.files:  # a former owner was writing the same: its bytes are as good
            for entry in entries:
                where.delete(entry.name)
            if not self.owner.claimed:
                raise StaleArtifactError(f"Step {step} was committed by another process.", where=where.url)
        self.owner.check()  # before anything is removed: a new owner may go on from what looks old here
        for old in self._outlived():
            _remove(step_folder(self.folder, old))

    def _await(self, where: Location, note: str) -> FileEntry:
        """What another rank has written."""
        pause, until = SOONEST, time.monotonic() + PATIENCE.total_seconds()
        while True:
            with suppress(MissingArtifactError):
                return FileEntry(**json.loads(where.read(note)))
            time.sleep(pause)
            if time.monotonic() > min(until, self._patience_ends):
                raise DistftError(
                    f"A checkpoint was not committed: {note} never came.", where=where.url,
                    help="The rank that should have written it has stopped; what it said is the cause.",
                )  # fmt: skip
            pause = min(2 * pause, LATEST)

    def _outlived(self) -> list[int]:
        return [step for step in self.steps()[: -self.keep] if self.keep_every is None or step % self.keep_every]

    def _read(self, where: Location) -> Manifest:
        manifest = read_manifest(where)
        if manifest is None:
            raise CorruptArtifactError("The checkpoint's manifest vanished.", where=where.url)
        return self._own(where, manifest)

    def _own(self, where: Location, manifest: Manifest) -> Manifest:
        """The manifest itself, when it is of this very run, and of a kind that this version reads."""
        changed = differences(manifest.identity["run"], self.identity)
        if changed:
            raise StaleArtifactError(
                f"This run's checkpoint was made from something else:\n{describe(changed)}", where=where.url,
                help="Undo the change to go on with the run, or give the new one another `name`.",
            )  # fmt: skip
        if "parameters" not in manifest.facts:
            raise StaleArtifactError("The checkpoint was written by another version of distft.", where=where.url,
                                     help="Go on with that version, or give the run another `name`.")  # fmt: skip
        return manifest


def _note(attempt: str, rank: int) -> str:
    """Where a rank says what it has written; no two attempts at a step share it."""
    return f"written/{attempt}-{rank:05d}.json"


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
