"""CORPUS to TEACHER: every document that the cache does not hold yet is read once.

A cache belongs to a teacher and a policy, not to a corpus: `teacher/<id>/` grows by parts, each a set of documents committed on its
own. A corpus is covered when all of its documents are in some part; that is written down in `coverage/<documents>.json`, last.
So an interrupted run loses at most the parts that were under way, a larger corpus costs its new documents, and a smaller one nothing.

Here is the driver: what is missing, cut into units, and the coverage. `teacher/scorer.py` scores a unit and commits it as a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from distft.config.schema import Run
from distft.corpus.reader import Corpus
from distft.errors import DistftError
from distft.progress import track
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit, read_manifest
from distft.store.model_folder import ModelFolder
from distft.teacher.identity import IDENTITY, documents_key, read_parts, teacher_folder, teacher_identity
from distft.teacher.scorer import Scorer, ScorerPlan, Unit, UnitScored

PART_TOKENS = 1 << 20
"""The most tokens that an interruption can cost each scorer."""
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
    coverage: Manifest
    documents_scored: int
    tokens_scored: int


def build_teacher(run: Run, corpus: Corpus, model: ModelFolder, store: Location, map_units: MapUnits = in_process) -> Scored:
    """Scores what is missing and commits the corpus's coverage. Loads no weights when nothing is missing."""
    identity = teacher_identity(model, run.score, run.teacher_model.dtype)
    folder = teacher_folder(store, identity)
    commit(folder, Manifest(kind="teacher", identity=identity, files=()), IDENTITY)
    wanted = {digest: (split, row) for split in corpus.splits for row, digest in enumerate(corpus.digests(split))}
    covered = read_manifest(folder.child("coverage"), f"{documents_key(wanted)}.json")
    if covered is not None:
        return Scored(folder=folder, coverage=covered, documents_scored=0, tokens_scored=0)

    held = {digest for part in read_parts(folder) for digest in part.facts["digests"]}
    missing = [digest for digest in wanted if digest not in held]
    units = units_of(corpus, wanted, set(missing))
    plan = ScorerPlan(run=run, model=model, folder=folder, corpus=corpus.folder, opened=corpus)
    results = _score(plan, units, map_units) if units else []
    return Scored(
        folder=folder,
        coverage=_commit_coverage(folder, set(wanted)),
        documents_scored=sum(result.documents for result in results),
        tokens_scored=sum(result.scored_tokens for result in results),
    )


def _score(plan: ScorerPlan, units: list[Unit], map_units: MapUnits) -> list[UnitScored]:
    with track("score", sum(unit.tokens for unit in units), "tokens") as meter:
        return list(map_units(plan, units, meter.advance))


def units_of(corpus: Corpus, wanted: dict[str, tuple[str, int]], missing: set[str]) -> list[Unit]:
    """What is missing, as units. They are cut out of the whole corpus, and those that are held already drop out: what an interrupted
    run has left over is then scored in the same company, and so to the same bits, as if nothing had happened."""
    lengths = {split: corpus.lengths(split) for split in corpus.splits}
    sizes = {digest: int(lengths[split][row]) for digest, (split, row) in wanted.items()}
    parts = _cut(list(wanted), list(sizes.values()), max(1, min(PART_TOKENS, sum(sizes.values()) // PARTS_AT_LEAST)))
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


def _commit_coverage(folder: Location, wanted: set[str]) -> Manifest:
    """Names the parts that hold the wanted documents. Where two parts hold one document, the first in name order serves it."""
    files: list[FileEntry] = []
    open_digests, facts = set(wanted), {"scored_tokens": 0, "entries": 0, "bytes": 0}
    for part in read_parts(folder):
        useful = open_digests & set(part.facts["digests"])
        if useful:
            files.extend(part.files)
            facts["scored_tokens"] += part.facts["scored_tokens"]
            facts["entries"] += part.facts["entries"]
            facts["bytes"] += sum(entry.size for entry in part.files)
            open_digests -= useful
    if open_digests:
        raise DistftError(f"{len(open_digests)} documents are in no part of the cache although all were scored.", where=folder.url,
                          help="Parts were deleted while this ran. Run `distft score` again.")  # fmt: skip
    key = documents_key(wanted)
    identity = {"teacher": folder.url.rsplit("/", 1)[-1], "documents": key}
    manifest = Manifest(kind="teacher-coverage", identity=identity, files=tuple(files), facts={**facts, "documents": len(wanted)})
    return commit(folder, manifest, f"coverage/{key}.json")
