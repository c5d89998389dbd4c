"""The training loop, as a story: take the step's documents, learn from them, write down what happened, keep what must not be lost."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass

import torch

from distft import stopping
from distft.config.schema import Train
from distft.engine.base import Engine
from distft.engine.world import World
from distft.errors import DistftError, TrainingError
from distft.progress import say, track
from distft.stopping import Interrupted
from distft.train.batches import Feed
from distft.train.budget import DriftBudget
from distft.train.checkpoint import Checkpoints
from distft.train.drift import Drift
from distft.train.meters import Meters
from distft.train.metrics import MetricsLog, step_line
from distft.train.order import StepPlan
from distft.train.schedule import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    steps: int
    loss: float
    drift: Drift | None


def train(
    config: Train, *, engine: Engine, plan: StepPlan, feed: Feed, world: World, log: MetricsLog | None, checkpoints: Checkpoints,
    first_step: int, drift: Callable[[], Drift] | None, meters: Meters, budget: DriftBudget | None = None,
    drifted: Drift | None = None, label: str,
) -> Finished:  # fmt: skip
    """Runs steps first_step to plan.total_steps. `log` is the leading rank's; `drift` measures on all ranks, and with a `budget` what
    it finds decides how strongly the steps after it hold; `drifted` is what it last found before the first step."""
    loss = float("nan")
    shown: dict[str, float] = {"checkpoint": first_step - 1, **({"drift_budget": budget.budget} if budget else {})}
    with (
        stopping.gracefully(),
        closing(checkpoints),
        ThreadPoolExecutor(1) as reader,
        track(label, plan.total_steps, "steps", done=first_step - 1) as meter,
    ):
        coming = reader.submit(feed.step, plan.documents(first_step)) if first_step <= plan.total_steps else None
        for step in range(first_step, plan.total_steps + 1):
            assert coming is not None
            started, mine = time.monotonic(), coming.result()
            if step < plan.total_steps:
                coming = reader.submit(feed.step, plan.documents(step + 1))  # reads while the model computes
            found = world.total(*mine.counts, *mine.quadrants, mine.tokens, mine.headed, stopping.requested(), checkpoints.failed)
            waited = time.monotonic() - started
            totals, kinds, (tokens, headed, stop, unsaved) = found[: len(mine.counts)], found[len(mine.counts) : -4], found[-4:]
            if unsaved:
                checkpoints.finish()  # which says why
            micro_batches, normaliser = mine.normalised(totals, kl_factor=budget.factor if budget else 1.0)
            if stop:
                _keep_and_stop(step - 1, engine, world, log, checkpoints, _facts(loss, drifted, plan, budget))
            if normaliser == 0:
                raise TrainingError(
                    f"No token of step {step} has a weight: the objective masks all of its {tokens:.0f} tokens.",
                    where=f"step {step}", help="Raise train.tokens_per_step, or loosen the objective's selection.",
                )  # fmt: skip
            torch.manual_seed(_step_seed(config.seed, step, world.rank))
            lr = learning_rate(config, step, plan.total_steps)
            try:
                values = engine.train_step(micro_batches, normaliser=normaliser, lr=lr)
            except TrainingError as error:
                with suppress(DistftError):
                    checkpoints.finish()  # so that the last one can be named
                rows = f"rows {sorted(plan.documents(step).tolist())[:8]} ... of the training split"
                raise TrainingError(
                    error.problem, where=f"step {step}, {rows}" + (f"; in the micro-batch of {error.where}" if error.where else ""),
                    help=f"The last checkpoint is step {(checkpoints.steps() or [0])[-1]}. "
                    + (error.help or "Lower train.lr, or look at those rows."),
                ) from error  # fmt: skip
            loss = values.loss
            seconds = time.monotonic() - started
            line = step_line(step, values, normaliser=normaliser, tokens=int(tokens), kinds=kinds, lr=lr, seconds=seconds)
            lengths = feed.lengths[plan.documents(step)]
            line |= meters.line(values, lengths=lengths, headed=headed, seconds=seconds, waited=waited)
            last = step == plan.total_steps
            if drift and (last or _due(config.drift_every_steps, step)):
                drifted = drift()
                line |= {"drift": drifted.kl, "heldout_nll": drifted.nll}
                shown |= {"drift": drifted.kl, "drift_step": step}
                if budget:
                    line |= {"drift_budget": budget.budget, "kl_factor": budget.factor}
                    budget.observe(drifted.kl)
                    if budget.hopeless:
                        _say_that_it_cannot_be_met(budget, step)
            if log:
                log.add({**line, "epoch": plan.epoch(step)})
            if last or _due(config.checkpoint.every_steps, step):
                if log:
                    checkpoints.owner.check()
                    log.flush()  # before the checkpoint: one whose steps are not in the log would leave a hole in it
                checkpoints.save(step, engine, _facts(loss, drifted, plan, budget))
                shown["checkpoint"] = step
            meter.advance(note=f"loss {loss:.3f}" + (f", drift {drifted.kl:.4f}" if drifted else ""), figures={**line, **shown})
        checkpoints.finish()
    return Finished(steps=plan.total_steps, loss=loss, drift=drifted)


def _facts(loss: float, drifted: Drift | None, plan: StepPlan, budget: DriftBudget | None) -> dict[str, object]:
    """What a checkpoint says beside its weights; with a budget, what its control needs to go on."""
    facts = {"loss": loss, "drift": drifted.facts() if drifted else None, "total_steps": plan.total_steps}
    return {**facts, "budget": budget.facts()} if budget else facts


def _say_that_it_cannot_be_met(budget: DriftBudget, step: int) -> None:
    say(
        f"step {step}: drift is {budget.last:.3g} nats per token and objective.drift_budget {budget.budget:g}, although divergences "
        f"weigh {budget.factor:,.0f} times what the run file gives them. Holding more strongly will not help: lower train.lr or "
        "train.epochs, or allow more drift. Training goes on."
    )


def _keep_and_stop(
    step: int, engine: Engine, world: World, log: MetricsLog | None, checkpoints: Checkpoints, facts: dict[str, object]
) -> None:
    """Commits the last whole step, unless that was done, and ends the run."""
    if log:
        checkpoints.owner.check()
        log.flush()
    checkpoints.finish()
    [is_new] = world.total(world.leads and step > (checkpoints.steps() or [0])[-1])
    if is_new:
        checkpoints.save(step, engine, facts)
        checkpoints.finish()
    world.barrier()
    raise Interrupted(f"Stopped after step {step}, which is kept.")


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout and the like draw the same numbers in a step whether or not the run was interrupted before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "big") >> 1
