"""Scores one unit of documents and commits it as a part of the cache; wherever it runs, in the driver's process or in an actor's.

A unit is named by its documents and committed once: whoever scores it again, after a crash or beside another driver, finds the part
or loses the race for it, and the cache is the same. Documents that the teacher cannot read stand in the part by name, with no row.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from distft.config.schema import Hidden, Run
from distft.corpus.reader import Corpus, Document
from distft.corpus.render import token_rows
from distft.engine.load import load_model
from distft.engine.memory import enough_memory
from distft.engine.world import World, join_group, this_device
from distft.errors import CorruptArtifactError, DistftError, StaleArtifactError
from distft.store.digest import memo_path
from distft.store.location import Location
from distft.store.lock import exclusively
from distft.store.manifest import Manifest
from distft.store.model_folder import ModelFolder, resolve_model
from distft.teacher.forward import score_documents
from distft.teacher.head_copy import commit_head
from distft.teacher.identity import documents_key, scored_positions, teacher_identity
from distft.teacher.part import PartWriter
from distft.teacher.quarantine import LESS_MEMORY, Reading, attempt, positions_limit, read_apart, witnesses
from distft.teacher.scores import Scores

TOO_LARGE = (
    "It is the weights that do not fit, whatever the batch: spread them with score.tensor_parallel, halve them with"
    " teacher.dtype=bfloat16, or take a GPU with more memory. Fewer scorers on a machine leave more to each."
)
"""What helps where the memory does not suffice to load a teacher."""
FAILED_TOGETHER = (
    "The worker's own message, above, says what failed. With score.tensor_parallel=1, where the teacher fits on one GPU, it shows"
    " whether it is the group. What was scored so far is kept."
)


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
    """What became of a unit: what this scorer added to the cache. Nothing, where its part was there, or another was faster with it."""

    documents: int
    """Those with scores."""
    scored_tokens: int
    quarantined: int = 0
    crowded: int = 0
    """Batches that did not fit in memory at once, and were read document by document."""
    found_tokens: int = 0
    """Those that nobody here had to read, for the part was there."""


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
        group = join_group()
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # other scorers are beside this one, one for each core
        corpus = Corpus.open(self.corpus, memo_path().parent / "staging", self.run.data.exclude)
        return Scorer(self.run, corpus, self._model_here(), self.folder, group)

    def _model_here(self) -> ModelFolder:
        """The model on this machine, with the very bytes that the command was started with: others would be mixed into the cache."""
        config = self.run.teacher_model
        given = str(self.model.path), None
        model = resolve_model(*(given if self.model.path.is_dir() else (config.path, config.revision)))
        # On a fresh machine all its scorers get here at once: one reads every byte of the weights, the others find the digests.
        with exclusively(memo_path().with_name(f"hashing-{_teacher_id(self.folder)}.lock")):
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
    """A loaded teacher. A call scores a unit, yields tokens as they are read, and returns what it did.

    Of a `group` of ranks that hold the teacher together, all are called with the same unit; the leading one writes."""

    def __init__(
        self, run: Run, corpus: Corpus, model: ModelFolder, folder: Location, group: World | None = None
    ) -> None:  # fmt: skip
        self.run, self.corpus, self.model, self.folder, self.group = run, corpus, model, folder, group or World()
        with enough_memory(TOO_LARGE):
            self.teacher = load_model(
                model, dtype=run.teacher_model.dtype, attention=run.model.attention, head_rows=token_rows(model),
                device=this_device(), group=group,
            )  # fmt: skip
        self.room = positions_limit(self.teacher)
        if isinstance(run.score.distribution, Hidden):
            commit_head(folder, self.teacher, self.group)

    def __call__(self, unit: Unit) -> Generator[float, None, UnitScored]:
        # One rank looks, and all do as it says: between two looks another driver may commit the part.
        [there] = self.group.total(self.group.leads and self.folder.exists(f"parts/{unit.name}.json"))
        if there:
            yield unit.tokens
            return UnitScored(documents=0, scored_tokens=0, found_tokens=unit.tokens)
        documents = [self.corpus.document(*place) for place in unit.places]
        if documents_key(document.digest for document in documents) != unit.name.partition("-")[0]:
            raise CorruptArtifactError(f"The documents of unit {unit.name} are others here.", where=self.corpus.folder.url,
                                       help="Run the command again, and `distft tokenize` if that does not help.")  # fmt: skip
        stands = True
        with PartWriter(self.folder, unit.name) as part:
            reading = yield from self.read(documents, part.add if self.group.leads else lambda rows: None)
            if not reading.documents:
                self._refuse_a_broken_teacher(documents[0], reading)
            if self.group.leads:
                device = self.teacher.device.type
                facts = {"torch": str(torch.__version__), "device": device, "ranks": self.group.size}
                stands = part.commit(reading.quarantined, facts)
        if not stands:
            return UnitScored(documents=0, scored_tokens=0, crowded=reading.crowded)
        return UnitScored(
            documents=reading.documents, scored_tokens=reading.scored_tokens, quarantined=len(reading.quarantined),
            crowded=reading.crowded,
        )  # fmt: skip

    def read(
        self, documents: list[Document], keep: Callable[[list[tuple[Document, Scores]]], None] = lambda rows: None
    ) -> Generator[float, None, Reading]:
        """Reads documents and stores nothing; `keep` gets them with their scores as they are read."""
        limit = self.run.score.tokens_per_batch
        return read_apart(documents, self._batch, keep, tokens_per_batch=limit, room=self.room)

    def _batch(self, documents: list[Document]) -> list[Scores]:
        places = [scored_positions(document, self.run.score.positions) for document in documents]
        with self._no_rank_goes_on_alone():
            return score_documents(
                self.teacher, [d.tokens for d in documents], places, self.run.score.distribution, self.group
            )  # fmt: skip

    @contextmanager
    def _no_rank_goes_on_alone(self) -> Iterator[None]:
        """What a rank alone would read again, the others would not, and all would wait for ever."""
        if self.group.size == 1:
            yield
            return
        try:
            with enough_memory(LESS_MEMORY):
                yield
        except DistftError as error:
            if not isinstance(error.__cause__, RuntimeError):  # what `enough_memory` translates comes from one
                raise
            raise self._failed_together(error.problem, error.help) from None
        except RuntimeError as error:
            raise self._failed_together(str(error), FAILED_TOGETHER) from None

    def _failed_together(self, problem: str, help: str) -> DistftError:
        return DistftError(
            f"Rank {self.group.rank} of {self.group.size} that hold the teacher together failed: {problem[:300]}",
            where=f"score.tensor_parallel={self.group.size}", help=help,
        )  # fmt: skip

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


def _teacher_id(folder: Location) -> str:
    return folder.url.rsplit("/", 1)[-1]
