"""MODEL to EVAL: every task on the model before and after, and the drift between them.

What one model did on one task is an artifact of its own, `eval/<id>/`, known by the model's bytes and the task's: the untouched model
is evaluated once, whatever the number of runs that start from it.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from distft.config.schema import GenerateTask, NllTask, Run
from distft.corpus.chat import load_tokenizer
from distft.corpus.reader import Corpus, Document
from distft.corpus.render import render_source, token_rows
from distft.engine.base import MicroBatch
from distft.engine.head import measure_batch
from distft.engine.load import LanguageModel, load_model
from distft.engine.pack import batches_by_tokens
from distft.engine.world import World, this_device
from distft.errors import MissingArtifactError, StaleArtifactError
from distft.evaluate.generate import answers, stop_tokens
from distft.evaluate.judge import is_right
from distft.evaluate.tasks import Item, read_items
from distft.objectives.treatment import treatment
from distft.progress import say, track
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit, describe, differences, fetch, read_manifest
from distft.store.model_folder import ModelFolder, resolve_model
from distft.store.put import put_file
from distft.teacher.cache import TeacherCache
from distft.teacher.identity import documents_key
from distft.train.drift import measure_drift
from distft.train.identity import model_identity
from distft.train.record import newest_checkpoint
from distft.train.targets import micro_batch, supervised

SUMMARY = "summary.json"
FORMAT = "distft-eval-1"
"""Changes when the same model and items would give other figures."""


def evaluate_run(
    run: Run, base: ModelFolder, run_identity: dict[str, Any], corpus: Corpus, cache: TeacherCache | None, store: Location,
    staging: Path,
) -> dict[str, Any]:  # fmt: skip
    """Scores before and after, each with the artifact that holds its items; written to `runs/<name>/eval/summary.json` too."""
    folder = store.child("runs", run.name)
    exported = _exported(run, folder, run_identity)
    tuned = _as_folder(folder.child("model"), exported, staging)
    scores: dict[str, dict[str, Any]] = {}
    drift = None
    for label, model in (("before", base), ("after", tuned)):
        loaded = _Lazily(run, model)
        for task in run.evaluate.tasks:
            scores.setdefault(task.name, {})[label] = _task(run, task, loaded, store, label=f"{task.name} {label}")
        if label == "after" and cache is not None and "heldout" in corpus.splits:
            drift = _drift(run, loaded, corpus, cache, store)
    summary = {"model": exported.content_digest, "scores": scores, "drift": drift}
    folder.child("eval").replace(SUMMARY, json.dumps(summary, indent=1).encode())
    return {"eval": folder.child("eval").url, "scores": scores, "drift": drift}


class _Lazily:
    """A model that is loaded when something asks for it: results that are there already cost no weights."""

    def __init__(self, run: Run, folder: ModelFolder) -> None:
        self.run, self.folder = run, folder
        self._model: LanguageModel | None = None

    @property
    def model(self) -> LanguageModel:
        if self._model is None:
            config = self.run.model
            self._model = load_model(
                self.folder,
                dtype=config.dtype,
                attention=config.attention,
                head_rows=token_rows(self.folder),
                device=this_device(),
            )
        return self._model

    def measure(self, batch: MicroBatch) -> Any:
        return measure_batch(self.model, batch)

    def identity(self) -> dict[str, Any]:
        return {
            "weights": self.folder.weights_identity(),
            "tokenizer": self.folder.tokenizer_identity(),
            "dtype": self.run.model.dtype,
        }


def _task(run: Run, task: GenerateTask | NllTask, model: _Lazily, store: Location, *, label: str) -> dict[str, Any]:
    identity: dict[str, Any] = {"format": FORMAT, "model": model.identity()}
    if isinstance(task, GenerateTask):
        items = read_items(task)
        asked = hashlib.sha256(json.dumps([(i.messages, i.answer) for i in items]).encode()).hexdigest()
        stops = stop_tokens(model.folder, load_tokenizer(model.folder))
        identity |= {"settings": task.model_dump(exclude={"path", "name", "limit"}), "items": asked, "stops": stops}
        compute = partial(_generated, run, task, model, items, stops, label)
    else:
        documents = render_source(task.source, model.folder, max_tokens=run.data.max_tokens)
        asked = hashlib.sha256("\n".join(d.digest for d in documents).encode()).hexdigest()
        identity |= {"settings": {"kind": "nll"}, "items": asked}
        compute = partial(_likelihoods, run, model, documents, label)
    folder = store.child("eval", Manifest(kind="evaluation", identity=identity, files=()).id)
    done = read_manifest(folder)
    if done is None:
        rows = compute()
        made = Manifest(kind="evaluation", identity=identity, files=(_put(folder, rows),), facts=_facts(task, rows))
        done = commit(folder, made)
    return {**done.facts, "items": f"{folder.url}/{done.files[0].name}"}


def _drift(run: Run, model: _Lazily, corpus: Corpus, cache: TeacherCache, store: Location) -> dict[str, Any]:
    """Measured once for a model, a teacher and a set of held-out documents."""
    identity = {
        "format": FORMAT,
        "model": model.identity(),
        "teacher": cache.coverage.identity["teacher"],
        "documents": documents_key(corpus.digests("heldout")),
    }
    folder = store.child("eval", Manifest(kind="drift", identity=identity, files=()).id)
    done = read_manifest(folder)
    if done is None:
        documents = list(corpus.documents("heldout"))
        with track("drift", sum(len(d.tokens) for d in documents), "tokens") as meter:
            drift = measure_drift(
                model.measure, documents, cache, World(), tokens_per_batch=run.evaluate.tokens_per_batch, meter=meter
            )
        done = commit(folder, Manifest(kind="drift", identity=identity, files=(), facts=drift.facts()))
    return done.facts


def _generated(
    run: Run, task: GenerateTask, model: _Lazily, items: list[Item], stops: list[int], label: str
) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(model.folder)
    with track(label, len(items), "answers") as meter:
        given = answers(
            model.model.whole, tokenizer, [item.messages for item in items], stops=stops, max_new_tokens=task.max_new_tokens,
            tokens_per_batch=run.evaluate.tokens_per_batch, meter=meter,
        )  # fmt: skip
    return [
        {"prompt": item.messages, "reference": item.answer, "answer": text, "right": is_right(task.judge, text, item.answer)}
        for item, text in zip(items, given, strict=True)
    ]


def _likelihoods(run: Run, model: _Lazily, documents: list[Document], label: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in documents]
    with track(label, sum(len(d.tokens) for d in documents), "tokens") as meter:
        for batch in batches_by_tokens([len(d.tokens) for d in documents], run.evaluate.tokens_per_batch):
            chosen = [documents[i] for i in batch]
            counts = [int(d.supervised.sum()) for d in chosen]
            values = model.measure(
                micro_batch([supervised(d, treatment(n, ce=1.0)) for d, n in zip(chosen, counts, strict=True)])[0]
            )
            for i, nll_T in zip(batch, values.ce_N.double().split(counts), strict=True):
                rows[i] = {"document": documents[i].digest, "nll": float(nll_T.sum()), "tokens": len(nll_T)}
            meter.advance(sum(len(d.tokens) for d in chosen))
    return rows


def _facts(task: GenerateTask | NllTask, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(task, GenerateTask):
        return {"kind": "generate", "accuracy": sum(row["right"] for row in rows) / len(rows), "count": len(rows)}
    tokens = sum(row["tokens"] for row in rows)
    return {"kind": "nll", "nll": sum(row["nll"] for row in rows) / tokens, "count": len(rows), "tokens": tokens}


def _put(folder: Location, rows: list[dict[str, Any]]) -> FileEntry:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return put_file(folder, "items", "jsonl", lambda path: path.write_text(text, encoding="utf-8"), {"rows": len(rows)})


def _exported(run: Run, folder: Location, run_identity: dict[str, Any]) -> Manifest:
    """The exported model of this very run. Once the run is finished it must be the last one: an earlier one would be judged for it."""
    where = folder.child("model")
    manifest = read_manifest(where)
    if manifest is None:
        raise MissingArtifactError("The run has no exported model.", where=where.url,
                                   help="Run `distft export` with this config.")  # fmt: skip
    changed = differences(manifest.identity["checkpoint"]["run"], run_identity)
    if changed:
        raise StaleArtifactError(
            f"The exported model is of another run of this name:\n{describe(changed)}", where=where.url,
            help="Undo the change, or give the new run another `name`, and run `distft train` and `distft export` with it.",
        )  # fmt: skip
    step = wanted = manifest.identity["checkpoint"]["step"]
    newest = newest_checkpoint(folder.child("checkpoints"))  # none: they may have been removed
    if newest and newest[1].identity["step"] != step:
        if newest[1].identity["step"] == newest[1].facts["total_steps"]:
            wanted = newest[1].identity["step"]
        else:
            say(f"The run is not finished: this measures its model after step {step:,}.")
    changed = differences(manifest.identity, model_identity(run, {"step": wanted, "run": run_identity}))
    if changed:
        raise StaleArtifactError(
            f"The exported model is not that of the finished run with these settings:\n{describe(changed)}", where=where.url,
            help="Run `distft export` with this config.",
        )  # fmt: skip
    return manifest


def _as_folder(folder: Location, manifest: Manifest, staging: Path) -> ModelFolder:
    """A model of the store, verified, as a local folder; one on S3 is brought here."""
    local = folder.local("config.json")
    if local is not None:
        for entry in manifest.files:
            fetch(folder, entry, staging)
        return resolve_model(str(local.parent), None)
    target = staging / "models" / manifest.content_digest
    target.mkdir(parents=True, exist_ok=True)
    for entry in manifest.files:
        source, link = fetch(folder, entry, staging), target / entry.name
        with suppress(FileExistsError):  # another process makes the same links
            link.symlink_to(source.absolute())
    return resolve_model(str(target), None)
