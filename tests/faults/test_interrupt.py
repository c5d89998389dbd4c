"""Stopped anywhere, by Ctrl-C, SIGTERM or SIGKILL: the same command goes on, and what comes out is the same, bit for bit."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distft.train.meters import MACHINE
from tests.helpers.runs import Bench, Done, files

# Where a process waits to be shot: a module, a class or "", a function of it, and which of its calls.
PLACES = {
    "tokenize": ("distft.corpus.workers", "_Encoder", "__call__", 2),
    "score": ("distft.teacher.part", "PartWriter", "commit", 3),
    "score, behind the data": ("distft.teacher.part", "", "commit", 3),
    "train": ("distft.engine.local", "LocalEngine", "train_step", 3),
    "log": ("distft.train.loop", "MetricsLog", "add", 4),
    "checkpoint": ("distft.train.checkpoint", "", "commit", 2),
    "export": ("distft.export.stage", "", "commit", 1),
    "evaluate": ("distft.evaluate.stage", "", "_likelihoods", 2),
    "report": ("distft.report.page", "", "write_report", 1),
}
PATIENCE = 60.0


def wait_at(place: str, reached: str) -> None:
    """Makes this process pause where it is to be stopped: it says so by a file, and sleeps until a signal comes, or for long."""
    import importlib

    module, owner, name, nth = PLACES[place]
    home: Any = importlib.import_module(module)
    home = getattr(home, owner) if owner else home
    real, seen = getattr(home, name), 0

    def waiting(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == nth:
            Path(reached).touch()
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and not _stopping():
                time.sleep(0.02)
        return real(*args, **kwargs)

    setattr(home, name, waiting)


def _stopping() -> bool:
    from distft import stopping

    return stopping.requested()


def stopped(bench: Bench, verb: str, place: str, number: signal.Signals) -> Done:
    """A command that reached a place and got a signal there."""
    reached = bench.folder / f"reached-{time.monotonic_ns()}"
    process = bench.start(verb, hook=wait_at, given=(place, str(reached)))
    process.await_file(reached)
    process.signal(number)
    return process.wait()


def politely(done: Done) -> None:
    assert done.status == 1, done.err
    assert "Traceback" not in done.err
    assert done.json == {"error": "interrupted", "where": "", "help": "Run the same command again."}
    assert "The same command goes on from what is committed." in done.err


def outcome(bench: Bench) -> dict[str, Any]:
    """All that a run is for: weights, log and scores, without clocks and unique names."""
    run = bench.store / "runs" / "first"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "eval" / "summary.json").read_text())
    for scores in summary["scores"].values():
        for one in scores.values():
            one.pop("items")
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(run / "model" / "model.safetensors").items()}
    return {
        "weights": weights, "lines": [{k: v for k, v in line.items() if k not in MACHINE} for line in lines],
        "summary": summary, "checkpoints": sorted(path.parent.name for path in run.glob("checkpoints/*/MANIFEST.json")),
    }  # fmt: skip


def leftovers(bench: Bench) -> list[str]:
    return [name for name in files(bench.store) if ".partial-" in name]


def test_stopped_in_every_stage(bench: Bench, finished: Bench) -> None:
    """One run, stopped politely in each of its stages and begun again each time, against one that nobody disturbed."""
    signals = [signal.SIGINT, signal.SIGTERM]
    for turn, place in enumerate(PLACES):
        done = stopped(bench, "run", place, signals[turn % 2])
        politely(done)
        assert leftovers(bench) == [], place
    told = bench.run("run").json
    assert told["train"]["resumed_from"] == 12, "training was done before the last interruptions"
    assert outcome(bench) == outcome(finished)


def test_a_stop_in_training_keeps_the_last_step(bench: Bench, finished: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")
    done = stopped(bench, "train", "train", signal.SIGTERM)
    politely(done)
    assert "SIGTERM: stopping after this step, with a checkpoint. Once more to stop at once." in done.err
    assert "Stopped after step 3, which is kept." in done.err
    assert bench.plan()["checkpoints"] == "partial"
    told = bench.run("run").json
    assert told["train"]["resumed_from"] == 3
    assert outcome(bench) == outcome(finished)


def test_a_second_signal_does_not_wait(bench: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")
    reached, again = bench.folder / "reached", bench.folder / "again"
    process = bench.start("train", hook=wait_twice, given=(str(reached), str(again)))
    process.await_file(reached)
    process.signal(signal.SIGINT)
    process.await_file(again)
    process.signal(signal.SIGINT)
    politely(process.wait(30))
    assert not list(bench.store.glob("runs/first/checkpoints/step-00000003/MANIFEST.json"))
    assert bench.run("train").json["resumed_from"] is None


def wait_twice(reached: str, again: str) -> None:
    """Sleeps on through the first signal, as a long step does."""
    from distft.engine.local import LocalEngine

    real, seen = LocalEngine.train_step, 0

    def waiting(self: LocalEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 3:
            Path(reached).touch()
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                if _stopping():
                    Path(again).touch()
                time.sleep(0.02)
        return real(self, *args, **kwargs)

    LocalEngine.train_step = waiting  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("places", [("train", "checkpoint"), ("tokenize", "score, behind the data", "export", "evaluate")])
def test_killed(bench: Bench, finished: Bench, places: tuple[str, ...]) -> None:
    for place in places:
        done = stopped(bench, "run", place, signal.SIGKILL)
        assert done.status == -signal.SIGKILL
        assert done.out == ""
    told = bench.run("run").json
    assert told["train"]["resumed_from"] == (5 if "checkpoint" in places else 12)
    assert outcome(bench) == outcome(finished)


def test_killed_on_s3(bench: Bench, finished: Bench, s3_url: str) -> None:
    """The same on an object store, where nothing can be renamed and nothing is swept."""
    bench.write(bench.config() | {"store": s3_url})
    for place in ("score", "checkpoint"):
        assert stopped(bench, "run", place, signal.SIGKILL).status == -signal.SIGKILL
    politely(stopped(bench, "run", "train", signal.SIGINT))
    told = bench.run("run").json
    assert told["train"]["loss"] == finished.run("train").json["loss"]
    assert told["evaluate"]["drift"] == finished.run("evaluate").json["drift"]
