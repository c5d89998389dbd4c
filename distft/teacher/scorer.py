"""Scores one unit of documents and commits it as a part of the cache; wherever it runs, in the driver's process or in an actor's.

A unit is named by its documents and committed once: whoever scores it again, after a crash or beside another driver, finds the part
or loses the race for it, and the cache is the same. Documents that the teacher cannot read stand in the part by name, with no row.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from distft.config.schema import Run
from distft.corpus.reader import Corpus, Document
from distft.corpus.render import token_rows
from distft.engine.load import LanguageModel, load_model
from distft.engine.memory import enough_memory
from distft.engine.world import this_device
from distft.errors import CorruptArtifactError, DistftError, StaleArtifactError
from distft.store.digest import memo_path
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit
from distft.store.model_folder import ModelFolder, resolve_model
from distft.store.shards import ShardWriter
from distft.teacher.encode import SCHEMA, batches_by_entries, to_batch
from distft.teacher.forward import score_documents
from distft.teacher.identity import documents_key, scored_positions, teacher_identity
from distft.teacher.planes import stored_schema, to_planes
from distft.teacher.quarantine import LESS_MEMORY, Reading, attempt, positions_limit, read_apart, witnesses
from distft.teacher.scores import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Documents that are scored and committed together."""

    name: str
    """`documents_key` of their digests; with a number behind a dash where a part with these very documents is there already."""
    places: tuple[tuple[str, int], ...]
    """Split and number of each."""
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitScored:
    """What became of a unit; all are 0 where its part was there already."""

    documents: int
    """Those with scores."""
    scored_tokens: int
    quarantined: int = 0
    crowded: int = 0
    """Batches that did not fit in memory at once, and were read document by document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerPlan:
    """All that a scorer is made from. Pickled to another process or machine, it opens the corpus and finds the model there anew."""

    run: Run
    model: ModelFolder
    folder: Location
    """The cache, `teacher/<id>`."""
    corpus: Location
    opened: Corpus | None = None
    """The corpus itself, in the process that opened it."""

    def __call__(self) -> Scorer:
        """Loads the teacher."""
        if self.opened is not None:
            return Scorer(self.run, self.opened, self.model, self.folder)
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # other scorers are beside this one, one for each core
        corpus = Corpus.open(self.corpus, memo_path().parent / "staging", self.run.data.exclude)
        return Scorer(self.run, corpus, self._model_here(), self.folder)

    def _model_here(self) -> ModelFolder:
        """The model on this machine, with the very bytes that the command was started with: others would be mixed into the cache."""
        config = self.run.teacher_model
        given = str(self.model.path), None
        model = resolve_model(*(given if self.model.path.is_dir() else (config.path, config.revision)))
        identity = teacher_identity(model, self.run.score, config.dtype)
        if Manifest(kind="teacher", identity=identity, files=()).id != _teacher_id(self.folder):
            raise StaleArtifactError(
                "The teacher's files on this machine are not those that the command was started with.", where=str(model.path),
                help="Give all machines the same model: a shared folder, or a hub name with `revision`.",
            )  # fmt: skip
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(ScorerPlan, run=self.run, model=self.model, folder=self.folder, corpus=self.corpus), ()


class Scorer:
    """A loaded teacher. A call scores a unit, yields tokens as they are read, and returns what it did."""

    def __init__(self, run: Run, corpus: Corpus, model: ModelFolder, folder: Location) -> None:
        self.run, self.corpus, self.model, self.folder = run, corpus, model, folder
        with enough_memory(LESS_MEMORY):
            self.teacher = load_model(
                model,
                dtype=run.teacher_model.dtype,
                attention=run.model.attention,
                head_rows=token_rows(model),
                device=this_device(),
            )
        self.room = positions_limit(self.teacher)

    def __call__(self, unit: Unit) -> Generator[float, None, UnitScored]:
        if self.folder.exists(f"parts/{unit.name}.json"):
            yield unit.tokens
            return UnitScored(documents=0, scored_tokens=0)
        documents = [self.corpus.document(*place) for place in unit.places]
        if documents_key(document.digest for document in documents) != unit.name.partition("-")[0]:
            raise CorruptArtifactError(f"The documents of unit {unit.name} are others here.", where=self.corpus.folder.url,
                                       help="Run the command again, and `distft tokenize` if that does not help.")  # fmt: skip
        reading = yield from self.read(documents)
        if not reading.documents:
            self._refuse_a_broken_teacher(documents[0], reading)
        _commit_part(self.folder, unit.name, reading, self.teacher)
        return UnitScored(
            documents=len(reading.documents), scored_tokens=sum(len(score.positions) for score in reading.scores),
            quarantined=len(reading.quarantined), crowded=reading.crowded,
        )  # fmt: skip

    def read(self, documents: list[Document]) -> Generator[float, None, Reading]:
        """Reads documents and stores nothing."""
        return read_apart(documents, self._batch, tokens_per_batch=self.run.score.tokens_per_batch, room=self.room)

    def _batch(self, documents: list[Document]) -> list[Scores]:
        places = [scored_positions(document, self.run.score.positions) for document in documents]
        return score_documents(self.teacher, [d.tokens for d in documents], places, self.run.score.distribution)

    def _refuse_a_broken_teacher(self, first: Document, reading: Reading) -> None:
        """A teacher that can read nothing of a unit, nor of some other documents, is broken, or its device is: to quarantine all
        documents would be no help."""
        others = witnesses(self.corpus, set(reading.quarantined))
        fitting = (one for one in others if self.room is None or len(one) <= self.room)
        if all(isinstance(attempt(self._batch, [one])[0], str) for one in fitting):
            raise DistftError(
                f"The teacher could read no document that was tried. Of {first.digest}: {reading.quarantined[first.digest]}.",
                where=f"{first.file}:{first.row}",
                help=f"Nothing of its part was stored. See whether {self.model.path.name} runs in this dtype and on this device at "
                "all, and whether data.max_tokens is within its reach.",
            )  # fmt: skip


def _commit_part(folder: Location, name: str, reading: Reading, teacher: LanguageModel) -> None:
    """Data first, then the manifest that gives it a meaning. Another driver may have been first with the same documents; its part
    stands then, and ours is deleted."""
    documents, scores = reading.documents, reading.scores
    digests = [document.digest for document in documents]
    key = documents_key([*digests, *reading.quarantined])
    written: tuple[FileEntry, ...] = ()
    if digests:
        with ShardWriter(folder, f"part-{key}", stored_schema(SCHEMA)) as writer:
            for rows in batches_by_entries(scores):
                writer.write(to_planes(to_batch(digests[rows], [len(d.tokens) for d in documents[rows]], scores[rows])))
        written = (writer.entry,)
    facts = {
        "digests": digests,
        "quarantined": reading.quarantined,
        "tokens": sum(len(document.tokens) for document in documents),
        "scored_tokens": sum(len(score.positions) for score in scores),
        "entries": sum(len(score.ids) for score in scores),
        "torch": str(torch.__version__),
        "device": teacher.head.weight.device.type,
    }
    identity = {"documents": key, "teacher": _teacher_id(folder)}
    ours = Manifest(kind="teacher-part", identity=identity, files=written, facts=facts)
    committed = commit(folder, ours, f"parts/{name}.json")
    named = {entry.name for entry in committed.files}
    for entry in written:
        if entry.name not in named:
            folder.delete(entry.name)


def _teacher_id(folder: Location) -> str:
    return folder.url.rsplit("/", 1)[-1]
