"""Rules that hold between sections. All problems are found before one error names them."""

from __future__ import annotations

import os.path
from importlib.util import find_spec

from distft.config.schema import Hidden, NoDistribution, Run, Sample, Source
from distft.errors import ConfigError
from distft.objectives.catalog import Lwf, SftKl


def check_run(run: Run, *, where: str) -> None:
    """Raises a ConfigError that lists every pair of settings that cannot go together."""
    problems = [*_objective(run), *_model(run), *_data(run), *_score(run), *_train(run), *_tasks(run)]
    if problems:
        raise ConfigError("\n".join(["Settings that do not go together:", *(f"  {p}" for p in problems)]), where=where,
                          help="Change one side of each, in the file or by overrides.")  # fmt: skip


def _objective(run: Run) -> list[str]:
    rule, kind = run.objective, f"objective.kind={run.objective.kind}"
    problems = _anchors(run)
    if rule.prompt_kl > 0 and run.score.positions != "all":
        problems.append(
            f"objective.prompt_kl={rule.prompt_kl:g} needs the teacher on the prompt's tokens, and score.positions="
            f"{run.score.positions} leaves them out; set score.positions=all"
        )
    if rule.prompt_kl > 0 and run.data.train.format == "text":
        problems.append(
            f"objective.prompt_kl={rule.prompt_kl:g} holds prompts, and data.train.format=text has none: all of a text is supervised"
        )
    return problems + _softening(run, kind) + _budget(run, kind) + _distribution(run, kind)


def _anchors(run: Run) -> list[str]:
    given = run.data.train.anchors
    if run.objective.needs_anchors and given is None:
        return ["objective.anchors=given needs to be told them: give data.train.anchors, or set objective.anchors=floor"]
    if isinstance(run.objective, Lwf) and not run.objective.needs_anchors and given is not None:
        return [f"data.train.anchors={given} marks what is to be learned, and objective.anchors=floor does not look at it: set "
                "objective.anchors=given, or data.train.anchors to null"]  # fmt: skip
    return []


def unread_anchors(run: Run) -> str | None:
    """What to tell whoever annotated data for an objective that does not look at that: as a baseline it may be meant."""
    if run.data.train.anchors is None or run.objective.needs_anchors:
        return None
    return f"objective.kind={run.objective.kind} does not look at the anchors of data.train.anchors; only lwf with anchors=given does"


def _softening(run: Run, kind: str) -> list[str]:
    if run.objective.softening == 1.0 or isinstance(run.score.distribution, Hidden):
        return []
    return [
        f"{kind} with temperature={run.objective.softening:g} asks the teacher about all tokens, and score.distribution.kind="
        f"{run.score.distribution.kind} leaves some out; set it to hidden, or the temperature to 1"
    ]


def _budget(run: Run, kind: str) -> list[str]:
    if run.objective.drift_budget is None:
        return []
    problems = []
    if not (run.objective.holds or run.objective.prompt_kl > 0):
        problems.append(
            f"objective.drift_budget controls weights on divergences, and {kind} has none with these settings: take sft_kl, or set it "
            "to null"
        )
    if run.teacher.path is not None:
        problems.append(
            f"objective.drift_budget keeps the model near where it started, and drift is the distance from teacher.path="
            f"{run.teacher.path}, which training is to shorten: set one of them to null"
        )
    if run.data.heldout is None or run.train.drift_every_steps is None:
        problems.append(
            "objective.drift_budget is controlled by drift that is measured on the way: give data.heldout and train.drift_every_steps"
        )
    rare = too_rarely_measured(run, run.train.max_steps)
    return problems if rare is None else [*problems, rare]


