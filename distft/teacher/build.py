"""CORPUS to TEACHER: every document that the cache does not hold yet is read once.

A cache belongs to a teacher and a policy, not to a corpus: `teacher/<id>/` grows by parts, each a set of documents committed on its
own. A corpus is covered when all of its documents are in some part; that is written down in `coverage/<documents>.json`, last.
So an interrupted run loses at most the parts that were under way, a larger corpus costs its new documents, and a smaller one nothing.
Documents that the teacher could not read count as tried: they are read again only when `score.retry_quarantined` asks for it.

Here is the driver: what is missing, cut into units. `teacher/scorer.py` scores a unit and commits it as a part.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from distft.config.schema import Hidden, Run
from distft.corpus.reader import Corpus
from distft.progress import say, track
from distft.store.location import Location
from distft.store.manifest import Manifest, commit
from distft.store.model_folder import ModelFolder
from distft.teacher.coverage import Coverage, commit_coverage, places_of, read_coverage, survey, token_counts
from distft.teacher.head_file import head_is_there
from distft.teacher.identity import (
    IDENTITY,
    documents_key,
    held_documents,
    quarantined_documents,
    read_parts,
    teacher_folder,
    teacher_identity,
)
from distft.teacher.part import numbered
from distft.teacher.scorer import Scorer, ScorerPlan, Unit, UnitScored

PART_TOKENS = 1 << 20
"""The most tokens that an interruption can cost each scorer."""
PART_BYTES = 1 << 30
"""The most bytes of hidden states in a part, before compression."""
PARTS_AT_LEAST = 16
"""A small corpus is cut finer, so that an interruption costs little of it, too."""


class MapUnits(Protocol):
    """Scores units with scorers that it makes, here or elsewhere; gives each unit's result once, in any order. `report` is told of
    tokens as they are read; a negative number takes some back."""

    def __call__(
        self, make_worker: Callable[[], Scorer], units: Iterable[Unit], report: Callable[[float, str], object], /
    ) -> Iterator[UnitScored]: ...


def in_process(
    make_worker: Callable[[], Scorer], units: Iterable[Unit], report: Callable[[float, str], object]
) -> Iterator[UnitScored]:
    """One unit after the other, in this process."""
    scorer = make_worker()
    report(0.0, "")  # ready
    for unit in units:
        steps = scorer(unit)
        while True:
            try:
                report(next(steps), "")
            except StopIteration as ended:
                yield ended.value
                break


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a run of `score` did."""

    folder: Location
    coverage: Coverage
    """Of the whole corpus, after a trial too; only a trial leaves documents missing."""
    documents_scored: int
    """By this driver: what another was first with does not count, nor do its tokens."""
    tokens_scored: int
    tokens_per_second: float | None
    """Tokens that were read in a second, by all scorers; None where there was too little to tell."""


def build_teacher(run: Run, corpus: Corpus, model: ModelFolder, store: Location, map_units: MapUnits = in_process) -> Scored:
    """Scores what is missing and commits the corpus's coverage; with `score.limit`, scores so much of it and commits none. Loads no
    weights when nothing is missing."""
    identity = teacher_identity(model, run.score, run.teacher_model.dtype)
    folder = teacher_folder(store, identity)
    commit(folder, Manifest(kind="teacher", identity=identity, files=()), IDENTITY)
    wanted = places_of(corpus)
    plan = ScorerPlan(run=run, model=model, folder=folder, corpus=corpus.folder, opened=corpus)
    covered = read_coverage(folder, wanted)
    if covered is not None:
        _restore_head(plan, map_units)
        return Scored(folder=folder, coverage=covered, documents_scored=0, tokens_scored=0, tokens_per_second=None)

    parts = read_parts(folder)
    held = held_documents(parts)
    if not run.score.retry_quarantined:
        held |= quarantined_documents(parts).keys()
    asked = wanted if run.score.limit is None else {d: wanted[d] for d in corpus.digests("train")[: run.score.limit]}
    missing = [digest for digest in asked if digest not in held]
    units = _fresh(units_of(corpus, asked, set(missing), part_tokens(run, model)), parts)
    if not units:
        _restore_head(plan, map_units)
        found = commit_coverage(folder, wanted, parts) if run.score.limit is None else survey(wanted, parts)
        return Scored(folder=folder, coverage=found, documents_scored=0, tokens_scored=0, tokens_per_second=None)
    del parts, held, missing  # names of all documents, thrice: nothing to hold while the teacher reads
    results, pace = _score(plan, units, map_units)
    return Scored(
        folder=folder,
        coverage=commit_coverage(folder, wanted) if run.score.limit is None else survey(wanted, read_parts(folder)),
        documents_scored=sum(result.documents for result in results),
        tokens_scored=sum(result.scored_tokens for result in results),
        tokens_per_second=pace,
    )


