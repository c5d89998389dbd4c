"""The log as TensorBoard reads it. Events are made from the log's lines, never beside them: each start writes all of them anew, so
that a run that was resumed has no step twice and none of those that it took back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distft.objectives.loss import PARTS
from distft.store.local import explained
from distft.store.location import Location
from distft.train.metrics import Ending

FOLDER = "tensorboard"
MARK = "tfevents"
"""Without it in its name TensorBoard passes over a file."""


class Events:
    """An event file of a run's folder. In a store that is no disk it is put at checkpoints and at the end."""

    def __init__(self, run: Location) -> None:
        self.folder = run.child(FOLDER)
        # A fresh name: TensorBoard goes on reading a file that it knows where it stopped.
        self.name = f"events.out.{MARK}.{time.time():.6f}.distft"
        self._scratch: TemporaryDirectory[str] | None = None
        self._writer: Any = None

    def start(self, lines: Sequence[dict[str, Any]]) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  (made by protobuf when it loads)
        from tensorboardX.record_writer import RecordWriter

        for name in self.folder.names():
            if MARK in name:
                self.folder.delete(name)
        path = self.folder.local(self.name)
        if path is None:
            self._scratch = TemporaryDirectory(prefix="distft-events-")
            path = Path(self._scratch.name) / self.name
        self.path = path
        with explained("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(path))
            now = time.time()
            self._writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
            # makes a TensorBoard that is looking forget what it has seen of this run
            begun = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
            self._writer.write(begun.SerializeToString())
            for line in lines:
                self._writer.write(_event(line))
            self._writer.flush()

    def add(self, line: dict[str, Any]) -> None:
        with explained("write", self.path):
            self._writer.write(_event(line))
            self._writer.flush()

    def flush(self) -> None:
        if self._scratch is not None:
            self.folder.replace(self.name, self.path.read_bytes())

    def close(self, ending: Ending) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self.flush()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


def figures(line: dict[str, Any]) -> dict[str, float]:
    """A line's numbers, by names that dashboards show in groups: `loss/kl`, `share/kl`, `time/data_seconds`."""
    skipped = ("step", "time")
    return {_name(key): float(value) for key, value in line.items() if isinstance(value, int | float) and key not in skipped}


def _name(key: str) -> str:
    if key in PARTS or key == "loss":
        return f"loss/{key}"
    for group in ("share", "mass", "tokens"):
        if key.startswith(f"{group}_") and key != "tokens_per_second":
            return f"{group}/{key.removeprefix(f'{group}_')}"
    if key.endswith("seconds"):
        return f"time/{key}"
    if key in ("drift", "heldout_nll", "drift_budget", "kl_factor"):
        return f"heldout/{key}"
    return f"speed/{key}" if key in ("tokens_per_second", "model_flops_per_second", "mfu", "memory_bytes") else f"step/{key}"


def _event(line: dict[str, Any]) -> bytes:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures(line).items()]
    # lines of an earlier version have no time
    made = Event(wall_time=line.get("time") or time.time(), step=line["step"], summary=Summary(value=values))
    return made.SerializeToString()
