"""Services that follow the log. The packages are not needed: small ones with the same calls, which write down what they are called
with, stand for them. Their signatures are those of wandb 0.31 and mlflow-skinny 3.17.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distft.config.check import check_run
from distft.config.load import validate
from distft.config.schema import Log
from distft.errors import ConfigError
from distft.store.location import Location, open_location
from distft.train import trackers as module
from distft.train.metrics import MetricsLog
from distft.train.record import read_metrics
from distft.train.trackers import Tracker, trackers

WANDB = """
import json, pathlib
TOLD = pathlib.Path(__file__).parent / "told.jsonl"
def tell(*what):
    with TOLD.open("a") as file:
        file.write(json.dumps(what) + "\\n")
def taken():
    return [one for one in map(json.loads, TOLD.read_text().splitlines()) if one[0] == "log"] if TOLD.exists() else []
class Settings:
    def __init__(self, *, console, silent, disable_git, save_code): ...
def setup(settings):
    assert isinstance(settings, Settings)
class Run:
    id, url, offline = "an-id", "https://somewhere", False
    def __init__(self, resumed):
        self.starting_step = 1 + max([one[1] for one in taken()], default=-1) if resumed else 0
    def log(self, data, step=None, commit=None):
        if (TOLD.parent / "down").exists():
            raise ConnectionError("no route")
        tell("log", step, data)
    def mark_preempting(self):
        tell("preempting")
    def finish(self, exit_code=None):
        tell("finish", exit_code)
def init(*, project, entity, name, config, id, resume, settings):
    tell("init", project, entity, name, config, id, resume)
    return Run(resume)
"""
MLFLOW = """
import json, pathlib
TOLD = pathlib.Path(__file__).parent.parent / "told.jsonl"
def tell(*what):
    with TOLD.open("a") as file:
        file.write(json.dumps(what) + "\\n")
class Thing:
    def __init__(self, **given):
        self.__dict__.update(given)
class MlflowClient:
    def __init__(self, tracking_uri=None):
        tell("client", tracking_uri)
    def get_experiment_by_name(self, name):
        return None
    def create_experiment(self, name):
        tell("experiment", name)
        return "7"
    def create_run(self, experiment_id, run_name=None):
        tell("run", experiment_id, run_name)
        return Thing(info=Thing(run_id="an-id"))
    def update_run(self, run_id, status=None):
        tell("update", run_id, status)
    def get_metric_history(self, run_id, key):
        found = [json.loads(line) for line in TOLD.read_text().splitlines()]
        return [Thing(step=s) for one in found if one[0] == "batch" for k, _, _, s in one[2] if k == key]
    def log_batch(self, run_id, metrics=(), params=()):
        if (TOLD.parent / "down").exists():
            raise ConnectionError("no route")
        assert len(params) <= 100
        tell("batch", run_id, [[m.key, m.value, m.timestamp, m.step] for m in metrics], {p.key: p.value for p in params})
    def set_terminated(self, run_id, status=None):
        tell("end", run_id, status)
"""
ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step):
        self.key, self.value, self.timestamp, self.step = key, value, timestamp, step
class Param:
    def __init__(self, key, value):
        self.key, self.value = key, value
"""
GIVEN: dict[str, dict[str, Any]] = {
    "wandb": {"wandb": {"project": "p", "entity": "we"}},
    "mlflow": {"mlflow": {"experiment": "e", "tracking_uri": "sqlite:///x.db"}},
}


