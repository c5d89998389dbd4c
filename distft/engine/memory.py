"""What a user is told when the memory of a device does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
