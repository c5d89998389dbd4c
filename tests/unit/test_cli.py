"""The command line's promises: exit statuses, two voices, and quick answers where nothing is to be computed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distft.errors import CorruptArtifactError, DataError, DistftError, StoreError, TrainingError
from distft.pipeline import Pipeline
from distft.stopping import Interrupted
from tests.helpers.runs import Bench, Done, distft

RUN_VERBS = ("plan", "tokenize", "score", "train", "export", "evaluate", "report", "run")
VERBS = (*RUN_VERBS, "cache", "checkpoint", "demo")
CACHE_VERBS = ("list", "show", "verify", "prune")
CHECKPOINT_VERBS = ("export", "import")
HEAVY = {"torch", "ray", "deepspeed", "transformers", "accelerate", "datasets", "pyarrow.parquet", "matplotlib"}

# Runs the console script's function, and tells at the end what it has loaded.
SPY = """
import atexit, json, sys
told = open(sys.argv.pop(), "w")
atexit.register(lambda: json.dump(sorted(sys.modules), told))
from distft.cli import main
sys.argv[0] = "distft"
main()
"""


def spied(tmp_path: Path, *arguments: str) -> tuple[Done, set[str]]:
    """A command in a process of its own, and the modules that it had loaded when it ended."""
    told = tmp_path / "modules.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DISTFT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SPY, *arguments, str(told)], capture_output=True, text=True, env=environment, timeout=300
    )
    return Done(done.returncode, done.stdout, done.stderr), set(json.loads(told.read_text()))


@pytest.mark.parametrize(
    "arguments", [
        ("--help",), *((verb, "--help") for verb in VERBS), *(("cache", verb, "--help") for verb in CACHE_VERBS),
        *(("checkpoint", verb, "--help") for verb in CHECKPOINT_VERBS), ("--version",),
    ], ids=" ".join,
)  # fmt: skip
def test_help_loads_nothing_heavy(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done, loaded = spied(tmp_path, *arguments)
    assert (done.status, done.err) == (0, "")
    assert done.out.strip()
    assert loaded & HEAVY == set()
    assert "distft.cli" in loaded, "the spy is blind"


def test_caches_are_listed_and_pruned_without_torch(tmp_path: Path, finished: Bench) -> None:
    for verb in ("list", "prune"):
        done, loaded = spied(tmp_path, "cache", verb, "--store", str(finished.store), "--json")
        assert done.status == 0, done.err
        assert len(done.json["caches"]) == 1
        assert loaded & HEAVY == set()


def test_help_names_every_verb_and_the_exit_statuses() -> None:
    done = distft("--help")
    assert all(f" {verb} " in done.out for verb in VERBS)
    assert "Exit status" in done.out


@pytest.mark.parametrize("verb", RUN_VERBS)
def test_a_bad_run_file_is_answered_at_once(tmp_path: Path, verb: str) -> None:
    (tmp_path / "run.yaml").write_text("name: a\nmodel: {path: m}\ndata: {train: {path: t}}\ntrain: {lr: 0}\n")
    done, loaded = spied(tmp_path, verb, str(tmp_path / "run.yaml"), "--json")
    assert done.status == 2
    assert done.json.keys() == {"error", "where", "help"}
    assert "train.lr: 0" in done.err
    assert "Traceback" not in done.err
    assert loaded & HEAVY == set()


def test_a_plan_needs_no_torch(tmp_path: Path, finished: Bench) -> None:
    done, loaded = spied(tmp_path, "plan", str(finished.file), "--json")
    assert done.status == 0, done.err
    assert {status["state"] for status in done.json["artifacts"]} == {"have"}
    assert loaded & HEAVY == set()


def test_the_exit_status_of_a_process_that_misses_an_artifact(tmp_path: Path, bench: Bench) -> None:
    """Statuses 0 and 2 are above, 1 is in tests/faults/test_interrupt.py, each from a process of its own."""
    done, _ = spied(tmp_path, "report", str(bench.file), "--json")
    assert done.status == 3
    assert "distft train" in done.json["help"]


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["plan", "a.yaml", "--nonsense"], ["train", "absent.yaml"]])
def test_wrong_usage_is_the_users_input(arguments: list[str]) -> None:
    done = distft(*arguments)
    assert done.status == 2
    assert done.out == ""
    assert done.err


def test_no_arguments_shows_help() -> None:
    done = distft()
    assert "Usage" in done.out + done.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("bad row", where="t.jsonl, row 3", help="Correct it."), 2),
        (StoreError("no space", where="/store", help="Make room."), 2),
        (CorruptArtifactError("other bytes", where="/store/corpus/x", help="Restore it."), 3),
        (TrainingError("not finite", where="step 3", help="Lower train.lr."), 1),
        (DistftError("something else"), 1),
    ],
)
def test_an_error_is_told_in_both_voices(bench: Bench, monkeypatch: pytest.MonkeyPatch, error: DistftError, status: int) -> None:
    def fail(self: Pipeline) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "tokenize", fail)
    done = distft("tokenize", str(bench.file), "--json")
    assert done.status == status
    assert done.json == {"error": error.problem, "where": error.where, "help": error.help}
    assert done.err == f"error: {error}\n"
    silent = distft("tokenize", str(bench.file))
    assert (silent.status, silent.out, silent.err) == (status, "", done.err)


def test_a_bug_keeps_its_traceback(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Pipeline) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Pipeline, "tokenize", fail)
    done = distft("tokenize", str(bench.file), "--json")
    assert done.status == 1
    assert done.json["error"] == "ZeroDivisionError: oh"
    assert "Traceback" in done.err


def test_an_interruption_is_told_in_both_voices(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Pipeline) -> None:
        raise Interrupted("Stopped after step 3, which is kept.")

    monkeypatch.setattr(Pipeline, "train", stop)
    done = distft("train", str(bench.file), "--json")
    assert done.status == 1
    assert done.json["error"] == "interrupted"
    assert "Stopped after step 3, which is kept. The same command goes on" in done.err
    assert "Traceback" not in done.err


def test_results_are_json_whatever_they_hold(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is no JSON: a program that reads the object must never meet one."""

    def result(self: Pipeline) -> dict[str, object]:
        return {"loss": float("nan"), "text": "é\n\u2028", "none": None}

    monkeypatch.setattr(Pipeline, "train", result)
    done = distft("train", str(bench.file), "--json")
    assert json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["none"] is None


@pytest.mark.parametrize(
    "store", ["s3://user:hunter2@bucket/x", "s3://bucket:hunter2/x", "s3://bucket/x?key=hunter2", "ftp://u:hunter2@h/x"]
)
@pytest.mark.parametrize("verb", ["plan", "tokenize", "train", "report"])
def test_a_secret_in_the_store_is_refused_and_not_repeated(bench: Bench, store: str, verb: str) -> None:
    before = sorted(path.name for path in bench.folder.iterdir())
    for overrides in ((f"store={store}",), ()):
        if not overrides:
            bench.write(bench.config() | {"store": store})
        done = bench.run(verb, *overrides, status=2)
        assert "hunter2" not in done.out + done.err
        assert done.json["help"]
    assert sorted(path.name for path in bench.folder.iterdir()) == before


def test_every_command_that_a_message_names_exists() -> None:
    """A help that sends people to a command that is not there is worse than none."""
    package = Path(__file__).parents[2] / "distft"
    named = {
        (verb, str(path.relative_to(package)))
        for path in package.rglob("*.py")
        for verb in re.findall(r"`distft ([a-z]+)", path.read_text())
    }
    assert len(named) > 10
    assert [one for one in sorted(named) if one[0] not in VERBS] == []