def line(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10, "loss": 1.0 / step, "time": 1000.0 + step}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of both, where they can be imported from, for this test alone."""
    import sys

    folder = tmp_path / "packages"
    (folder / "mlflow").mkdir(parents=True)
    (folder / "wandb.py").write_text(WANDB)
    (folder / "mlflow" / "__init__.py").write_text(MLFLOW)
    (folder / "mlflow" / "entities.py").write_text(ENTITIES)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    for name in ("wandb", "mlflow", "mlflow.entities"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in ("wandb", "mlflow", "mlflow.entities"):
        sys.modules.pop(name, None)


def told(packages: Path) -> list[Any]:
    return [json.loads(one) for one in (packages / "told.jsonl").read_text().splitlines()]


def follow(kind: str, run: Location, *, after: int, upto: int, ends: type[BaseException] | None = None) -> Tracker:
    """Logs steps after + 1, ..., upto, of 7."""
    [tracker] = trackers(
        Log.model_validate(GIVEN[kind]), run, run_name="first", settings={"train": {"lr": 0.5, "max_steps": None}}
    )

    def work() -> None:
        with MetricsLog(run, after_step=after, last_step=7, followers=[tracker]) as log:
            for step in range(after + 1, upto + 1):
                log.add(line(step))
            log.flush()
            if ends is not None:
                raise ends

    if ends is not None:
        with pytest.raises(ends):
            work()
    else:
        work()
    assert not tracker.thread.is_alive()
    return tracker


def test_wandb_is_told_each_step_once_and_a_resumed_run_goes_on_there(tmp_path: Path, packages: Path) -> None:
    run = open_location(str(tmp_path / "run"))
    follow("wandb", run, after=0, upto=5, ends=KeyboardInterrupt)
    follow("wandb", run, after=3, upto=7)
    settings = {"train": {"lr": 0.5, "max_steps": None}}
    found = told(packages)
    assert [one for one in found if one[0] != "log"] == [
        ["init", "p", "we", "first", settings, None, None], ["preempting"], ["finish", 1],
        ["init", "p", "we", "first", settings, "an-id", "allow"], ["finish", 0],
    ]  # fmt: skip
    steps = [one for one in found if one[0] == "log"]
    assert [step for _, step, _ in steps] == list(range(1, 8))
    assert steps[1][2] == {"loss/loss": 0.5, "step/tokens": 10}
    assert [one["step"] for one in read_metrics(run)] == list(range(1, 8))


def test_mlflow_is_told_each_step_once_and_a_resumed_run_goes_on_there(tmp_path: Path, packages: Path) -> None:
    run = open_location(str(tmp_path / "run"))
    follow("mlflow", run, after=0, upto=5, ends=KeyboardInterrupt)
    follow("mlflow", run, after=3, upto=7)
    found = told(packages)
    assert found[:4] == [
        ["client", "sqlite:///x.db"], ["experiment", "e"], ["run", "7", "first"],
        ["batch", "an-id", [], {"train.lr": "0.5", "train.max_steps": "None"}],
    ]  # fmt: skip
    assert [one for one in found if one[0] in ("update", "end")] == [
        ["update", "an-id", "SCHEDULED"], ["update", "an-id", "RUNNING"], ["end", "an-id", "FINISHED"],
    ]  # fmt: skip
    metrics = [one[2] for one in found if one[0] == "batch" and one[2]]
    assert metrics[1] == [["step/tokens", 10, 1002000, 2], ["loss/loss", 0.5, 1002000, 2]]
    assert [one[0][3] for one in metrics] == list(range(1, 8))


@pytest.mark.parametrize(
    ("kind", "failed", "finished"),
    [("wandb", [["finish", 1]], [["finish", 0]]), ("mlflow", [["end", "an-id", "FAILED"]], [["end", "an-id", "FINISHED"]])],
)
def test_a_run_that_failed_or_was_stopped_after_all_of_it_is_closed_as_what_it_is(
    kind: str, failed: list[Any], finished: list[Any], tmp_path: Path, packages: Path
) -> None:
    run = open_location(str(tmp_path / "run"))
    for upto, ends, closed in ((3, ValueError, failed), (7, KeyboardInterrupt, finished)):
        follow(kind, run, after=upto - 1, upto=upto, ends=ends)
        assert told(packages)[-1:] == closed
        assert ["preempting"] not in told(packages)


class Killed(BaseException):
    """A process that ends here closes nothing."""


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_steps_that_are_taken_a_second_time_after_a_kill_are_sent_once(
    kind: str, tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_location(str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(f"distft.train.trackers.{kind.capitalize()}Service.close", lambda self, ending: None)
        follow(kind, run, after=0, upto=6, ends=Killed)
    follow(kind, run, after=2, upto=7)
    if kind == "wandb":
        steps = [one[1] for one in told(packages) if one[0] == "log"]
    else:
        steps = [one[2][0][3] for one in told(packages) if one[0] == "batch" and one[2]]
    assert steps == list(range(1, 8))


def test_mlflow_has_one_run_however_often_its_beginning_fails(tmp_path: Path, packages: Path) -> None:
    run, attempts = open_location(str(tmp_path / "run")), 0
    (packages / "down").touch()
    [tracker] = trackers(Log.model_validate(GIVEN["mlflow"]), run, run_name="first", settings={"a": 1})
    again = threading.Event()
    complain = tracker._complain

    def heard(error: Exception) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            (packages / "down").unlink()
        complain(error)
        if attempts == 3:
            again.set()

    def replace(name: str, data: bytes) -> None:
        if name == "mlflow.json" and attempts < 3:
            raise OSError("no room")
        type(run).replace(run, name, data)

    tracker._complain = heard  # pyright: ignore[reportAttributeAccessIssue]
    tracker.run = open_location(str(tmp_path / "run"))
    tracker.run.replace = replace  # pyright: ignore[reportAttributeAccessIssue]
    with MetricsLog(run, after_step=0, followers=[tracker]) as log:
        log.add(line(1))
        assert again.wait(30)
    assert [one for one in told(packages) if one[0] == "run"] == [["run", "7", "first"]]
    assert json.loads(run.read("mlflow.json"))["run"] == {"id": "an-id"}
    assert [one[3] for one in told(packages) if one[0] == "batch" and one[3]][-1] == {"a": "1"}
    assert told(packages)[-1] == ["end", "an-id", "FINISHED"]


def test_wandb_is_begun_once_where_it_cannot_be_written_down(tmp_path: Path, packages: Path) -> None:
    [tracker] = trackers(Log.model_validate(GIVEN["wandb"]), open_location(str(tmp_path / "run")), run_name="first", settings={})
    assert tracker.service.open(None) == tracker.service.open(None) == ({"id": "an-id"}, -1)
    assert [one[0] for one in told(packages)] == ["init"]


def test_a_run_that_starts_again_or_goes_elsewhere_is_another_one_there(tmp_path: Path, packages: Path) -> None:
    run = open_location(str(tmp_path / "run"))
    follow("wandb", run, after=0, upto=3)
    follow("wandb", run, after=0, upto=2)
    run.replace("wandb.json", json.dumps({"to": {"project": "other"}, "run": {"id": "x"}}).encode())
    follow("wandb", run, after=2, upto=3)
    run.replace("wandb.json", b'{"to": {')
    follow("wandb", run, after=3, upto=3)
    assert [(one[5], one[6]) for one in told(packages) if one[0] == "init"] == 4 * [(None, None)]
    assert [one[1] for one in told(packages) if one[0] == "log"] == [1, 2, 3, 1, 2, 1, 2, 3, 1, 2, 3]


def test_a_service_that_is_down_stops_nothing_and_gets_the_rest_when_it_is_up(
    tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, failed = open_location(str(tmp_path / "run")), threading.Event()
    (packages / "down").touch()
    [tracker] = trackers(Log.model_validate(GIVEN["wandb"]), run, run_name="first", settings={})
    complain = tracker._complain

    def heard(error: Exception) -> None:
        complain(error)
        failed.set()

    tracker._complain = heard  # pyright: ignore[reportAttributeAccessIssue]
    with MetricsLog(run, after_step=0, followers=[tracker]) as log:
        for step in (1, 2, 3):
            failed.clear()
            log.add(line(step))
            assert failed.wait(30)
        (packages / "down").unlink()
        log.add(line(4))
    assert [one[1] for one in told(packages) if one[0] == "log"] == [1, 2, 3, 4]
    assert capsys.readouterr().err.splitlines() == [
        "wandb: https://somewhere",
        "wandb does not take the log: ConnectionError: no route. Training goes on, and metrics.jsonl has all of it.",
    ]


def test_a_service_that_stays_down_stops_nothing(tmp_path: Path, packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packages / "down").touch()
    tracker = follow("wandb", open_location(str(tmp_path / "run")), after=0, upto=3)
    assert tracker.sent == 0
    assert capsys.readouterr().err.count("does not take the log") == 1
    assert len(read_metrics(open_location(str(tmp_path / "run")))) == 3


def test_a_service_that_never_answers_is_not_waited_for(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LAST_SECONDS", 0.1)
    [tracker] = trackers(Log.model_validate(GIVEN["wandb"]), open_location(str(tmp_path / "run")), run_name="first", settings={})
    free = threading.Event()
    tracker.service.open = lambda kept: free.wait(60)  # pyright: ignore[reportAttributeAccessIssue]
    with MetricsLog(open_location(str(tmp_path / "run")), after_step=0, followers=[tracker]) as log:
        log.add(line(1))
    assert "has not taken all of the log yet" in capsys.readouterr().err
    free.set()
    tracker.thread.join(30)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_ends_before_its_time_waits_less_for_a_service(
    error: type[BaseException], tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    run = open_location(str(tmp_path / "run"))
    [tracker] = trackers(Log.model_validate(GIVEN["wandb"]), run, run_name="first", settings={})
    join = tracker.thread.join

    def counted(seconds: float) -> None:
        waited.append(seconds)
        join(30)

    monkeypatch.setattr(tracker.thread, "join", counted)

    def work() -> None:
        with MetricsLog(run, after_step=0, last_step=7, followers=[tracker]) as log:
            log.add(line(1))
            raise error

    with pytest.raises(error):
        work()
    assert waited == [module.STOPPED_SECONDS]
    assert module.STOPPED_SECONDS < 10 < module.LAST_SECONDS


def config(**log: Any) -> Any:
    base = {"name": "a", "model": {"path": "m"}, "data": {"train": {"path": "t.jsonl"}}}
    return validate({**base, "train": {"log": log}}, where="run.yaml")


@pytest.mark.parametrize(("kind", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_service_without_its_package_is_refused_before_anything_is_done(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distft.config.check.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"train\.log\.{kind} asks .*: pip install {package}, or set it to null"):
        check_run(config(**GIVEN[kind]), where="run.yaml")
    check_run(config(), where="run.yaml")


def test_a_folder_that_a_service_has_left_behind_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_run(config(**GIVEN["wandb"]), where="run.yaml")


def test_with_its_package_it_is_accepted_without_loading_it(packages: Path) -> None:
    import sys

    check_run(config(**GIVEN["wandb"], **GIVEN["mlflow"]), where="run.yaml")
    assert not {"wandb", "mlflow"} & sys.modules.keys()


REFUSED = [
    "https://me:secret@host", "https://secret@host/x", "postgresql://u:secret@h/db", "https://me:se/secret@host", "u:secret@host/db",
    "postgresql://host/db?user=u&password=secret", "http://host/x?token=secret", "sqlite:///x.db?key=secret", "mlruns?secret",
    "https://host/#secret", "file://u:secret@host/x", "sqlite://u:secret@/x", "https:///u:secret@host", "", ["secret"], 3, None,
]  # fmt: skip


@pytest.mark.parametrize("uri", REFUSED)
def test_no_password_can_stand_in_the_run_file_and_none_is_repeated(uri: Any) -> None:
    with pytest.raises(ConfigError) as told:
        config(mlflow={"experiment": "e", "tracking_uri": uri})
    wanted = "should be an address without a user, a password, a query (?) or a fragment (#)"
    assert told.value.problem == f"1 problem in the run file:\n  train.log.mlflow.tracking_uri: {wanted}"
    assert told.value.__cause__ is None
    assert told.value.__context__ is None
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("log", [{"mlflow": "https://u:secret@host"}, {"wandb": "secret"}])
def test_what_stands_where_a_section_should_is_not_repeated(log: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"train\.log\.{next(iter(log))}: input should be a valid dictionary") as told:
        config(**log)
    assert "secret" not in str(told.value)


def test_services_are_not_told_of_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.train import stage

    told: list[Any] = []
    monkeypatch.setattr(stage, "trackers", lambda log, folder, *, run_name, settings: told.append((log, settings)) or [])
    run = config(**GIVEN["mlflow"], tensorboard=False)
    stage._log(run, open_location(str(tmp_path / "run")), after_step=0, last_step=7)
    [(log, settings)] = told
    assert log == run.train.log
    assert "log" not in settings["train"]
    assert settings["train"]["lr"] == run.train.lr
    assert settings["name"] == "a"


@pytest.mark.parametrize(
    "uri", ["https://host:5000/x", "http://127.0.0.1:5000", "sqlite:////a/b@c.db", "mlruns", "file:/tmp/x", "databricks"]
)
def test_addresses_of_services(uri: str) -> None:
    assert config(mlflow={"experiment": "e", "tracking_uri": uri}).train.log.mlflow.tracking_uri == uri
