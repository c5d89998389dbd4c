"""`plan`: what is there, what a run would take, and what its objective will do with the tokens."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distft.config.check import unread_anchors
from distft.config.schema import Run
from distft.corpus.reader import Corpus
from distft.errors import ArtifactError, ConfigError, MissingArtifactError
from distft.objectives.treatment import Signals
from distft.plan.artifacts import survey
from distft.plan.estimate import estimate_run
from distft.plan.measured import Lengths, TokenBytes, bytes_in_store, reading
from distft.plan.tokens import MOST_BYTES, MOST_DOCUMENTS, MOST_TOKENS, Seen, TokenPlan, plan_tokens
from distft.progress import say
from distft.store.location import Location
from distft.store.model_folder import ModelFolder
from distft.teacher.identity import teacher_folder
from distft.train.order import StepPlan
from distft.train.schedule import check_warmup

if TYPE_CHECKING:
    from distft.teacher.calibrate import Calibration


class Planned(Protocol):
    """What a plan is about. Each part is found, and may prove wrong, when it is first asked for; so a teacher that is not read is
    never looked at."""

    @property
    def run(self) -> Run: ...
    @cached_property
    def store(self) -> Location: ...
    @cached_property
    def staging(self) -> Path: ...
    @cached_property
    def model(self) -> ModelFolder: ...
    @cached_property
    def teacher(self) -> ModelFolder: ...
    @cached_property
    def corpus_identity(self) -> dict[str, Any]: ...
    @cached_property
    def teacher_identity(self) -> dict[str, Any]: ...
    @cached_property
    def run_identity(self) -> dict[str, Any]: ...


def plan_run(planned: Planned, corpus: Corpus | None, *, calibrate: bool, page: Path | None) -> dict[str, Any]:
    """What is there, what a run would take, and, once the teacher has scored, what the objective will do with the tokens. With
    `calibrate` the teacher reads a few documents here, and is measured; `page` is where tokens are to be seen in their text."""
    run, store = planned.run, planned.store
    unread = unread_anchors(run)
    if unread is not None:
        say(f"plan: {unread}")
    read = steps = found = None
    if corpus is not None:
        lengths = corpus.lengths("train")
        read, found = reading(corpus, run.score.positions), Lengths.of(lengths)
        steps = StepPlan(lengths, run.train).total_steps
        check_warmup(run.train, steps)
    teacher, identity = (planned.teacher, planned.teacher_identity) if run.needs_teacher else (None, None)
    statuses = survey(
        run, store, corpus_identity=planned.corpus_identity, digests=read.digests if read else None,
        teacher_identity=identity, run_identity=planned.run_identity,
    )  # fmt: skip
    measured = _measured(planned, corpus) if calibrate else None
    known = bytes_in_store(store, identity) if identity else None
    if measured is not None:
        known = TokenBytes(amount=measured.bytes_per_token, basis=f"measured on {measured.documents} documents")
    estimate = estimate_run(run, planned.model, teacher, reading=read, lengths=found, known=known)
    tokens = _tokens(planned, corpus)
    result: dict[str, Any] = {
        "artifacts": [status.facts() for status in statuses],
        "estimate": {**estimate.facts(), "steps": steps},
        "config": run.model_dump(mode="json"),
        "tokens": tokens.facts() if tokens else None,
    }
    if page is not None:
        result["page"] = _page(planned, tokens, page)
    if measured is not None:
        result["calibration"] = measured.facts((read.tokens, read.scored_tokens) if read else None)
    return result


def _measured(planned: Planned, corpus: Corpus | None) -> Calibration:
    if not planned.run.needs_teacher:
        raise ConfigError("There is nothing to calibrate: neither objective nor drift meter reads a teacher.", where="--calibrate",
                          help="Plan without --calibrate, or give an objective or data.heldout that needs one.")  # fmt: skip
    from distft.teacher.calibrate import calibrate

    return calibrate(planned.run, planned.model, planned.teacher, corpus)


def _tokens(planned: Planned, corpus: Corpus | None) -> TokenPlan | None:
    """What the objective does with the training documents that the teacher has scored; None while there are none."""
    run, store = planned.run, planned.store
    if corpus is None or not (run.needs_teacher or store.child("teacher").folders()):
        return None
    from distft.teacher.glimpse import glimpse

    try:
        found = glimpse(
            teacher_folder(store, planned.teacher_identity), corpus, planned.staging, positions=run.score.positions,
            documents=MOST_DOCUMENTS, tokens=MOST_TOKENS, bytes=MOST_BYTES,
        )  # fmt: skip
    except ArtifactError as error:
        say(f"plan: what the objective will do is left out: {error}")  # a plan says what it can; `train` refuses the damage
        return None
    seen = [
        Seen(document=document, entries=scores.counts,
             signals=Signals(label_logprob=scores.label_logprob, entropy=scores.entropy, rank=scores.rank))
        for document, scores in found.documents
    ]  # fmt: skip
    if not seen:
        return None
    return plan_tokens(run, seen, held=found.held, rows=found.rows, vocabulary=planned.model.vocabulary_rows())


def _page(planned: Planned, tokens: TokenPlan | None, page: Path) -> str:
    from distft.plan.token_page import write_token_page

    if tokens is None:
        raise MissingArtifactError(
            "There is no page to write: the teacher has scored no training document.", where="--page",
            help="Run `distft tokenize` and `distft score` with this config; with score.limit=100 it is a trial.",
        )  # fmt: skip
    return write_token_page(planned.run, tokens, planned.model, page, store=planned.store)
