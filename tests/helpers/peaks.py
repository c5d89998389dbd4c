"""How much memory training takes in a process of its own, at the top, above what the process has before it begins.

Everything is real but the model's size: a store, a corpus, `train_run`, an engine, checkpoints. Before it is measured a process
trains a model of no size, so that what torch, transformers and DeepSpeed load late is there. glibc is told to give back what is
freed: its habit of keeping it makes a process larger by some per cent, and by others every time.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.corpus.reader import Corpus
from distft.engine.world import World
from distft.plan.load import load_of
from distft.plan.measured import Lengths
from distft.plan.memory import Memory, memory
from distft.plan.shape import Shape
from distft.store.location import open_location
from distft.store.model_folder import ModelFolder, resolve_model
from distft.teacher.build import build_teacher
from distft.teacher.cache import TeacherCache
from distft.teacher.identity import teacher_identity
from distft.train.stage import train_run
from tests.helpers.models import tiny_model_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.stores import Lab, document, lab, run_config

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""So that every tensor of size is mapped for itself, and gone when it is freed."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model and how it is trained. `train` and `model` go to the run file."""

    name: str
    shape: dict[str, Any]
    """What `tiny_model_folder` takes."""
    lengths: Sequence[int]
    """Of the documents; all tokens but the first of each are supervised."""
    dtype: str = "float32"
    ranks: int = 1
    objective: dict[str, Any] = field(default_factory=lambda: {"kind": "sft"})
    train: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] | None = None
    """The shape of another model, whose cache is read."""
    score: dict[str, Any] = field(default_factory=dict)


def made(folder: Path, case: Trained) -> Lab:
    """Model, corpus and run file; and the cache, where there is a teacher."""
    model = drawn(folder / "model", case.shape)
    source = np.random.default_rng(0)
    rows = model.vocabulary_rows()
    documents = [document(source.integers(0, rows, length).tolist(), list(range(1, length))) for length in case.lengths]
    sections: dict[str, Any] = {"score": case.score, "train": _train(case), "objective": case.objective}
    if case.teacher is None:
        return lab(folder, documents=documents, model=model, dtype=case.dtype, **sections)
    teacher = drawn(folder / "teacher", case.teacher)
    sections["teacher"] = {"path": str(teacher.path), "dtype": "float32"}
    one = lab(folder, documents=documents, model=model, dtype=case.dtype, **sections)
    build_teacher(one.run, one.corpus, teacher, one.store)
    return one


def drawn(path: Path, shape: dict[str, Any]) -> ModelFolder:
    """A random model whose tokenizer has a token for every row of its head."""
    given: dict[str, Any] = {"vocabulary": 280, "hidden": 32} | shape
    tiny_model_folder(path, **given)
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"<{number}>": number for number in range(max(words.values()) + 1, shape.get("vocab_size", 0))}
    file.write_text(json.dumps(tokenizer))
    return resolve_model(str(path), None)


def tried(folder: Path, case: Trained) -> Lab:
    """The same of no size, for a process to load what it will need."""
    small = {"tokens_per_step": 96, "micro_batch_tokens": 48}
    return made(folder, replace(case, shape={}, lengths=[24] * 8, train=case.train | small, teacher=case.teacher and {}))


def _train(case: Trained) -> dict[str, Any]:
    usual = {"checkpoint": {"every_steps": 1, "keep": 1}, "warmup_steps": 0}
    return usual | case.train


def predicted(case: Trained, real: Lab) -> Memory:
    """What a plan of this run says."""
    run = real.changed(train={"workers": case.ranks}).run
    load = load_of(run, lengths=Lengths.of(real.corpus.lengths("train")))
    return memory(Shape.of(real.model.config, real.model.parameter_count()), load)


def peaks(folder: Path, case: Trained, real: Lab) -> list[int]:
    """Bytes of each rank that trains what was made."""
    small = tried(folder / "tiny", case)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (RETURNED | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}).items():
            patch.setenv(name, value)
        stands = [(one.folder, one.run.model_dump(), one.model.path) for one in (small, real)]
        return run_ranks(_peak, case.ranks, *stands, timeout=900)


def _peak(world: World, small: Any, real: Any) -> int:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives: progress is nobody's business here)
    first, second = (_opened(stand, world) for stand in (small, real))
    _trained(first, world)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins here
    _trained(second, world)
    return resident("VmHWM") - before


def _opened(stand: Any, world: World) -> Lab:
    folder, dumped, path = stand
    run = run_config(folder / "store", ModelFolder(path, {})).model_validate(dumped)
    store = open_location(run.store)
    [name] = store.child("corpus").folders()
    corpus = Corpus.open(store.child("corpus", name), folder / f"staging-{world.rank}")
    return Lab(folder=folder, run=run, model=resolve_model(str(path), None), corpus=corpus)


def _trained(one: Lab, world: World) -> None:
    path, cache = one.run.teacher.path, None
    if path is not None:
        identity = teacher_identity(resolve_model(path, None), one.run.score, one.run.teacher_model.dtype)
        cache = TeacherCache.open(one.store, identity, one.corpus, one.staging)
    train_run(one.run, one.model, one.corpus, cache, one.store, world)


def resident(name: str) -> int:
    """VmRSS, or VmHWM, which is the highest that it has been. Not ru_maxrss: that starts at what the parent process had."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024
