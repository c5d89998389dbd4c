"""The log, followed by services for it: wandb and mlflow, where they are asked for.

Each is served by a thread of its own, so that no step waits for a network. What it has not taken yet is tried again, until the run
ends; a service that fails never stops training, and is complained about once. Credentials come from the environment, as its package
reads it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from distft.config.schema import Log, Mlflow, Wandb
from distft.errors import DistftError
from distft.progress import say
from distft.store.location import Location
from distft.train.events import figures
from distft.train.metrics import Ending

RETRY_SECONDS = 60.0
LAST_SECONDS = 60.0
"""How long the end of a run waits for a service to take the rest."""
STOPPED_SECONDS = 5.0
"""The same where it ends before its time: all ranks wait, and a run that goes on sends the rest from its log."""


class Service(Protocol):
    """One run in a service's eyes."""

    name: str

    def open(self, kept: dict[str, Any] | None) -> tuple[dict[str, Any], int]:
        """Begins a run, or goes on with the one that was kept. Gives what is to be kept, and the last step that it has. Called again
        when it failed or what it gave could not be kept, and begins no second run then."""
        ...

    def send(self, line: dict[str, Any]) -> None: ...

    def close(self, ending: Ending) -> None: ...


class Tracker:
    """Follows the log for a service. What names the run there is kept beside the log, in `SERVICE.json`: a run that is resumed here is
    so there."""

    def __init__(self, run: Location, service: Service, destination: dict[str, Any]) -> None:
        self.run, self.service, self.destination = run, service, destination
        self.lines: list[dict[str, Any]] = []
        self.sent = 0
        """How many of them are there, or need not be."""
        self.taken = 0
        """The last step that the service had when it was opened. A run that goes on from an earlier checkpoint comes by it again."""
        self.resumed = False
        self.how: Ending = "failed"
        self.opened = self.complained = False
        self.news, self.ending = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._serve, name=service.name, daemon=True)

    def start(self, lines: Sequence[dict[str, Any]]) -> None:
        self.lines, self.resumed = list(lines), bool(lines)
        self.news.set()
        self.thread.start()

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.news.set()

    def flush(self) -> None:
        """Nothing here is worth waiting for."""

    def close(self, ending: Ending) -> None:
        self.how = ending
        self.ending.set()
        self.news.set()
        if self.thread.ident is None:
            return
        self.thread.join(LAST_SECONDS if ending == "finished" else STOPPED_SECONDS)
        if self.thread.is_alive() and not self.complained:
            say(f"{self.service.name} has not taken all of the log yet, and is not waited for. metrics.jsonl has all of it.")

    def _serve(self) -> None:
        while True:
            self.news.wait()
            self.news.clear()
            last = self.ending.is_set()
            try:
                self._send()
                if last:
                    self.service.close(self.how)
            except Exception as error:  # whatever it is, it is not worth a run
                self._complain(error)
                if not last:
                    self.ending.wait(RETRY_SECONDS)
                    self.news.set()
            if last:
                return

    def _send(self) -> None:
        if not self.opened:
            kept, self.taken = self.service.open(self._kept() if self.resumed else None)
            self.run.replace(f"{self.service.name}.json", json.dumps({"to": self.destination, "run": kept}).encode())
            self.opened = True
        while self.sent < len(self.lines):
            line = self.lines[self.sent]
            if line["step"] > self.taken:  # wandb would pass over the others itself; mlflow would show them twice
                self.service.send(line)
            self.sent += 1

    def _kept(self) -> dict[str, Any] | None:
        """What names the run there, when it is the same there that is asked for."""
        name = f"{self.service.name}.json"
        if not self.run.exists(name):
            return None
        try:
            found = json.loads(self.run.read(name))
            return found["run"] if found["to"] == self.destination else None
        except (ValueError, KeyError, TypeError):
            return None  # it was cut off, and the service gets a run of its own

    def _complain(self, error: Exception) -> None:
        if not self.complained:
            self.complained = True
            told = error.problem if isinstance(error, DistftError) else f"{type(error).__name__}: {error}"
            told = told[:300].rstrip(".")
            say(f"{self.service.name} does not take the log: {told}. Training goes on, and metrics.jsonl has all of it.")


