"""A look at all that a run reads, before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from distft.config.schema import Run
from distft.corpus.anchors import Annotation
from distft.corpus.sources import rows
from distft.errors import DataError, ModelError, UserInputError
from distft.evaluate.tasks import look_at
from distft.store.model_folder import ModelFolder, resolve_model


def check_inputs(run: Run, *, model: Callable[[], ModelFolder], teacher: Callable[[], ModelFolder]) -> None:
    """Models, the first row of each source, anchors, every task. `model` and `teacher` may find a problem themselves. One is told
    as it is, several in one error."""

    def look(read: Callable[[], object]) -> UserInputError | None:
        try:
            read()
        except (DataError, ModelError) as error:
            return error
        return None

    data, another, group = run.data, run.teacher.path, run.score.tensor_parallel
    reads: dict[str, Callable[[], object]] = {"model": lambda: model().weight_files()}
    if another is not None:
        reads["teacher"] = lambda: resolve_model(another, run.teacher.revision).weight_files()
    if group > 1:
        reads["score.tensor_parallel"] = lambda: teacher().check_shared_by(group)
    if run.train.sequence_parallel > 1:
        reads["train.sequence_parallel"] = lambda: model().check_rows_shared_by(run.train.sequence_parallel)
    reads |= {
        f"data.{name}": partial(lambda source: next(rows(source)), source)
        for name, source in (("train", data.train), ("heldout", data.heldout))
        if source is not None
    }
    if data.train.anchors is not None:
        reads["data.train.anchors"] = partial(Annotation, data.train.anchors)
    reads |= {f"task {task.name}": partial(look_at, task) for task in run.evaluate.tasks}
    found = {name: error for name, read in reads.items() if (error := look(read))}
    if len(found) == 1:
        raise next(iter(found.values()))
    if found:
        told = [f"  {name}: {error.problem}" + (f" ({error.where})" if error.where else "") for name, error in found.items()]
        raise UserInputError(
            "\n".join([f"{len(found)} inputs cannot be used:", *told]), where="the run file",
            help=f"Correct each; nothing was done. Paths are seen from {Path.cwd()}.",
        )  # fmt: skip
