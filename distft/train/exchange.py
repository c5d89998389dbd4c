"""A run's checkpoints to and from DeepSpeed's universal format (`distft.train.universal` says what that is)."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.config.load import dump
from distft.config.schema import Run
from distft.corpus.reader import Corpus
from distft.engine.base import Wanted
from distft.engine.sharded import blank_model
from distft.errors import ConfigError, CorruptArtifactError, MissingArtifactError, ModelError, StaleArtifactError
from distft.progress import Meter, say, track
from distft.store.digest import file_sha256
from distft.store.local import explained, sync_folder
from distft.store.location import PARTIAL, Location
from distft.store.manifest import Manifest, commit
from distft.store.model_folder import ModelFolder
from distft.train.budget import DriftBudget
from distft.train.checkpoint import ORIGIN, Checkpoints
from distft.train.order import StepPlan
from distft.train.rank_files import PARTS, Parameters, Part, manifest_facts, parameters_of, put_numbers, read_slices
from distft.train.record import read_metrics, step_folder
from distft.train.schedule import learning_rate
from distft.train.universal import (
    FILES,
    LATEST,
    PIECE,
    Universal,
    check_numbers,
    read_tensor,
    shapes_of,
    write_rest,
    write_tensor,
)

TOGETHER = 1 << 25
"""Most elements of parameters that are read together, unless one alone has more: blocks that they share are read once."""


def export_universal(
    run: Run, run_identity: dict[str, Any], store: Location, folder: Path, *, step: int | None = None
) -> dict[str, Any]:
    """Writes the run's newest checkpoint, or that of `step`, into a new folder, which is whole as soon as it is there. What is read is
    verified; in memory are a few parameters at a time, and one part of them."""
    _refuse_full(folder)
    checkpoints = _checkpoints(run, run_identity, store)
    found = checkpoints.newest() if step is None else checkpoints.at(step)
    if found is None:
        has = ", ".join(str(one) for one in checkpoints.steps())
        raise MissingArtifactError(
            f"The run {run.name!r} has no checkpoint{'' if step is None else f' of step {step:,}'}.", where=checkpoints.folder.url,
            help=f"It has those of steps {has}." if has else "Run `distft train` with this config first.",
        )  # fmt: skip
    where, checkpoint = found
    step, parameters = int(checkpoint.identity["step"]), parameters_of(where, checkpoint)
    tag = f"global_step{step}_universal"
    with explained("write", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with explained("write", folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=PARTIAL) as scratch:
        made = Path(scratch) / "whole"
        (made / tag).mkdir(parents=True)
        size = 4 * len(PARTS) * sum(math.prod(shape) for _, shape in parameters)
        with track("checkpoint export", size, "bytes") as meter:
            _write_tensors(where, checkpoint, parameters, made / tag, meter)
        write_rest(made / tag, parameters, step, _told(run, checkpoint))
        (made / LATEST).write_text(tag, encoding="utf-8")
        _refuse_full(folder)
        made.replace(folder)
        sync_folder(folder.parent)
    return {"folder": str(folder), "tag": tag, "step": step, "parameters": len(parameters), "bytes": size}


def import_universal(
    run: Run, model: ModelFolder, corpus: Corpus, run_identity: dict[str, Any], store: Location, folder: Path,
    *, step: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Makes a folder's weights and moments the run's first checkpoint, from which `train` goes on with the step after: those before
    count as taken, and their documents as seen. The run must not have begun. All is looked at before anything is committed, and every
    checkpoint that comes of it says where its first steps were taken."""
    universal, total = Universal.open(folder), StepPlan(corpus.lengths("train"), run.train).total_steps
    states = _states(universal, known=step is not None)
    parameters = _matching(universal, model, run.model.dtype, states)
    step = _step(universal, parameters, states, step, total)
    run_folder = store.child("runs", run.name)
    checkpoints = _checkpoints(run, run_identity, store)
    _refuse_begun(run, run_folder, checkpoints)  # before it is claimed: whoever trains it would stop
    checkpoints.owner.claim()
    _refuse_begun(run, run_folder, checkpoints)
    elements = sum(math.prod(shape) for _, shape in parameters)
    digest = hashlib.sha256()
    with track("checkpoint import", 4 * len(PARTS) * elements, "bytes") as meter:
        where = step_folder(checkpoints.folder, step)
        entry = put_numbers(where, elements, lambda part: _numbers(universal, parameters, part, digest, meter), rank=0)
    origin = {"from": folder.name, "step": step, "sha256": digest.hexdigest()}
    facts: dict[str, Any] = {"loss": None, "drift": None, "total_steps": total, ORIGIN: origin, **manifest_facts(parameters)}
    if run.objective.drift_budget is not None:
        facts["budget"] = DriftBudget(run.objective.drift_budget).facts()
        say(
            "The drift budget's control begins anew: how far the imported weights have drifted is not known until it is measured."
        )
    checkpoints.owner.check()
    _refuse_begun(run, run_folder, checkpoints)
    run_folder.replace("config.yaml", dump(run).encode())
    commit(where, Manifest(kind="checkpoint", identity={"step": step, "run": run_identity}, files=(entry,), facts=facts))
    say(f"`distft train` goes on with step {step + 1:,} of {total:,}.")
    return {"checkpoint": where.url, "step": step, "total_steps": total, "parameters": len(parameters), ORIGIN: origin}


