"""Small stores for tests of the numerical parts: corpora written token by token, teacher caches and runs over them.

Documents are random ids with random supervision, so that no test depends on a tokenizer's habits; the models are random and peaked
(weights of scale 0.5), so that a shift by one token is worth nats and not rounding.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distft.config.schema import Run
from distft.corpus.build import KIND
from distft.corpus.chat import Encoded
from distft.corpus.files import Row
from distft.corpus.reader import Corpus, Document
from distft.corpus.render import token_rows
from distft.corpus.tabulate import SCHEMA, tabulate
from distft.engine.load import LanguageModel, load_model
from distft.engine.local import LocalEngine
from distft.engine.world import World
from distft.store.digest import document_digest
from distft.store.location import Location, open_location
from distft.store.manifest import Manifest, commit, fingerprint
from distft.store.model_folder import ModelFolder, resolve_model
from distft.store.shards import ShardWriter
from distft.teacher.build import Scored, build_teacher
from distft.teacher.cache import TeacherCache
from distft.teacher.identity import teacher_identity
from distft.train.checkpoint import Checkpoints
from distft.train.stage import run_identity, train_run
from tests.helpers.models import Family, tiny_model_folder

CPU = torch.device("cpu")

FAMILIES: dict[str, tuple[Family, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_untied_padded": ("llama", {"tied": False, "padded_rows": 5}),
    "qwen3": ("qwen3", {}),
    "mistral_sliding": ("mistral", {"sliding_window": 6}),
    "gemma3_softcap_sliding": (
        "gemma3_text",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 8.0},
    ),
}
"""What differs between architectures where a packed batch, a padded head or a shaped logit could go wrong."""


@functools.cache
def _shared() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="distft-test-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def shared_model(name: str = "llama", seed: int = 0) -> ModelFolder:
    """A model of FAMILIES that tests may read and must not change; made once per process."""
    family, settings = FAMILIES[name]
    path = _shared() / f"{name}-{seed}"
    tiny_model_folder(path, family=family, seed=seed, vocabulary=280, hidden=32, **{"initializer_range": 0.5, **settings})
    return resolve_model(str(path), None)


def copied_model(model: ModelFolder, path: Path) -> ModelFolder:
    """A copy that a test may change."""
    shutil.copytree(model.path, path)
    return resolve_model(str(path), None)


def loaded(model: ModelFolder, *, dtype: str = "float32", attention: str = "sdpa") -> LanguageModel:
    return load_model(model, dtype=dtype, attention=attention, head_rows=token_rows(model), device=CPU)


def document(tokens: Sequence[int], supervised: Sequence[int]) -> Document:
    """A document with these tokens, of which those at the places `supervised` are."""
    mask = np.zeros(len(tokens), np.bool_)
    mask[list(supervised)] = True
    return _document(np.array(tokens, np.uint32), mask)


def _document(tokens: npt.NDArray[np.uint32], mask: npt.NDArray[np.bool_]) -> Document:
    return Document(document_digest(tokens, mask), tokens, mask, np.zeros_like(mask), "rows.jsonl", 1)


def random_documents(
    count: int, *, seed: int = 0, shortest: int = 3, longest: int = 24, vocabulary: int = 280, share: float = 0.6
) -> list[Document]:
    """Uneven lengths, and supervision that starts, stops and starts again; at least one token of each document, never its first."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = random.integers(0, vocabulary, random.integers(shortest, longest + 1)).astype(np.uint32)
        mask = random.random(len(tokens)) < share * random.random()
        mask[random.integers(1, len(tokens))] = True
        mask[0] = False
        found.append(_document(tokens, mask))
    return found


def write_corpus(store: Location, staging: Path, **splits: Sequence[Document]) -> Corpus:
    """A committed corpus of these documents, a split per keyword."""
    identity: dict[str, Any] = {"version": 1, "heldout": None, "max_tokens": 4096}
    for split, documents in splits.items():
        identity[split] = {"rows": hashlib.sha256("".join(d.digest for d in documents).encode()).hexdigest()}
    folder = store.child("corpus", fingerprint(KIND, identity)[:16])
    entries, facts = [], {}
    for split, documents in splits.items():
        rows = [Row("rows.jsonl", number, {}) for number in range(1, len(documents) + 1)]
        encoded = [
            Encoded(
                tokens=d.tokens, supervised=d.supervised, anchored=d.anchors, truncated=False, altered=False, unended=False
            )
            for d in documents
        ]  # fmt: skip
        batch, tally = tabulate(rows, list(encoded))
        with ShardWriter(folder, split, SCHEMA, compression=None) as writer:
            writer.write(batch)
        entries.append(replace(writer.entry, facts={"split": split}))
        facts[split] = tally.facts()
    commit(folder, Manifest(kind=KIND, identity=identity, files=tuple(entries), facts=facts))
    return Corpus.open(folder, staging)


