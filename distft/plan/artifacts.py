"""Which artifacts of a run exist, which are missing, and which exist for something else."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import asdict, dataclass
from typing import Any, Literal

from distft.config.schema import Run
from distft.store.location import Location
from distft.store.manifest import Manifest, describe, differences, read_manifest
from distft.store.nearest import nearest
from distft.teacher.head_file import head_is_there, keeps_hidden
from distft.teacher.identity import (
    IDENTITY,
    documents_key,
    held_documents,
    is_whole,
    quarantined_documents,
    read_parts,
    teacher_folder,
)
from distft.train.identity import model_identity
from distft.train.record import newest_checkpoint

State = Literal["have", "partial", "stale", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One artifact. stale: the store holds one of its kind, made from something else; `note` lists in what."""

    artifact: str
    state: State
    note: str
    verb: str
    """What makes it."""

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def survey(
    run: Run,
    store: Location,
    *,
    corpus_identity: dict[str, Any],
    teacher_identity: dict[str, Any] | None,
    run_identity: dict[str, Any],
    digests: Set[str] | None,
) -> list[Status]:
    """The state of every artifact in the order of the flow. Writes nothing. `digests` are the corpus's documents, where there is
    one."""
    corpus_folder = store.child("corpus", Manifest(kind="corpus", identity=corpus_identity, files=()).id)
    found = [_corpus(store, read_manifest(corpus_folder), corpus_identity, corpus_folder)]
    if teacher_identity is not None:
        found.append(_teacher(store, teacher_identity, digests))
    found.extend(_run(run, store, run_identity))
    return found


def _corpus(store: Location, corpus: Manifest | None, identity: dict[str, Any], folder: Location) -> Status:
    if corpus is not None:
        split = corpus.facts["train"]
        note = (
            f"to train: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['supervised_tokens']:,} supervised, "
            f"{split['dropped']:,} dropped"
        )
        return Status(artifact="corpus", state="have", note=note, verb="tokenize")
    if folder.child("parts").names():
        return Status(artifact="corpus", state="partial", note="an interrupted build goes on", verb="tokenize")
    other = nearest(store.child("corpus"), identity)
    if other is None:
        return Status(artifact="corpus", state="missing", note="", verb="tokenize")
    return Status(artifact="corpus", state="stale", note=describe(other.fields), verb="tokenize")


def _teacher(store: Location, identity: dict[str, Any], digests: Set[str] | None) -> Status:
    folder = teacher_folder(store, identity)
    if read_manifest(folder, IDENTITY) is None:
        other = nearest(store.child("teacher"), identity, IDENTITY)
        if other is None:
            return Status(artifact="teacher", state="missing", note="", verb="score")
        return Status(artifact="teacher", state="stale", note=describe(other.fields), verb="score")
    coverage = read_manifest(folder.child("coverage"), f"{documents_key(digests)}.json") if digests is not None else None
    if digests is not None and coverage is not None and is_whole(coverage):
        if keeps_hidden(identity) and not head_is_there(folder):
            note = f"all {len(digests):,} documents, without the copy of the teacher's head; it alone is written again"
            return Status(artifact="teacher", state="partial", note=note, verb="score")
        return Status(artifact="teacher", state="have", note=f"all {len(digests):,} documents", verb="score")
    parts = read_parts(folder)
    held, unreadable = held_documents(parts), quarantined_documents(parts).keys()
    if digests is None:
        return Status(
            artifact="teacher",
            state="partial",
            note=f"{len(held):,} documents; how many serve is known after tokenize",
            verb="score",
        )
    note = f"{len(digests & held):,} of {len(digests):,} documents"
    if digests <= held:
        note += ", scored for others; nothing is left to score"
    if digests - held - unreadable:
        note += "; the others alone are scored"
    if digests & unreadable:
        note += f"; {len(digests & unreadable):,} that the teacher could not read must be left out (data.exclude)"
    return Status(artifact="teacher", state="partial", note=note, verb="score")


def _run(run: Run, store: Location, identity: dict[str, Any]) -> list[Status]:
    folder = store.child("runs", run.name)
    found = newest_checkpoint(folder.child("checkpoints"))
    newest = found[1] if found else None
    model = read_manifest(folder.child("model"))
    exported = _model(run, newest, model, identity)
    evaluated = _evaluation(run, folder, model, exported)
    return [_checkpoints(newest, identity), exported, evaluated, _report(folder, evaluated)]


def _checkpoints(newest: Manifest | None, identity: dict[str, Any]) -> Status:
    if newest is None:
        return Status(artifact="checkpoints", state="missing", note="", verb="train")
    changed = differences(newest.identity["run"], identity)
    if changed:
        return Status(artifact="checkpoints", state="stale", note=describe(changed), verb="train")
    step, total = newest.identity["step"], newest.facts["total_steps"]
    return Status(
        artifact="checkpoints", state="have" if step >= total else "partial", note=f"step {step:,} of {total:,}", verb="train"
    )


def _model(run: Run, newest: Manifest | None, model: Manifest | None, identity: dict[str, Any]) -> Status:
    if model is None:
        return Status(artifact="model", state="missing", note="", verb="export")
    step = newest.identity["step"] if newest else None
    changed = differences(model.identity, model_identity(run, {"step": step, "run": identity}))
    return Status(artifact="model", state="stale" if changed else "have", note=describe(changed), verb="export")


def _evaluation(run: Run, folder: Location, model: Manifest | None, exported: Status) -> Status:
    def status(state: State, note: str = "") -> Status:
        return Status(artifact="eval", state=state, note=note, verb="evaluate")

    if not folder.child("eval").exists("summary.json"):
        return status("missing")
    summary = json.loads(folder.child("eval").read("summary.json"))
    if model is None or exported.state != "have" or summary.get("model") != model.content_digest:
        return status("stale", "measured on another model than this config's")
    absent = [task.name for task in run.evaluate.tasks if task.name not in summary["scores"]]
    return status("partial", f"not measured: {', '.join(absent)}") if absent else status("have")


def _report(folder: Location, evaluated: Status) -> Status:
    state: State = "missing"
    if folder.exists("report.html"):
        state = "have" if evaluated.state == "have" else "stale"
    return Status(
        artifact="report", state=state, note="written before what it is about" if state == "stale" else "", verb="report"
    )
