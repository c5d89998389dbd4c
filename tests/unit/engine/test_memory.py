"""Running out of memory is answered with the settings that take less; other errors stay what they are."""

from __future__ import annotations

import pytest
import torch

from distft.engine.memory import enough_memory
from distft.errors import DistftError


def test_out_of_memory_names_the_bytes_and_the_way_out() -> None:
    with pytest.raises(DistftError, match="you tried to allocate 1152921504606846976 bytes") as told, enough_memory("Take less."):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert told.value.help == "Take less."
    assert told.value.exit_status == 1


def test_a_device_without_memory() -> None:
    with pytest.raises(DistftError, match="Tried to allocate 2 GiB"), enough_memory("Take less."):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("Take less."):
        raise RuntimeError("shapes do not fit")
