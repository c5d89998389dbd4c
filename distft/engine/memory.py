"""How much memory a step took, and what a user is told when that of a device does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from distft.errors import DistftError


@contextmanager
def enough_memory(help: str) -> Iterator[None]:
    """Says which settings take less, where torch says how many bytes were wanted."""
    try:
        yield
    except RuntimeError as error:  # on a CPU torch has no class of its own for it
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        asked = str(error).splitlines()[0].rpartition("DefaultCPUAllocator: ")[2]
        raise DistftError(f"Out of memory: {asked[:300]}", where=_device(), help=help) from error


def forget_peak(device: torch.device) -> None:
    """What `peak_bytes` tells begins here, where it can: on an accelerator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took at once on an accelerator since `forget_peak`; on a CPU the most that this process has ever held,
    which the kernel keeps. 0 where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
