"""The largest model that so many GPUs can train, at a run's settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distft.plan.load import Load
from distft.plan.memory import memory
from distft.plan.shape import family

GPU_BYTES = 80_000_000_000
"""Of a GPU that is sold with 80 GB. An H100 says 81,559 MiB, which is 85.5e9: the rest is for CUDA and what its allocator wastes."""
GPUS = (1, 8, 32)
"""A GPU, a machine of them, four machines."""
STEP = 1.02
"""Sizes that are tried are so far apart."""
SMALLEST, LARGEST = 4e8, 5e12
"""Parameters: what is tried."""


def largest(load: Load, *, workers: int, local: bool) -> list[dict[str, Any]]:
    """For this run's number of ranks and some others: parameters of the largest model that fits, and what each rank's host then holds.
    `local` engines hold all on each GPU, so that more of them fit nothing more. Numbers that rows cannot be shared by are left out."""
    found = []
    for gpus in sorted({*GPUS, workers}):
        if gpus % load.sharing:  # such a run is refused
            continue
        asked = replace(load, ranks=gpus, zero3=not local)
        parameters = _fitting(asked)
        host = memory(family(parameters), asked).host_bytes if parameters else 0
        found.append({"gpus": gpus, "gpu_bytes": GPU_BYTES, "parameters": parameters, "host_bytes_per_rank": host})
    return found


def _fitting(load: Load) -> int:
    """0 where none does."""
    size, found = SMALLEST, 0
    while size < LARGEST:
        shape = family(size)
        if memory(shape, load).device_bytes > GPU_BYTES:
            break
        found, size = shape.parameters, size * STEP
    return found
