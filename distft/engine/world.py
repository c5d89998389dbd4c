"""Who else takes part: rank, size, and the few collectives that the loop needs.

A world of one works without torch.distributed. Under torchrun (RANK and WORLD_SIZE set) a process group is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distft import ranks
from distft.errors import ConfigError, LostRankError

PATIENCE = timedelta(hours=4)
"""How long ranks wait for one that verifies, saves or measures. Whoever launched them notices one that died, and ends the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among the ranks."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """The process group of these ranks; None: the one of all that were launched."""
    shares_with: World | None = None
    """See `team`."""

    @property
    def team(self) -> World:
        """The ranks that take each micro-batch together with this one, and this one's place among them. Most share with nobody."""
        return self.shares_with or World()

    def in_teams(self, size: int) -> World:
        """The same world, where ranks 0 to size - 1 are a team, the next `size` of them another, and so on. All ranks call this at
        once."""
        if size == 1:
            return self
        if self.size % size:
            raise ConfigError(
                f"train.sequence_parallel={size} has each row shared by {size} ranks, and {self.size} ranks cannot be split into "
                f"teams of {size}.", where="train.sequence_parallel",
                help=f"Train on a multiple of {size} ranks (train.workers), or set train.sequence_parallel to a number that divides "
                f"{self.size}.",
            )  # fmt: skip
        # every rank has a hand in making every group
        groups = [dist.new_group(list(range(first, first + size)), timeout=PATIENCE) for first in range(0, self.size, size)]
        return replace(self, shares_with=World(rank=self.rank % size, size=size, group=groups[self.rank // size]))

    @property
    def leads(self) -> bool:
        """True on the one rank that writes and talks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds the tensor over all ranks, in place, on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks, in place, on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks; they may differ in their first dimension."""
        if self.size == 1:
            return [tensor]
        lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device), group=self.group)
        rows = [int(length) for length in lengths]
        padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(found, padded, group=self.group)
        return [one[:length] for one, length in zip(found, rows, strict=True)]

    def swap(self, parts: Tensor) -> Tensor:
        """Sends parts[i] to rank i; gives what each rank sent to this one, in the order of ranks."""
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts, group=self.group)
        return found

    def total(self, *numbers: float) -> list[float]:
        """Adds numbers over all ranks in float64."""
        return self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)


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
        raise LostRankError(
            f"Another rank is gone: {str(error).splitlines()[0][:200]}", where=f"rank {ranks.rank()}",
            help="What it said before it stopped is the cause. The same command goes on from the last checkpoint.",
        ) from error  # fmt: skip
    finally:
        dist.destroy_process_group()


def join_group() -> World:
    """The group of actors that this process was started into as one of, for as long as it lives; a world of one without. They share
    a machine and meet at a file of it."""
    meeting = os.environ.get("DISTFT_MEETING")
    if meeting is None:
        return World()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    this_device()
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=ranks.rank(), world_size=ranks.size(), timeout=PATIENCE
    )  # fmt: skip
    return World(rank=dist.get_rank(), size=dist.get_world_size())


def open_group() -> None:
    """A process group of this process alone, unless it is in one: for whoever needs one also where nothing was launched. It lasts as
    long as the process."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]


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
