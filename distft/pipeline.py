"""The verbs as functions: from a run file to artifacts, each stage finding its inputs in the store by what they are.

Used by the command line and by the demo alike. Every function returns the object that `--json` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import ranks
from distft.config.schema import Run
from distft.corpus.build import build_corpus, corpus_identity
from distft.corpus.reader import Corpus
from distft.errors import ConfigError, CorruptArtifactError, MissingArtifactError, ModelError, StaleArtifactError, StoreError
from distft.progress import say
from distft.store.digest import memo_path
from distft.store.location import Location, open_location
from distft.store.manifest import Manifest, read_manifest
from distft.store.model_folder import ModelFolder, resolve_model
from distft.store.nearest import nearest
from distft.store.vocabulary import compare_vocabularies

if TYPE_CHECKING:
    from distft.teacher.build import MapUnits


@dataclass(frozen=True)
class Pipeline:
    """One run file's way through the store."""

    run: Run

    def __post_init__(self) -> None:
        _ = self.store  # a store that cannot be is refused before anything is hashed or written

    @cached_property
    def store(self) -> Location:
        return open_location(self.run.store)

    @cached_property
    def staging(self) -> Path:
        """Where verified local copies are kept; may be deleted at any time."""
        return memo_path().parent / "staging"

    @cached_property
    def model(self) -> ModelFolder:
        return resolve_model(self.run.model.path, self.run.model.revision)

    @cached_property
    def teacher(self) -> ModelFolder:
        """The teacher, which must mean the same by every token id as the model."""
        config = self.run.teacher_model
        teacher = resolve_model(config.path, config.revision)
        ours, theirs = self.model.tokenizer_identity()["vocabulary"], teacher.tokenizer_identity()["vocabulary"]
        if ours != theirs:
            told = compare_vocabularies(teacher, self.model) or f"The files' digests are {theirs[:12]} and {ours[:12]}."
            raise ModelError(
                f"Teacher and model have different vocabularies.\n{told}", where=str(teacher.path),
                help="Take a teacher with the model's own tokenizer.",
            )  # fmt: skip
        return teacher

    @property
    def folder(self) -> Location:
        return self.store.child("runs", self.run.name)

    @cached_property
    def corpus_identity(self) -> dict[str, Any]:
        return corpus_identity(self.run.data, self.model)

    @property
    def corpus_folder(self) -> Location:
        return self.store.child("corpus", Manifest(kind="corpus", identity=self.corpus_identity, files=()).id)

    @cached_property
    def teacher_identity(self) -> dict[str, Any]:
        from distft.teacher.identity import teacher_identity

        return teacher_identity(self.teacher, self.run.score, self.run.teacher_model.dtype)

    @property
    def teacher_id(self) -> str:
        return Manifest(kind="teacher", identity=self.teacher_identity, files=()).id

    @cached_property
    def run_identity(self) -> dict[str, Any]:
        from distft.train.identity import run_identity

        teacher = self.teacher_id if self.run.needs_teacher else None
        return run_identity(self.run, self.model, corpus=self.corpus_identity, teacher=teacher)

    def corpus(self) -> Corpus:
        """The corpus of this config, or an error that says what the nearest one was made from."""
        identity, folder = self.corpus_identity, self.corpus_folder
        if folder.exists("MANIFEST.json"):
            corpus = Corpus.open(folder, self.staging, self.run.data.exclude)
            corpus.refuse_overlap()
            return corpus
        other = nearest(self.store.child("corpus"), identity)
        if other is None:
            raise MissingArtifactError("There is no corpus in this store.", where=self.store.url,
                                       help="Run `distft tokenize` with this config.")  # fmt: skip
        raise StaleArtifactError(
            f"No corpus fits this config. {other}", where=folder.url,
            help="If the change is meant, run `distft tokenize` and `distft score` with this config; else undo it.",
        )  # fmt: skip

    def plan(self, *, calibrate: bool = False, page: Path | None = None) -> dict[str, Any]:
        """What is there, what a run would take, and, once the teacher has scored, what the objective will do with the tokens. With
        `calibrate` the teacher reads a few documents here, and is measured; `page` is where tokens are to be seen in their text."""
        from distft.plan.stage import plan_run

        self._check_inputs()
        corpus = self.corpus() if self.corpus_folder.exists("MANIFEST.json") else None
        return plan_run(self, corpus, calibrate=calibrate, page=page)

    def _check_inputs(self) -> None:
        from distft.plan.inputs import check_inputs

        check_inputs(self.run, model=lambda: self.model, teacher=lambda: self.teacher)

    def _writing_to(self, folder: Location) -> None:
        """Says at once when nothing can be written, and clears away what killed writers left in this folder days ago."""
        self.store.check_writable()
        if ranks.rank() == 0:
            with suppress(StoreError):  # may not be allowed; costs space alone
                folder.sweep()

    def tokenize(self) -> dict[str, Any]:
        self._writing_to(self.corpus_folder)
        manifest = build_corpus(self.run.data, self.model, self.store)
        self.corpus()  # says now what would be refused later
        splits = manifest.facts.values()
        totals = {key: sum(split[key] for split in splits) for key in ("documents", "tokens", "supervised_tokens", "dropped")}
        return {"corpus": self.store.child("corpus", manifest.id).url, **totals}

    def score(self) -> dict[str, Any]:
        from distft.teacher.build import build_teacher, the_rest
        from distft.teacher.coverage import counted, coverage_report, how_to_exclude, quarantine_text
        from distft.teacher.reuse import before_scoring
        from distft.teacher.tell import trial_text

        corpus = self.corpus()
        wanted = {digest for split in corpus.splits for digest in corpus.digests(split)}
        before_scoring(self.store, self.teacher_identity, wanted, reuse_only=self.run.score.reuse_only)
        self._writing_to(self.store.child("teacher", self.teacher_id))
        scored = build_teacher(self.run, corpus, self.teacher, self.store, self._map_units())
        result: dict[str, Any] = {
            "teacher": scored.folder.url, "documents": len(wanted), "documents_scored": scored.documents_scored,
            "tokens_scored": scored.tokens_scored, "bytes_per_token": scored.coverage.bytes_per_token,
            "coverage": coverage_report(scored.coverage, corpus, self.run.score.positions),
        }  # fmt: skip
        quarantined = result["coverage"]["quarantined"]
        if quarantined:
            say(f"score: the teacher could not read {counted(len(quarantined))}, and training refuses a corpus that has them:\n"
                f"{quarantine_text(quarantined)}\n{how_to_exclude(quarantined, corpus)}")  # fmt: skip
        if self.run.score.limit is not None:
            result["rest"] = the_rest(scored, corpus, self.run.score.positions)
            say(trial_text(result))
        return result

    def train(self) -> dict[str, Any]:
        """In this process, or by ranks that Ray starts, each of which calls `train_here`."""
        from distft.engine.world import device_count
        from distft.train.start import ranks_to_start

        count = ranks_to_start(self.run, self.folder)
        if count == 1:
            return self.train_here()
        from distft.cluster.train import train_on_ranks

        self._cache(self.corpus())  # what is missing or wrong is told before anything starts
        self._writing_to(self.folder)
        say(f"train: starting {count} ranks" if isinstance(count, int) else "train: starting the ranks")
        return train_on_ranks(
            partial(train_here, self.run), address=self.run.cluster.address, ranks=count, gpus=device_count(),
            restarts=self.run.train.restarts,
        )  # fmt: skip

    def train_here(self) -> dict[str, Any]:
        """As one rank of those that the environment describes."""
        from distft.engine.memory import enough_memory
        from distft.engine.world import join_world
        from distft.train.stage import train_run

        corpus = self.corpus()
        cache = self._cache(corpus)
        self._writing_to(self.folder)
        less = (
            "Lower train.micro_batch_tokens, set train.gradient_checkpointing=true, or have ranks share rows by "
            "train.sequence_parallel: none changes what is learned."
        )
        with enough_memory(less), join_world() as world:
            return train_run(self.run, self.model, corpus, cache, self.store, world)

    def export(self) -> dict[str, Any]:
        from distft.export.stage import export_run

        self._writing_to(self.folder)
        cache = self.teacher_id if self.run.needs_teacher else None
        return export_run(self.run, self.model, self.run_identity, self.store, corpus=self._corpus_manifest(), cache=cache)

    def export_universal(self, folder: Path, *, step: int | None = None) -> dict[str, Any]:
        """A checkpoint in DeepSpeed's universal format."""
        from distft.train.exchange import export_universal

        return export_universal(self.run, self.run_identity, self.store, folder, step=step)

    def import_universal(self, folder: Path, *, step: int | None = None) -> dict[str, Any]:
        """A checkpoint in DeepSpeed's universal format as that of this run."""
        from distft.train.exchange import import_universal

        corpus = self.corpus()
        self._writing_to(self.folder)
        return import_universal(self.run, self.model, corpus, self.run_identity, self.store, folder, step=step)

    def evaluate(self) -> dict[str, Any]:
        from distft.engine.memory import enough_memory
        from distft.evaluate.stage import evaluate_run

        corpus = self.corpus()
        self._writing_to(self.store.child("eval"))
        with enough_memory("Lower evaluate.tokens_per_batch."):
            return evaluate_run(self.run, self.model, self.run_identity, corpus, self._cache(corpus), self.store, self.staging)

    def report(self) -> dict[str, Any]:
        from distft.report.page import write_report

        return {"page": write_report(self.store, [self.run.name], page=self.folder)}

    def stages(self) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
        """The verbs that `run` chains, in order."""
        return [(name, getattr(self, name)) for name in ("tokenize", "score", "train", "export", "evaluate", "report")]

    def run_all(self) -> dict[str, Any]:
        """Whatever is missing; what is there costs a look."""
        self._check_inputs()
        results: dict[str, Any] = {}
        for verb, stage in self.stages():
            if verb == "score" and not self.run.needs_teacher:
                say("score: neither objective nor drift meter reads a teacher")
            else:
                results[verb] = stage()
            if verb == "score" and self.run.score.limit is not None:
                say(f"run: ends here, for score.limit={self.run.score.limit} is a trial; nothing was trained. Without it, the same "
                    "command does everything.")  # fmt: skip
                break
        return results

    def _corpus_manifest(self) -> Manifest | None:
        """What is known of the corpus without opening it: whoever only tells of it can do without."""
        with suppress(CorruptArtifactError):
            return read_manifest(self.corpus_folder)
        return None

    def _map_units(self) -> MapUnits:
        """Where units are scored: in this process where one scorer is to do it all on this machine, else by Ray actors."""
        from distft.engine.world import device_count
        from distft.teacher.build import in_process

        address, workers, group = self.run.cluster.address, self.run.score.workers, self.run.score.tensor_parallel
        gpus = device_count()
        if address == "local":
            workers = max(1, gpus // group) if workers == "auto" else workers
            if gpus and workers * group > gpus:
                raise ConfigError(
                    f"score.workers={workers} with score.tensor_parallel={group} need {workers * group} GPUs, and this machine has "
                    f"{gpus}.", where="score.workers", help=f"Lower one of them: together {gpus} GPUs at most.",
                )  # fmt: skip
            if workers == group == 1:
                return in_process
        from distft.cluster.pool import map_units

        return partial(map_units, address=address, workers=None if workers == "auto" else workers, gpus=gpus, group=group)

    def _cache(self, corpus: Corpus) -> Any:
        from distft.teacher.cache import TeacherCache

        if not self.run.needs_teacher:
            return None
        return TeacherCache.open(self.store, self.teacher_identity, corpus, self.staging, limit=self.run.score.limit)


def train_here(run: Run) -> dict[str, Any]:
    """What each rank that Ray starts is given to do."""
    return Pipeline(run).train_here()
