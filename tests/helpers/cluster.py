"""One Ray for all tests that want it, as a cluster that other processes may join."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Cluster:
    """A running Ray that this process is a driver of; pools of this process use it, whatever their address."""

    ray: Any

    @property
    def address(self) -> str:
        return self.ray.get_runtime_context().gcs_address

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to join."""
        return {key: value for key, value in os.environ.items() if key.startswith("RAY_")}


@pytest.fixture(scope="session")
def _running() -> Iterator[Any]:
    from distft.cluster.session import ray_session

    # Room for two pools of two, and for those that take a dead one's place before its own is free again.
    with ray_session("local", cpus=6, gpus=0) as ray:
        yield ray


@pytest.fixture
def cluster(_running: Any) -> Cluster:
    return Cluster(_running)
