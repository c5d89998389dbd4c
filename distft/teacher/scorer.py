"""Scores one unit of documents and commits it as a part of the cache; wherever it runs, in the driver's process or in an actor's.

A unit is named by its documents and committed once: whoever scores it again, after a crash or beside another driver, finds the part
or loses the race for it, and the cache is the same.
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
from distft.engine.pack import batches_by_tokens
from distft.engine.world import this_device
from distft.errors import CorruptArtifactError, DistftError, StaleArtifactError
from distft.store.digest import memo_path
from distft.store.location import Location
from distft.store.manifest import Manifest, commit
from distft.store.model_folder import ModelFolder, resolve_model
from distft.store.shards import ShardWriter
from distft.teacher.encode import SCHEMA, batches_by_entries, to_batch
from distft.teacher.forward import Scores, score_documents
from distft.teacher.identity import documents_key, scored_positions, teacher_identity
from distft.teacher.planes import stored_schema, to_planes

LESS_MEMORY = "Lower score.tokens_per_batch; what was scored so far is kept. `distft plan` estimates what is needed."


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Documents that are scored and committed together."""

    name: str
    """`documents_key` of their digests."""
    places: tuple[tuple[str, int], ...]
    """Split and number of each."""
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitScored:
    """What became of a unit; both are 0 where its part was there already."""

    documents: int
    scored_tokens: int


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
        return Scorer(self.run, Corpus.open(self.corpus, memo_path().parent / "staging"), self._model_here(), self.folder)

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

    def __call__(self, unit: Unit) -> Generator[float, None, UnitScored]:
        if self.folder.exists(f"parts/{unit.name}.json"):
            yield unit.tokens
            return UnitScored(documents=0, scored_tokens=0)
        documents = [self.corpus.document(*place) for place in unit.places]
        if documents_key(document.digest for document in documents) != unit.name:
            raise CorruptArtifactError(f"The documents of unit {unit.name} are others here.", where=self.corpus.folder.url,
                                       help="Run the command again, and `distft tokenize` if that does not help.")  # fmt: skip
        with enough_memory(LESS_MEMORY):
            scores = yield from self._read(documents)
        _commit_part(self.folder, documents, scores, self.teacher)
        return UnitScored(documents=len(documents), scored_tokens=sum(len(score.positions) for score in scores))

    def _read(self, documents: list[Document]) -> Generator[float, None, list[Scores]]:
        """In batches of like lengths, which follow from the unit alone: so do the scores, to the bit."""
        found: dict[int, Scores] = {}
        for batch in batches_by_tokens([len(document) for document in documents], self.run.score.tokens_per_batch):
            chosen = [documents[i] for i in batch]
            places = [scored_positions(document, self.run.score.positions) for document in chosen]
            scores = score_documents(self.teacher, [d.tokens for d in chosen], places, self.run.score.distribution)
            for i, score in zip(batch, scores, strict=True):
                _check_finite(score, documents[i], self.model)
                found[i] = score
            yield sum(len(document) for document in chosen)
        return [found[i] for i in range(len(documents))]


def _commit_part(folder: Location, documents: list[Document], scores: list[Scores], teacher: LanguageModel) -> None:
    """Data first, then the manifest that gives it a meaning. Another driver may have been first with the same documents; its part
    stands then, and ours is deleted."""
    digests = [document.digest for document in documents]
    key = documents_key(digests)
    with ShardWriter(folder, f"part-{key}", stored_schema(SCHEMA)) as writer:
        for rows in batches_by_entries(scores):
            writer.write(to_planes(to_batch(digests[rows], [len(d.tokens) for d in documents[rows]], scores[rows])))
    facts = {
        "digests": digests,
        "tokens": sum(len(document.tokens) for document in documents),
        "scored_tokens": sum(len(score.positions) for score in scores),
        "entries": sum(len(score.ids) for score in scores),
        "torch": str(torch.__version__),
        "device": teacher.head.weight.device.type,
    }
    identity = {"documents": key, "teacher": _teacher_id(folder)}
    ours = Manifest(kind="teacher-part", identity=identity, files=(writer.entry,), facts=facts)
    committed = commit(folder, ours, f"parts/{key}.json")
    if committed.files[0].name != writer.entry.name:
        folder.delete(writer.entry.name)


def _teacher_id(folder: Location) -> str:
    return folder.url.rsplit("/", 1)[-1]


def _check_finite(score: Scores, document: Document, model: ModelFolder) -> None:
    if not score.finite:
        raise DistftError(
            f"The teacher's distribution over document {document.digest} is not finite.",
            where=f"{document.file}:{document.row}",
            help=f"Nothing of its part was stored. See whether {model.path.name} runs in this dtype at all; if only this row does "
            "it, remove the row.",
        )  # fmt: skip
