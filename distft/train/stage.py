"""CORPUS and TEACHER to CHECKPOINTS: puts a run together, or takes it up where it stopped, and trains it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from distft.config.check import too_rarely_measured, unread_anchors
from distft.config.load import dump
from distft.config.schema import Run
from distft.corpus.reader import Corpus
from distft.corpus.render import token_rows
from distft.engine.choose import open_engine
from distft.engine.world import World, this_device
from distft.errors import ConfigError, CorruptArtifactError
from distft.progress import say, waiting
from distft.store.location import Location
from distft.store.model_folder import ModelFolder
from distft.teacher.cache import TeacherCache
from distft.train import identity
from distft.train.batches import Feed
from distft.train.budget import DriftBudget
from distft.train.checkpoint import Checkpoints, Restored
from distft.train.drift import ROUNDING, Drift, check_own_teacher, measure_drift
from distft.train.events import Events
from distft.train.flops import Arithmetic, device_peak
from distft.train.loop import train
from distft.train.meters import Meters
from distft.train.metrics import Follower, MetricsLog
from distft.train.order import StepPlan
from distft.train.schedule import check_warmup
from distft.train.trackers import trackers


def run_identity(run: Run, model: ModelFolder, corpus: Corpus, cache: TeacherCache | None) -> dict[str, Any]:
    """The run's identity with these inputs in hand."""
    teacher = cache.coverage.identity["teacher"] if cache is not None else None
    return identity.run_identity(run, model, corpus=corpus.manifest.identity, teacher=teacher)


def train_run(
    run: Run, model: ModelFolder, corpus: Corpus, cache: TeacherCache | None, store: Location, world: World
) -> dict[str, Any]:
    """Trains to the end; returns what `--json` prints. A run that is finished returns at once, without loading the model."""
    most = run.train.most_ranks
    if world.size > 1 and most is not None and not run.train.least_ranks <= world.size <= most:
        asked = str(most) if run.train.least_ranks == most else f"[{run.train.least_ranks}, {most}]"
        raise ConfigError(f"train.workers={asked}, and {world.size} ranks were launched.", where="train.workers",
                          help="Leave it auto, or launch as many.")  # fmt: skip
    folder = store.child("runs", run.name)
    kept = run.train.checkpoint
    checkpoints = Checkpoints(
        folder.child("checkpoints"),
        run_identity(run, model, corpus, cache),
        keep=kept.keep,
        keep_every=kept.keep_every,
        world=world,
    )
    plan = StepPlan(corpus.lengths("train"), run.train)
    try:
        newest = checkpoints.newest()
    except CorruptArtifactError:
        newest = None  # `restore` names it, and goes on from the one before
    check_warmup(run.train, plan.total_steps)
    _check_measurements(run, plan.total_steps)
    complete = newest if newest is not None and newest[1].identity["step"] >= plan.total_steps else None
    if complete is None:  # one that is may be looked at by a process alone
        model.check_rows_shared_by(run.train.sequence_parallel)
        world = world.in_teams(run.train.sequence_parallel)
    if world.leads:
        folder.replace("config.yaml", dump(run).encode())  # only now: a config that was refused must not stand beside the run
    if complete is not None:
        return _result(run, folder, plan.total_steps, plan.total_steps, complete[1].facts)

    unread = unread_anchors(run)
    if unread is not None:
        say(f"train: {unread}")
    engine = open_engine(run, model, world, head_rows=token_rows(model))
    if cache is not None and run.teacher.path is None:
        with waiting("comparing the model with its cache"):
            check_own_teacher(engine.measure, corpus, cache, world, dtype=_coarser(run), where=cache.folder.url)
    if world.leads:
        checkpoints.owner.claim()  # no sooner: a process that cannot even load must not stop one that trains
    world.barrier()  # no rank lists checkpoints that a former owner may still add to
    restored = checkpoints.restore(engine)
    done = restored.step if restored else 0
    if restored:
        say(f"train: going on from the checkpoint of step {done:,}")

    def heldout_drift() -> Drift:
        assert cache is not None, "drift needs the teacher"
        documents = corpus.documents("heldout")
        return measure_drift(engine.measure, documents, cache, world, tokens_per_batch=run.train.micro_batch_tokens)

    budget = _budget(run, restored)
    with _log(run, folder, after_step=done, last_step=plan.total_steps) if world.leads else nullcontext() as log:
        finished = train(
            run.train, engine=engine, plan=plan, world=world, checkpoints=checkpoints, first_step=done + 1,
            feed=Feed(
                corpus, cache, run.objective, run.train, world, vocabulary=engine.vocabulary, rounding=ROUNDING[_coarser(run)]
            ),
            log=log, drift=heldout_drift if "heldout" in corpus.splits else None, meters=_meters(model, world), budget=budget,
            drifted=Drift(**restored.facts["drift"]) if restored and restored.facts["drift"] else None,
            label=f"train {run.name}",
        )  # fmt: skip
    if budget is not None and not budget.kept:
        say(f"The run ends with a drift of {budget.last:.3g} nats per token, above objective.drift_budget={budget.budget:g}. Lower "
            "train.lr, or measure more often (train.drift_every_steps).")  # fmt: skip
    facts = {"loss": finished.loss, "drift": finished.drift.facts() if finished.drift else None}
    if budget is not None:
        facts["budget"] = budget.facts()
    return _result(run, folder, finished.steps, done or None, facts)


