"""CHECKPOINTS to MODEL: a folder that transformers loads, with the tokenizer's files as they came."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from distft.config.schema import Run
from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.progress import say, track
from distft.store.digest import file_sha256
from distft.store.location import PARTIAL, Location
from distft.store.manifest import FileEntry, Manifest, commit, read_manifest
from distft.store.model_folder import ModelFolder
from distft.store.put import fill
from distft.train.checkpoint import Checkpoints, set_aside
from distft.train.identity import model_identity
from distft.train.rank_files import read_weights

GENERATION = "generation_config.json"


def export_run(run: Run, model: ModelFolder, run_identity: dict[str, Any], store: Location) -> dict[str, Any]:
    """Writes `runs/<name>/model/` from the newest checkpoint; a model that is there already is left as it is.

    The files have the names that transformers wants, so they cannot be unique: what an interrupted export left is removed first,
    and only the manifest says that the folder is whole."""
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
    try:
        weights = read_weights(where, checkpoint)
    except CorruptArtifactError as error:
        if step not in checkpoints.steps():
            raise MissingArtifactError(f"The checkpoint of step {step:,} was removed while it was read.", where=where.url,
                                       help="Training goes on. Run `distft export` again.") from error  # fmt: skip
        set_aside(where)
        raise CorruptArtifactError(
            f"The checkpoint of step {step:,} is damaged and was set aside: {error.problem}", where=where.url,
            help="Run `distft train`, which goes on from the one before it if there is one, then `distft export` again.",
        ) from error  # fmt: skip
    folder.delete("MANIFEST.json")
    for name in folder.names(recursive=True):
        folder.delete(name)
    with tempfile.TemporaryDirectory(dir=_beside(run_folder), prefix=PARTIAL) as scratch:
        made = Path(scratch) / "model"
        _write_model(model, weights, made, dtype=identity["dtype"], shard_bytes=run.export.shard_bytes)
        for file in model.tokenizer_files():
            fill(made / file.name, partial(shutil.copyfile, file))
        paths = sorted(path for path in made.iterdir() if path.is_file())
        entries = []
        with track("export", sum(path.stat().st_size for path in paths), "bytes") as meter:
            for path in paths:
                entries.append(FileEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path)))
                folder.upload(path.name, path)
                meter.advance(entries[-1].size)
    commit(folder, Manifest(kind="model", identity=identity, files=tuple(entries)))
    return result


def _write_model(source: ModelFolder, weights: dict[str, Any], target: Path, *, dtype: str, shard_bytes: int) -> None:
    """Builds the architecture with no weights of its own, puts the trained ones in, and lets transformers name them on disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from distft.engine.load import DTYPES

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    state = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    whole.load_state_dict(state, assign=True, strict=False)
    whole.tie_weights()
    bare = sorted(name for name, parameter in whole.named_parameters() if parameter.is_meta)
    if bare:
        raise RuntimeError(f"the checkpoint has no weights for {bare[:5]}")
    fill(target, partial(whole.save_pretrained, max_shard_size=shard_bytes))
    if source.generation_config():  # as its makers wrote it: transformers would refuse to save some of what it loads
        fill(target / GENERATION, partial(shutil.copyfile, source.path / GENERATION))


def _beside(run_folder: Location) -> Path | None:
    """A place on the store's own file system, so that files are moved and not copied; None, the system's temporary one, on S3."""
    path = run_folder.local("model")
    return None if path is None else path.parent
