"""What a training run and its exported model are; torch-free, for plans and errors."""

from __future__ import annotations

from typing import Any

from distft.config.schema import Run
from distft.store.model_folder import ModelFolder

FORMAT = "distft-run-2"

# What changes speed, memory or safety, never the weights that come out.
OPERATIONAL = {
    "micro_batch_tokens", "engine", "zero3", "workers", "restarts", "checkpoint", "gradient_checkpointing", "drift_every_steps",
    "log", "sequence_parallel",
}  # fmt: skip


def run_identity(run: Run, model: ModelFolder, *, corpus: dict[str, Any], teacher: str | None) -> dict[str, Any]:
    """`corpus` is the corpus's identity, `teacher` the cache's id. What only measures (the held-out split, a cache that the
    objective does not read) stays out. Documents that are left out count by as many digits as name one; there is no such field
    where none are."""
    reads = run.objective.needs_signals or run.objective.needs_distribution
    return {
        "format": FORMAT,
        "weights": model.weights_identity(),
        "dtype": run.model.dtype,
        "corpus": {key: value for key, value in corpus.items() if key != "heldout"},
        **({"exclude": sorted({digest[:12] for digest in run.data.exclude})} if run.data.exclude else {}),
        "teacher": teacher if reads else None,
        "objective": run.objective.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json", exclude=OPERATIONAL),
        **_measured(run, corpus),
    }


def _measured(run: Run, corpus: dict[str, Any]) -> dict[str, Any]:
    """Under a drift budget, what is measured and when decides what is learned."""
    if run.objective.drift_budget is None:
        return {}
    return {"heldout": corpus["heldout"], "drift_every_steps": run.train.drift_every_steps}


def model_identity(run: Run, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The exported model of a checkpoint, which is given by its identity."""
    return {"checkpoint": checkpoint, "dtype": run.export.dtype or run.model.dtype, "shard_bytes": run.export.shard_bytes}