def the_rest(scored: Scored, corpus: Corpus, positions: str) -> dict[str, Any]:
    """What the documents that are still missing would take, by what those took that were scored."""
    missing, pace = scored.coverage.missing, scored.tokens_per_second
    tokens, kept = token_counts(corpus, scored.coverage.wanted, missing, positions)
    return {
        "documents": len(missing), "tokens": tokens, "bytes": round(kept * scored.coverage.bytes_per_token),
        "hours": tokens / pace / 3600 if pace else None, "tokens_per_second": pace,
    }  # fmt: skip


def _restore_head(plan: ScorerPlan, map_units: MapUnits) -> None:
    """Where nothing is to be scored, and the copy of the head that hidden states need is gone: a scorer writes it when it is made. The
    unit that it is given has its part, so that it reads nothing."""
    if not isinstance(plan.run.score.distribution, Hidden) or head_is_there(plan.folder):
        return
    for name in plan.folder.child("parts").names()[:1]:
        say("score: the copy of the teacher's head is not there; it is written again")
        list(map_units(plan, [Unit(name=name.removesuffix(".json"), places=(), tokens=0)], lambda amount, note: None))


class _Pace:
    """Passes amounts of work on, and knows how many a second were read since the first scorer was ready: loading a model takes no
    longer for a larger corpus."""

    def __init__(self, report: Callable[[float, str], object]) -> None:
        self.report, self.done = report, 0.0
        self.start = self.last = time.monotonic()

    def __call__(self, amount: float, note: str) -> None:
        self.last = time.monotonic()
        if not self.done:
            self.start = self.last if not amount else self.start  # amounts of 0 say that a scorer lives, then that it is ready
        self.done += amount
        self.report(amount, note)

    def rate(self, found: float) -> float | None:
        """`found` were passed on without being read: their parts were there."""
        read = self.done - found
        return read / (self.last - self.start) if read > 0 and self.last > self.start else None


def _score(plan: ScorerPlan, units: list[Unit], map_units: MapUnits) -> tuple[list[UnitScored], float | None]:
    """In an order that means nothing, and that no other driver has: of two at once, each then finds the other's parts and scores the
    rest. In one order both would read the same documents all the time."""
    units = random.Random().sample(units, len(units))
    with track("score", sum(unit.tokens for unit in units), "tokens") as meter:
        pace = _Pace(meter.advance)
        results = list(map_units(plan, units, pace))
    crowded = sum(result.crowded for result in results)
    if crowded:
        say(f"score: {crowded:,} batches did not fit in memory and were read document by document, which takes longer. Lower "
            f"score.tokens_per_batch, which is {plan.run.score.tokens_per_batch:,}.")  # fmt: skip
    return results, pace.rate(sum(result.found_tokens for result in results))


def _fresh(units: list[Unit], parts: list[Manifest]) -> list[Unit]:
    """The units under names that no part has. One of the very same documents is there when none of them could be read, and all are
    tried again."""
    taken = Counter(part.identity["documents"] for part in parts)
    return [replace(unit, name=numbered(unit.name, taken[unit.name] + 1)) for unit in units]


def part_tokens(run: Run, model: ModelFolder) -> int:
    """The most tokens of a part: fewer where each takes kilobytes."""
    if not isinstance(run.score.distribution, Hidden):
        return PART_TOKENS
    config = model.config.get("text_config") or model.config
    return max(1, min(PART_TOKENS, PART_BYTES // (4 * int(config["hidden_size"]))))


def units_of(
    corpus: Corpus, wanted: dict[str, tuple[str, int]], missing: set[str], most: int = PART_TOKENS
) -> list[Unit]:  # fmt: skip
    """What is missing, as units. They are cut out of all that is wanted, and those that are held already drop out: what an interrupted
    run has left over is then scored in the same company, and so to the same bits, as if nothing had happened.

    A trial (`score.limit`) wants its few documents alone. Cut out of the whole corpus, they would be one unit, which one scorer reads
    while the others wait, and its pace would be no measure of theirs. So a full run finds them with the bits of the trial's batches,
    which differ from its own as those of another score.tokens_per_batch do."""
    lengths = {split: corpus.lengths(split) for split in corpus.splits}
    sizes = {digest: int(lengths[split][row]) for digest, (split, row) in wanted.items()}
    parts = _cut(list(wanted), list(sizes.values()), max(1, min(most, sum(sizes.values()) // PARTS_AT_LEAST)))
    open_parts = [[digest for digest in part if digest in missing] for part in parts]
    return [
        Unit(name=documents_key(part), places=tuple(wanted[digest] for digest in part), tokens=sum(sizes[d] for d in part))
        for part in open_parts
        if part
    ]


def _cut(digests: list[str], sizes: list[int], limit: int) -> list[list[str]]:
    """Consecutive runs of about `limit` tokens."""
    parts: list[list[str]] = []
    room = 0
    for digest, size in zip(digests, sizes, strict=True):
        if not parts or room < size:
            parts.append([])
            room = limit
        parts[-1].append(digest)
        room -= size
    return parts
