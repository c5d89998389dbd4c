"""Several ranks on this machine: real processes, gloo, a file to meet at, and the first traceback where one fails."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any


class RankError(AssertionError):
    """A rank failed, died or hung; the message holds its traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Calls `fn(world, *args)` on each rank and returns what they return, by rank. `fn` is a module's function, and what it takes
    and gives can be pickled. The first failure ends all ranks and is raised with its traceback; so does the end of `timeout`."""
    context = get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        ranks = [context.Process(target=_rank, args=(rank, world_size, meeting, queue, fn, args)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        try:
            return _collect(queue, ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.join(2.0)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(queue: Any, ranks: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    gone_before = False
    while len(results) < len(ranks):
        try:
            rank, result, failure = queue.get(timeout=0.5)
        except Empty:
            gone = [n for n, process in enumerate(ranks) if n not in results and not process.is_alive()]
            if gone and gone_before:  # looked at twice: what it sent last may still be on its way
                raise RankError(f"rank {gone[0]} died with exit status {ranks[gone[0]].exitcode}") from None
            gone_before = bool(gone)
            if time.monotonic() > deadline:
                missing = sorted(set(range(len(ranks))) - results.keys())
                raise RankError(f"ranks {missing} said nothing in time") from None
            continue
        if failure:
            raise RankError(f"rank {rank} failed:\n{failure}")
        results[rank] = pickle.loads(result)  # noqa: S301  (our own child's)
    return [results[rank] for rank in range(len(ranks))]


def _rank(rank: int, size: int, meeting: str, queue: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    try:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        from distft.engine.world import World

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=120))
        result = fn(World(rank=rank, size=size), *args)
        dist.barrier()
        dist.destroy_process_group()
        queue.put((rank, pickle.dumps(result), None))  # the queue's own pickler would share tensors' memory, which ends with us
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