class WandbService:
    name = "wandb"

    def __init__(self, config: Wandb, *, run_name: str, settings: dict[str, Any]) -> None:
        self.config, self.run_name, self.settings = config, run_name, settings
        self.run: Any = None

    def open(self, kept: dict[str, Any] | None) -> tuple[dict[str, Any], int]:
        import wandb  # pyright: ignore[reportMissingImports]

        if self.run is not None:
            return {"id": self.run.id}, self.run.starting_step - 1
        # Silent: it would ask for a key, and write into the middle of our own lines.
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        wandb.setup(quiet)  # or it would still ask where there is a keyboard
        self.run = wandb.init(
            project=self.config.project, entity=self.config.entity, name=self.config.name or self.run_name, config=self.settings,
            id=kept["id"] if kept else None, resume="allow" if kept else None, settings=quiet,
        )  # fmt: skip
        if not self.run.offline:
            say(f"wandb: {self.run.url}")
        return {"id": self.run.id}, self.run.starting_step - 1

    def send(self, line: dict[str, Any]) -> None:
        self.run.log(figures(line), step=line["step"])

    def close(self, ending: Ending) -> None:
        # Its id is all that wandb needs to go on, whatever the run's state. An exit code of 0 would call it finished, and another one
        # failed, unless it is marked: then it is preempted.
        if ending == "stopped":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if ending == "finished" else 1)


class MlflowService:
    name = "mlflow"

    def __init__(self, config: Mlflow, *, run_name: str, settings: dict[str, Any]) -> None:
        self.config, self.run_name, self.settings = config, run_name, settings
        self.client: Any = None
        self.id = ""

    def open(self, kept: dict[str, Any] | None) -> tuple[dict[str, Any], int]:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        self.client = MlflowClient(tracking_uri=self.config.tracking_uri)
        if kept is not None:
            self.id = kept["id"]
            self.client.update_run(self.id, status="RUNNING")
            # Asked each time: no file of ours could know what had arrived when a run was killed.
            taken = self.client.get_metric_history(self.id, "loss/loss")
            return kept, max((one.step for one in taken), default=0)
        if not self.id:  # else an earlier attempt came so far; the same settings may be sent again
            found = self.client.get_experiment_by_name(self.config.experiment)
            experiment = found.experiment_id if found else self.client.create_experiment(self.config.experiment)
            self.id = self.client.create_run(experiment, run_name=self.run_name).info.run_id
        settings = [Param(key, str(value)) for key, value in _flat(self.settings).items() if str(value)]
        for start in range(0, len(settings), 100):  # more at once are refused
            self.client.log_batch(self.id, params=settings[start : start + 100])
        return {"id": self.id}, 0

    def send(self, line: dict[str, Any]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        when = int(1000 * (line.get("time") or time.time()))
        self.client.log_batch(self.id, metrics=[Metric(key, value, when, line["step"]) for key, value in figures(line).items()])

    def close(self, ending: Ending) -> None:
        if ending == "stopped":  # "to run at a later time", and without an end
            self.client.update_run(self.id, status="SCHEDULED")
        else:
            self.client.set_terminated(self.id, status="FINISHED" if ending == "finished" else "FAILED")


def trackers(log: Log, run: Location, *, run_name: str, settings: dict[str, Any]) -> list[Tracker]:
    """Those that the run file asks for. `settings` are the resolved run's."""
    found = []
    if log.wandb is not None:
        found.append(Tracker(run, WandbService(log.wandb, run_name=run_name, settings=settings), log.wandb.model_dump()))
    if log.mlflow is not None:
        found.append(Tracker(run, MlflowService(log.mlflow, run_name=run_name, settings=settings), log.mlflow.model_dump()))
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
