"""CHECKPOINTS to MODEL: a folder that transformers loads, with the tokenizer's files as they came and a card."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from distft.config.schema import Run
from distft.engine.load import DTYPES
from distft.engine.sharded import blank_model
from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.export.card import CARD, Known, model_card
from distft.export.layout import index, shards, sources
from distft.export.whole import write_whole
from distft.export.write import stored_bytes, write_shards
from distft.progress import say, track
from distft.store.digest import file_sha256
from distft.store.location import PARTIAL, Location
from distft.store.manifest import FileEntry, Manifest, commit, read_manifest
from distft.store.model_folder import ModelFolder
from distft.store.put import fill
from distft.train.checkpoint import Checkpoints, set_aside
from distft.train.identity import model_identity
from distft.train.rank_files import parameters_of, pass_weights, read_weights

CONFIG, GENERATION = "config.json", "generation_config.json"
READ_SHARE = 4
"""So many times what is read of a checkpoint at once fits a file of weights: what is loaded beside it needs room as well."""


def export_run(
    run: Run, model: ModelFolder, run_identity: dict[str, Any], store: Location, *, corpus: Manifest | None = None,
    cache: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes `runs/<name>/model/` from the newest checkpoint; a model that is there already is left as it is. What the card tells of
    `corpus` and of the teacher's `cache` is known where they are given.

    The files have the names that transformers wants, so they cannot be unique: what an interrupted export left is removed first,
    only the manifest says that the folder is whole, and config.json, without which nothing loads it, comes last of the others.
    Weights pass through, in memory that two files would fill; on a local disk a model that is there stays until the new one lies
    beside it."""
    run_folder = store.child("runs", run.name)
    folder = run_folder.child("model")
    checkpoints = Checkpoints(run_folder.child("checkpoints"), run_identity, keep=run.train.checkpoint.keep)
    newest = checkpoints.newest()
    if newest is None:
        raise MissingArtifactError(f"The run {run.name!r} has no checkpoint.", where=run_folder.url,
                                   help="Run `distft train` with this config first.")  # fmt: skip
    where, checkpoint = newest
    step, total = checkpoint.identity["step"], checkpoint.facts["total_steps"]
    if step < total:
        say(f"The run is not finished: this is its model after step {step:,} of {total:,}.")
    identity = model_identity(run, checkpoint.identity)
    result = {"model": folder.url, "step": step, "total_steps": total}
    there = read_manifest(folder)
    if there is not None and there.identity == identity:
        return result
    beside = _beside(run_folder)
    with tempfile.TemporaryDirectory(dir=beside, prefix=PARTIAL) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        entries: list[FileEntry] = []
        with _blamed(checkpoints, where, step):
            if beside is None and there is not None:
                # Its place is needed for the new one's first file: only for a checkpoint that is sound to its end does it go.
                for _ in pass_weights(where, checkpoint, memory=run.export.shard_bytes // READ_SHARE):
                    continue
            if beside is None:
                _clear(folder)
            entries += _write_weights(run, model, where, checkpoint, identity["dtype"], made, folder if beside is None else None)
        _copy_along(model, made)
        known = Known(run=run, model=model, checkpoint=checkpoint, corpus=corpus, cache=cache, dtype=identity["dtype"])
        fill(made / CARD, lambda path: path.write_text(model_card(known), encoding="utf-8"))
        if beside is not None:
            _clear(folder)
        entries += _upload(folder, made, {entry.name: entry for entry in entries})
    entries = [*{entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}.values()]
    commit(folder, Manifest(kind="model", identity=identity, files=tuple(entries)))
    return result


def _write_weights(
    run: Run, model: ModelFolder, where: Location, checkpoint: Manifest, dtype: str, made: Path, away: Location | None
) -> list[FileEntry]:
    """Writes the weights and what transformers needs to load them; each file of weights goes `away` where that is given, and leaves
    no trace on this machine's disk before the next is begun."""
    whole: Any = blank_model(model, dtype=dtype)
    _write_settings(whole, model, made, dtype)
    found = sources(whole, model, parameters_of(where, checkpoint), dtype)
    if found is None:
        say(f"export: transformers stores {type(whole).__name__} rearranged, which takes all of it in memory at once.")
        write_whole(whole, read_weights(where, checkpoint), made, dtype=dtype, shard_bytes=run.export.shard_bytes)
        _write_settings(whole, model, made, dtype)
        return []
    files, entries = shards(found, run.export.shard_bytes), list[FileEntry]()

    def put(entry: FileEntry, path: Path) -> None:
        entries.append(entry)
        if away is not None:
            away.upload(entry.name, path)
            path.unlink(missing_ok=True)

    with (
        closing(pass_weights(where, checkpoint, memory=run.export.shard_bytes // READ_SHARE)) as weights,
        track("export", sum(file.size for file in files), "bytes") as meter,
    ):
        write_shards(files, stored_bytes(found, weights, whole), made, put, meter)
    for name, text in index(files, whole.num_parameters()).items():
        fill(made / name, lambda path, text=text: path.write_bytes(text))
    return entries


def _write_settings(whole: Any, model: ModelFolder, made: Path, dtype: str) -> None:
    """config.json as `save_pretrained` would write it, and how to generate."""
    whole.config.dtype = str(DTYPES[dtype]).removeprefix("torch.")
    whole.config.architectures = [type(whole).__name__]
    fill(made, whole.config.save_pretrained)
    if model.generation_config():  # as its makers wrote it: transformers would refuse to save some of what it loads
        fill(made / GENERATION, partial(shutil.copyfile, model.path / GENERATION))
    elif whole.can_generate():
        fill(made, whole.generation_config.save_pretrained)


def _copy_along(model: ModelFolder, made: Path) -> None:
    """The tokenizer, and the terms that came with the model."""
    for file in [*model.tokenizer_files(), *model.license_files()]:
        fill(made / file.name, partial(shutil.copyfile, file))


def _upload(folder: Location, made: Path, hashed: dict[str, FileEntry]) -> Iterator[FileEntry]:
    """Gives all files their names in the store; those that were hashed as they were written are not read again."""
    for path in sorted((path for path in made.iterdir() if path.is_file()), key=lambda path: (path.name == CONFIG, path.name)):
        entry = hashed.get(path.name) or FileEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))
        folder.upload(path.name, path)
        yield entry


def _clear(folder: Location) -> None:
    """The manifest first: what it named may then vanish in any order."""
    folder.delete("MANIFEST.json")
    for name in sorted(folder.names(recursive=True), key=lambda name: name != CONFIG):
        folder.delete(name)


@contextmanager
def _blamed(checkpoints: Checkpoints, where: Location, step: int) -> Iterator[None]:
    """Says of a checkpoint that cannot be read whether it is damaged, and then sets it aside, or was removed by the training that goes
    on."""
    try:
        yield
    except CorruptArtifactError as error:
        if step not in checkpoints.steps():
            raise MissingArtifactError(f"The checkpoint of step {step:,} was removed while it was read.", where=where.url,
                                       help="Training goes on. Run `distft export` again.") from error  # fmt: skip
        set_aside(where)
        raise CorruptArtifactError(
            f"The checkpoint of step {step:,} is damaged and was set aside: {error.problem}", where=where.url,
            help="Run `distft train`, which goes on from the one before it if there is one, then `distft export` again.",
        ) from error  # fmt: skip


def _beside(run_folder: Location) -> Path | None:
    """A place on the store's own file system, so that files are moved and not copied; None, the system's temporary one, on S3."""
    path = run_folder.local("model")
    return None if path is None else path.parent
