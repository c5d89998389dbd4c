"""One process trains a run. Whoever starts last owns it, unless the owner is seen to be alive on this machine; an owner that was
thought dead finds out before its next checkpoint, and stops.

There are no locks in a store, so this is a fence: `OWNER.json` names the owner, and whoever writes for the run looks at it first.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any
from uuid import uuid4

from distft.errors import MissingArtifactError, StaleArtifactError
from distft.store.location import Location

NAME = "OWNER.json"


class Owner:
    """This process's claim on the run whose checkpoints are in `folder`."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._claim: str | None = None

    def claim(self) -> None:
        """Makes this process the one that may write; refused while the owner runs on this machine."""
        found = self._read()
        if found and found.get("process") != os.getpid() and _alive(found):
            raise StaleArtifactError(
                f"Process {found['process']} on this machine is training this run.", where=self.folder.url,
                help="Wait for it or stop it, then run the command again; or give this run another `name`.",
            )  # fmt: skip
        self._claim = uuid4().hex
        self.folder.replace(NAME, json.dumps({"claim": self._claim, **_this_process()}).encode())

    def check(self) -> None:
        """Raises when another process owns the run by now. Nothing is checked without a claim."""
        if self._claim is None:
            return
        found = self._read()
        if found.get("claim") != self._claim:
            raise StaleArtifactError(
                f"Process {found.get('process')} on {found.get('host')} has taken this run over. This one stops; what was committed "
                "stands.", where=self.folder.url, help="Nothing needs to be done: the other one goes on with the run.",
            )  # fmt: skip

    @property
    def claimed(self) -> bool:
        return self._claim is not None

    def _read(self) -> dict[str, Any]:
        """The file; empty when there is none, or nonsense in it."""
        try:
            found = json.loads(self.folder.read(NAME))
        except (MissingArtifactError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether that very process runs on this machine: a number alone may have passed to another process."""
    process, started = owner.get("process"), owner.get("started")
    return owner.get("host") == socket.gethostname() and type(process) is int and bool(started) and _started(process) == started


def _started(process: int) -> str:
    """When a process of this machine began, as text to compare; empty when there is none, or the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The second field, a name in brackets, may hold anything; the 20th after it is the start in clock ticks.
        return f"{boot}:{Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""