def _checkpoints(run: Run, run_identity: dict[str, Any], store: Location) -> Checkpoints:
    return Checkpoints(store.child("runs", run.name, "checkpoints"), run_identity, keep=run.train.checkpoint.keep)


def _write_tensors(where: Location, checkpoint: Manifest, parameters: Parameters, tag: Path, meter: Meter) -> None:
    for group in _groups(parameters):
        wanted = [Wanted(name, shape, 0, math.prod(shape)) for name, shape in group]
        for part in PARTS:
            whole = {name: torch.empty(shape) for name, shape in group}
            try:
                for piece in read_slices(where, checkpoint, wanted, (part,)):
                    whole[piece.name].view(-1)[piece.start : piece.stop] = getattr(piece, part)
            except CorruptArtifactError as error:
                raise CorruptArtifactError(
                    f"The checkpoint cannot be exported: {error.problem}", where=error.where,
                    help="If training goes on, it may have been removed meanwhile: run it again. Else take another with --step.",
                ) from error  # fmt: skip
            for name, tensor in whole.items():
                write_tensor(tag, name, part, tensor)
                meter.advance(4 * tensor.numel(), note=name)


def _groups(parameters: Parameters) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    group: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in parameters:
        if group and sum(math.prod(one) for _, one in group) + math.prod(shape) > TOGETHER:
            yield group
            group = []
        group.append((name, shape))
    if group:
        yield group


def _told(run: Run, checkpoint: Manifest) -> dict[str, Any]:
    """What is known of the optimizer and is no tensor, in plain values."""
    train, step, total = run.train, checkpoint.identity["step"], checkpoint.facts["total_steps"]
    return {
        "run": run.name, "step": step, "total_steps": total, "lr": learning_rate(train, step, total), "betas": list(train.betas),
        "eps": train.eps, "weight_decay": {"matrices": train.weight_decay, "norms and biases": 0.0},
    }  # fmt: skip


def _states(universal: Universal, *, known: bool) -> dict[str, Any]:
    """What the engine's own file says. It may hold whatever its user added; one that cannot be read can be done without where the step
    is `known`."""
    try:
        return universal.states()
    except ModelError as error:
        if known:
            return {}
        raise ModelError(
            error.problem, where=error.where, help="Give --step N, the steps it has taken: then it is not needed."
        ) from error


