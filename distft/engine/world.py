"""Who else takes part: rank, size, and the few collectives that the loop needs.

A world of one works without torch.distributed. Under torchrun (RANK and WORLD_SIZE set) a process group is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from distft import ranks
from distft.errors import DistftError

PATIENCE = timedelta(hours=4)
"""How long ranks wait for one that verifies, saves or measures. Whoever launched them notices one that died, and ends the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among the ranks."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True on the one rank that writes and talks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds the tensor over all ranks, in place, on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, *numbers: float) -> list[float]:
        """Adds numbers over all ranks in float64."""
        return self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world() -> Iterator[World]:
    """The world that the environment describes; leaves it again at the end."""
    ranks.check_launched()
    if ranks.size() == 1:
        yield World()
        return
    # gloo carries the float64 sums that NCCL ranks also need on the host
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size())
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise DistftError(
            f"Another rank is gone: {str(error).splitlines()[0][:200]}", where=f"rank {ranks.rank()}",
            help="What it said before it stopped is the cause. The same command goes on from the last checkpoint.",
        ) from error  # fmt: skip
    finally:
        dist.destroy_process_group()


def device_count() -> int:
    """Accelerators of this machine that this process may use."""
    return torch.cuda.device_count()


def this_device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