def run_config(store: Path, model: ModelFolder, dtype: str = "float32", **sections: Any) -> Run:
    """A run file in memory. A section given here replaces the default's keys of the same name."""
    defaults: dict[str, Any] = {
        "model": {"path": str(model.path), "dtype": dtype},
        "data": {"train": {"path": "unread.jsonl"}},
        "objective": {"kind": "sft_kl"},
        "train": {
            "lr": 3e-3, "warmup_steps": 2, "tokens_per_step": 64, "micro_batch_tokens": 32, "weight_decay": 0.1,
            "checkpoint": {"every_steps": None},
        },
    }  # fmt: skip
    merged = {**defaults, **{k: {**defaults.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}
    return Run.model_validate({"name": "run", "store": str(store), **merged})


@dataclass(frozen=True)
class Lab:
    """A store with a corpus, a model and a run file: what the stages take, as one thing."""

    folder: Path
    run: Run
    model: ModelFolder
    corpus: Corpus

    @property
    def store(self) -> Location:
        return open_location(self.run.store)

    @property
    def staging(self) -> Path:
        return self.folder / "staging"

    def changed(self, **sections: Any) -> Lab:
        """The same store under another run file: keys of these sections are replaced."""
        old = self.run.model_dump()
        new = {**old, **{k: {**old[k], **v} if isinstance(v, dict) and k != "objective" else v for k, v in sections.items()}}
        return replace(self, run=Run.model_validate(new))

    def score(self) -> Scored:
        return build_teacher(self.run, self.corpus, self.model, self.store)

    def identity(self) -> dict[str, Any]:
        return teacher_identity(self.model, self.run.score, self.run.teacher_model.dtype)

    def cache(self) -> TeacherCache:
        return TeacherCache.open(self.store, self.identity(), self.corpus, self.staging)

    def train(self, world: World | None = None) -> dict[str, Any]:
        cache = self.cache() if self.run.needs_teacher else None
        return train_run(self.run, self.model, self.corpus, cache, self.store, world or World())

    @property
    def run_folder(self) -> Location:
        return self.store.child("runs", self.run.name)

    def run_identity(self) -> dict[str, Any]:
        return run_identity(self.run, self.model, self.corpus, self.cache() if self.run.needs_teacher else None)

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run_folder.child("checkpoints"), self.run_identity(), keep=self.run.train.checkpoint.keep)

    def engine(self, world: World | None = None) -> LocalEngine:
        """A fresh engine with the model's own weights."""
        config = self.run.model
        return LocalEngine(loaded(self.model, dtype=config.dtype, attention=config.attention), self.run.train, world or World())

    def restored(self) -> LocalEngine:
        """An engine with the newest checkpoint in it."""
        engine = self.engine()
        assert self.checkpoints().restore(engine) is not None, "there is no checkpoint"
        return engine


def lab(
    folder: Path, *, documents: Sequence[Document] | None = None, heldout: Sequence[Document] = (),
    model: ModelFolder | None = None, dtype: str = "float32", **sections: Any,
) -> Lab:  # fmt: skip
    """A fresh store below `folder`; with `heldout` documents the run has a drift meter."""
    model = model or shared_model()
    if heldout:
        sections.setdefault("data", {"heldout": {"path": "unread-either.jsonl"}})
    run = run_config(folder / "store", model, dtype, **sections)
    splits = {"train": list(documents or random_documents(24)), **({"heldout": list(heldout)} if heldout else {})}
    corpus = write_corpus(open_location(run.store), folder / "staging", **splits)
    return Lab(folder=folder, run=run, model=model, corpus=corpus)


def bits(engine: LocalEngine) -> dict[str, Tensor]:
    """All that a checkpoint holds, cloned."""
    return {name: tensor.clone() for name, tensor in engine.tensors()}


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]
