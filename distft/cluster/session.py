"""This process's tie to Ray: a small cluster of its own that ends with the block, or somebody's cluster that is joined and left.

Whoever reaches a Ray cluster can run code on it. So the one of our own listens on loopback alone, asks for a token that is made for it
and is never written down, and has no dashboard. A joined cluster's token comes from the environment or from Ray's own file.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from distft.errors import DistftError, UserInputError

DAY = 86_400.0
OBJECT_STORE_BYTES = 100 << 20
"""Units and their results are small; Ray would take a third of the memory. It refuses less than 75 MiB."""


@contextmanager
def ray_session(address: str, *, cpus: int, gpus: int) -> Iterator[Any]:
    """The module `ray`, connected. `local` starts a cluster with these resources on this machine; `auto` finds one that runs here,
    and anything else is an address. A process that is connected already (a driver inside a Ray job) stays as it is."""
    own = address == "local"
    if own:
        _close_doors()
    import ray

    if ray.is_initialized():
        yield ray
        return
    folder = _own_folder() if own else None
    before = _handlers()
    _mute()
    try:
        with _signals_wait():
            if own:
                # An explicit address: RAY_ADDRESS would lead elsewhere.
                _connect(ray, "local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, _temp_dir=folder,
                         object_store_memory=OBJECT_STORE_BYTES)  # fmt: skip
            else:
                _connect(ray, address)
        yield ray
    finally:
        ray.shutdown()
        _restore(before)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _own_folder() -> str:
    """For the cluster's sockets, whose paths must be short. Takes away those of processes that were killed before they could."""
    for left in Path("/tmp").glob("distft-ray-*-*"):
        pid = left.name.split("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    for meeting in Path("/tmp").glob("distft-group-*"):
        with suppress(OSError):
            if time.time() - meeting.stat().st_mtime > DAY:
                meeting.unlink()
    return tempfile.mkdtemp(prefix=f"distft-ray-{os.getpid()}-", dir="/tmp")


def _close_doors() -> None:
    """What makes an embedded cluster private; read by ray when it is imported, and inherited by its processes."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ["RAY_AUTH_MODE"] == "token" and not given:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Meant for firewalls elsewhere; on any system it makes Ray listen on 127.0.0.1, and `_node_ip_address` does not.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _connect(ray: Any, address: str, **settings: Any) -> None:
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except SystemExit as error:  # Ray's way to take a SIGTERM, in the moment in which its handler is there
        raise KeyboardInterrupt from error
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        told = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if address == "local":
            raise DistftError(
                f"Ray did not start on this machine: {told}", where="cluster.address=local",
                help="score.workers=1 needs no Ray. Else see that /tmp and /dev/shm have room.",
            ) from error  # fmt: skip
        raise UserInputError(
            f"No Ray cluster could be joined: {told}", where=f"cluster.address={address}",
            help="Start one (`ray start --head`), correct the address, give its token in RAY_AUTH_TOKEN; or take `local`.",
        ) from error  # fmt: skip


def _knock(address: str) -> None:
    """Ray tries for minutes where nobody answers."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _mute() -> None:
    """Ray tells of every worker that died at length, and on stdout, which belongs to `--json`. The pool tells of them itself."""
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Interrupted while it starts, Ray leaves processes behind and crashes when Python ends. So the first signal counts when it has
    started, a few seconds later; a second one at once. Ray's own handlers are taken off at the end: SIGTERM would end the process in
    another way than everywhere else."""
    came: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = _handlers()
    _restore(dict.fromkeys(before, later))
    try:
        yield
    finally:
        _restore(before)
    if came:
        raise KeyboardInterrupt


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _restore(handlers: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