def _log(run: Run, folder: Location, *, after_step: int, last_step: int) -> MetricsLog:
    """The log, and who follows it by `train.log`."""
    # Where a run is shown is nothing that it is to be compared by, and no service need know of the others.
    settings = run.model_dump(mode="json", exclude={"train": {"log"}})
    followers: list[Follower] = [*trackers(run.train.log, folder, run_name=run.name, settings=settings)]
    if run.train.log.tensorboard:
        followers.append(Events(folder))
    return MetricsLog(folder, after_step=after_step, last_step=last_step, followers=followers)


def _meters(model: ModelFolder, world: World) -> Meters:
    """All ranks' devices are taken to be such as this one's."""
    peak = device_peak(torch.cuda.get_device_name()) if this_device().type == "cuda" else None
    return Meters(arithmetic=Arithmetic.of(model), peak=None if peak is None else peak * world.size)


def _coarser(run: Run) -> str:
    return "bfloat16" if "bfloat16" in (run.model.dtype, run.teacher_model.dtype) else "float32"


def _budget(run: Run, restored: Restored | None) -> DriftBudget | None:
    """The controller as it was: a checkpoint without one would start again at the user's own weights, and nobody would know."""
    allowed = run.objective.drift_budget
    if allowed is None:
        return None
    if restored is None:
        return DriftBudget(allowed)
    try:
        return DriftBudget.resumed(allowed, restored.facts["budget"])
    except (KeyError, TypeError) as error:
        raise CorruptArtifactError(
            f"The checkpoint of step {restored.step} does not say where the drift budget's control was.", where=f"runs/{run.name}",
            help="It was written by another version. Train under another name.",
        ) from error  # fmt: skip


def _check_measurements(run: Run, steps: int) -> None:
    problem = too_rarely_measured(run, steps)
    if problem is not None:
        raise ConfigError(problem, where="train.drift_every_steps", help="Nothing was trained. Measure more often.")


def _result(run: Run, folder: Location, steps: int, resumed_from: int | None, facts: dict[str, Any]) -> dict[str, Any]:
    drift, allowed = facts.get("drift"), run.objective.drift_budget
    return {
        "run": folder.url, "steps": steps, "resumed_from": resumed_from, "loss": facts["loss"],
        "drift": None if drift is None else drift["kl"],
        **({} if allowed is None else {"budget": DriftBudget.resumed(allowed, facts["budget"]).result()}),
    }  # fmt: skip