def too_rarely_measured(run: Run, steps: int | None) -> str | None:
    """Why a drift budget cannot be controlled in so many steps. The last measurement controls nothing, and one alone no movement."""
    every = run.train.drift_every_steps
    if run.objective.drift_budget is None or every is None or steps is None or (count := -(-steps // every)) > 2:
        return None
    return (
        f"objective.drift_budget is controlled by drift as it moves, and with train.drift_every_steps={every} it is measured "
        f"{'once' if count == 1 else 'twice'} in {steps} steps: make it at most {max(1, (steps - 1) // 2)}"
    )


def _distribution(run: Run, kind: str) -> list[str]:
    """What the objective asks of the teacher against what is kept of it; one problem at most, since one change may cure them all."""
    if run.objective.needs_distribution and isinstance(run.score.distribution, NoDistribution):
        return [f"{kind} needs the teacher's distribution, and score.distribution.kind=none keeps signals alone; set it to topk"]
    if run.objective.needs_tail and isinstance(run.score.distribution, Sample):
        other = ", or objective.direction=teacher_to_student" if isinstance(run.objective, SftKl) else ""
        return [f"{kind} asks for KL(p||q), which draws from the teacher cannot give: set score.distribution.kind=topk{other}"]
    if isinstance(run.score.distribution, NoDistribution) and run.data.heldout is not None:
        return [
            "data.heldout is for measuring drift, which needs a distribution: set score.distribution.kind=topk, or heldout to null"
        ]
    return []


def _model(run: Run) -> list[str]:
    if run.teacher.path is None and run.teacher.revision is not None:
        return ["teacher.revision is set without teacher.path: the teacher is the model itself, at model.revision"]
    return []


def _data(run: Run) -> list[str]:
    problems = []
    if run.data.heldout is not None and _rows_of(run.data.heldout) == _rows_of(run.data.train):
        problems.append(
            f"data.heldout.path={run.data.heldout.path} is data.train.path: drift would be measured on what is trained"
        )
    if run.train.drift_every_steps is not None and run.data.heldout is None:
        problems.append("train.drift_every_steps is set without data.heldout: there is nothing to measure drift on")
    if run.train.max_steps is not None and run.train.warmup_steps > run.train.max_steps:
        problems.append(f"train.warmup_steps={run.train.warmup_steps} is more than train.max_steps={run.train.max_steps}")
    return problems


def _score(run: Run) -> list[str]:
    asked = [key for key, given in (("limit", run.score.limit), ("retry_quarantined", run.score.retry_quarantined)) if given]
    return [f"score.{key} asks to score documents, and score.reuse_only refuses to" for key in asked if run.score.reuse_only]


def _train(run: Run) -> list[str]:
    asked = [key for key, given in run.train.zero3 if given]
    return [*_log(run), *_sequence(run)] + [
        f"train.zero3.{key} moves what the engine zero3 holds, and train.engine=local holds all on the device: set "
        "train.engine=zero3, or it to false"
        for key in asked
        if run.train.engine == "local"
    ]


def _sequence(run: Run) -> list[str]:
    """A range of ranks may come to any number within it; `auto` is known when they are launched."""
    shared, workers = run.train.sequence_parallel, run.train.workers
    if shared == 1 or workers == "auto":
        return []
    if isinstance(workers, tuple):
        return [
            f"train.workers={list(workers)} lets the number of ranks change, and train.sequence_parallel={shared} needs a multiple of "
            f"{shared}: give one number"
        ]
    if workers % shared:
        return [
            f"train.sequence_parallel={shared} has as many ranks share each row, and train.workers={workers} is no multiple of it"
        ]
    return []


def _log(run: Run) -> list[str]:
    """Services that are asked for, and whose package is not here. Nothing is imported: a plan must stay quick."""
    asked = (("wandb", "wandb", run.train.log.wandb), ("mlflow", "mlflow-skinny", run.train.log.mlflow))
    return [
        f"train.log.{key} asks for a service whose package is not installed: pip install {package}, or set it to null"
        for key, package, given in asked
        if given is not None and not _installed(key)
    ]


def _installed(package: str) -> bool:
    """A folder of that name where the command runs (wandb makes one) is no package."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def _rows_of(source: Source) -> tuple[str | None, ...]:
    """Which rows a source takes from, however it reads them and however many: `limit` takes the same first ones."""
    return os.path.normpath(os.path.expanduser(source.path)), source.subset, source.split or "train", source.revision


def _tasks(run: Run) -> list[str]:
    names = [task.name for task in run.evaluate.tasks]
    return [f"evaluate.tasks: the name {name!r} stands twice" for name in sorted({n for n in names if names.count(n) > 1})]