def _matching(universal: Universal, model: ModelFolder, dtype: str, states: dict[str, Any]) -> Parameters:
    """The model's parameters in their order, each of which the folder has whole and in float32; no number is read."""
    blank = blank_model(model, dtype=dtype)
    parameters = [(name, tuple(p.shape)) for name, p in blank.named_parameters() if p.requires_grad]
    expected, there = dict(parameters), set(universal.names())
    # Buffers, and tied weights by their other names: below ZeRO-3 the converter adds them, without moments.
    others = set(blank.state_dict()) - expected.keys()
    wrong: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in there],
        "not the model's": sorted(there - expected.keys() - others),
        "of another shape": [],
    }
    told = shapes_of(states)
    for name in (name for name in expected if name in there):
        for part, path in universal.files(name).items():
            found = tuple(read_tensor(path).shape)
            if len(found) == 1 and math.prod(expected[name]) == found[0]:
                found = told.get(name, expected[name])  # of ZeRO-3 a tensor is flat, and its shape stands elsewhere
            if found != expected[name]:
                wrong["of another shape"].append(f"{name}/{FILES[part]} {list(found)} instead of {list(expected[name])}")
    if any(wrong.values()):
        listed = (f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in wrong.items() if names)
        raise ModelError(
            f"{universal.tag.name} does not hold this run's model: {'; '.join(listed)}.", where=str(universal.tag),
            help="Set model.path to the model that was trained. If it was trained inside another module, its names begin otherwise.",
        )  # fmt: skip
    return parameters


def _step(universal: Universal, parameters: Parameters, states: dict[str, Any], asked: int | None, total: int) -> int:
    """The step that the folder stands after, which is the optimizer's count as well."""
    found = universal.step([name for name, _ in parameters], states)
    step = found if asked is None else asked
    if step is None:
        raise ConfigError(f"{universal.tag.name} does not say how many steps its optimizer has taken.", where="--step",
                          help="Give it: --step N. Adam corrects its moments by that number.")  # fmt: skip
    if found not in (None, step):
        raise ConfigError(f"--step is {step:,}, and the optimizer in {universal.tag.name} has taken {found:,} steps.", where="--step",
                          help="Leave it out: Adam corrects its moments by that number.")  # fmt: skip
    if not 0 < step < total:
        raise ConfigError(
            f"{universal.tag.name} stands after step {step:,}, and the run has {total:,}: "
            + ("its optimizer has no moments yet." if step == 0 else "nothing would be left to train."), where="train",
            help="Set model.path to those weights instead." if step == 0 else "Raise train.epochs or train.max_steps.",
        )  # fmt: skip
    return step


def _refuse_begun(run: Run, folder: Location, checkpoints: Checkpoints) -> None:
    """A run has one beginning: steps of its own must not pass for those that led to other weights."""
    steps, lines = checkpoints.steps(), len(read_metrics(folder))
    if steps or lines:
        has = f"a checkpoint of step {steps[-1]:,}" if steps else f"{lines:,} lines in its log"
        raise StaleArtifactError(f"The run {run.name!r} has begun: it has {has}.", where=folder.url,
                                 help="Give the one that goes on from these weights another `name`.")  # fmt: skip


def _numbers(universal: Universal, parameters: Parameters, part: Part, digest: Any, meter: Meter) -> Iterator[Tensor]:
    """All elements of a part, in pieces. `digest` is told what sha256sum would print of the files."""
    for name, shape in parameters:
        path = universal.files(name)[part]
        with explained("read", path):
            digest.update(f"{file_sha256(path)}  {name}/{path.name}\n".encode())
        tensor = read_tensor(path)
        if tensor.numel() != math.prod(shape):
            raise ModelError(f"{name}/{path.name} has changed while it was read.", where=str(path), help="Run it again.")
        for piece in tensor.reshape(-1).split(PIECE):
            check_numbers(path, part, piece)
            meter.advance(4 * len(piece), note=name)
            yield piece


def _refuse_full(folder: Path) -> None:
    with explained("look at", folder):
        if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ConfigError(f"{folder.name} is there already, and not an empty folder.", where=str(folder),
                              help="Give a folder that does not exist.")  # fmt: skip
