"""Processes that do something at the same moment."""

from __future__ import annotations

import os
import subprocess
import sys

WAIT = """
import sys
print("ready", flush=True)
sys.stdin.readline()
"""


def race(place: str, names: list[str], *, prepare: str, act: str) -> list[str]:
    """A process for each name runs `prepare`, waits until all have, and runs `act`; both find the place and the name in `sys.argv`.
    Returns what each printed then."""
    program = prepare + WAIT + act
    racers = [
        subprocess.Popen([sys.executable, "-c", program, place, name], stdin=-1, stdout=-1, text=True, env=dict(os.environ))
        for name in names
    ]
    for one in racers:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in racers:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    told = [one.communicate(timeout=60)[0].strip() for one in racers]
    assert all(one.returncode == 0 for one in racers)
    return told
