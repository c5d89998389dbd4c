"""What servers of tests have in common: ports on loopback, and the wait until one answers."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def answers(endpoint: str, servers: Sequence[subprocess.Popen[bytes]], *, within: float) -> bool:
    """Waits until something answers there, whatever it says; not when a server has ended, nor longer than so many seconds."""
    until = time.monotonic() + within
    while time.monotonic() < until and all(server.poll() is None for server in servers):
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.1)
    return False
