"""CORPUS to TEACHER: every document that the cache does not hold yet is read once.

A cache belongs to a teacher and a policy, not to a corpus: `teacher/<id>/` grows by parts, each a set of documents committed on its
own. A corpus is covered when all of its documents are in some part; that is written down in `coverage/<documents>.json`, last.
So an interrupted run loses at most a part, a larger corpus costs its new documents, and a smaller one nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distft.config.schema import Run
from distft.corpus.reader import Corpus, Document
from distft.corpus.render import token_rows
from distft.engine.load import LanguageModel, load_model
from distft.engine.pack import batches_by_tokens
from distft.engine.world import this_device
from distft.errors import DistftError
from distft.progress import track
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit, read_manifest
from distft.store.model_folder import ModelFolder
from distft.store.shards import ShardWriter
from distft.teacher.encode import SCHEMA, batches_by_entries, to_batch
from distft.teacher.forward import Scores, score_documents
from distft.teacher.identity import IDENTITY, documents_key, read_parts, scored_positions, teacher_folder, teacher_identity
from distft.teacher.planes import stored_schema, to_planes

PART_TOKENS = 1 << 20
"""The most tokens that an interruption can cost."""
PARTS_AT_LEAST = 16
"""A small corpus is cut finer, so that an interruption costs little of it, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a run of `score` did."""

    folder: Location
    coverage: Manifest
    documents_scored: int
    tokens_scored: int


def build_teacher(run: Run, corpus: Corpus, model: ModelFolder, store: Location) -> Scored:
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
    tokens = _score_missing(run, corpus, model, folder, wanted, missing) if missing else 0
    return Scored(
        folder=folder, coverage=_commit_coverage(folder, set(wanted)), documents_scored=len(missing), tokens_scored=tokens
    )


def _score_missing(
    run: Run, corpus: Corpus, model: ModelFolder, folder: Location, wanted: dict[str, tuple[str, int]], missing: list[str]
) -> int:
    teacher = load_model(
        model, dtype=run.teacher_model.dtype, attention=run.model.attention, head_rows=token_rows(model), device=this_device()
    )
    lengths = {split: corpus.lengths(split) for split in corpus.splits}
    sizes = [int(lengths[split][row]) for split, row in (wanted[digest] for digest in missing)]
    parts = _cut(missing, sizes, max(1, min(PART_TOKENS, sum(sizes) // PARTS_AT_LEAST)))
    scored_tokens = 0
    with track("score", sum(sizes), "tokens") as meter:
        for digests in parts:
            documents = [corpus.document(*wanted[digest]) for digest in digests]
            scores: list[Scores | None] = [None] * len(documents)
            for batch in batches_by_tokens([len(d.tokens) for d in documents], run.score.tokens_per_batch):
                chosen = [documents[i] for i in batch]
                places = [scored_positions(d, run.score.positions) for d in chosen]
                for i, score in zip(
                    batch, score_documents(teacher, [d.tokens for d in chosen], places, run.score.distribution), strict=True
                ):
                    _check_finite(score, documents[i], model)
                    scores[i] = score
                meter.advance(sum(len(d.tokens) for d in chosen))
            done = [score for score in scores if score is not None]
            _commit_part(folder, documents, done, teacher)
            scored_tokens += sum(len(score.positions) for score in done)
    return scored_tokens


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
    identity = {"documents": key, "teacher": folder.url.rsplit("/", 1)[-1]}
    ours = Manifest(kind="teacher-part", identity=identity, files=(writer.entry,), facts=facts)
    committed = commit(folder, ours, f"parts/{key}.json")
    if committed.files[0].name != writer.entry.name:
        folder.delete(writer.entry.name)


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


def _check_finite(score: Scores, document: Document, model: ModelFolder) -> None:
    if not score.finite:
        raise DistftError(
            f"The teacher's distribution over document {document.digest} is not finite.",
            where=f"{document.file}:{document.row}",
            help=f"Nothing of its part was stored. See whether {model.path.name} runs in this dtype at all; if only this row does "
            "it, remove the row.",
        )  # fmt: skip
