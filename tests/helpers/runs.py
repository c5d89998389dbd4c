"""Tiny runs for tests: a model, data and a run file in one folder, and the command line, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.models import tiny_model_folder

Hook = Callable[..., None]


@dataclass(frozen=True)
class Done:
    """A command line that ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object that --json prints."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"stdout is not one line: {self.out!r}\n{self.err}"
        return json.loads(lines[0])


@dataclass(frozen=True)
class Bench:
    """A folder with everything that a run needs."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def config(self) -> dict[str, Any]:
        return yaml.safe_load(self.file.read_text())

    def write(self, config: dict[str, Any]) -> None:
        self.file.write_text(yaml.safe_dump(config, sort_keys=False))

    def rows(self, name: str = "train") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def write_rows(self, rows: list[dict[str, Any]], name: str = "train") -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, verb: str, *overrides: str, status: int = 0) -> Done:
        """`distft VERB run.yaml ... --json` in this process; it must end with `status`."""
        done = distft(verb, str(self.file), *overrides, "--json")
        assert done.status == status, f"exit status {done.status}, not {status}\n{done.err}\n{done.out}"
        return done

    def refused(self, verb: str, *overrides: str, status: int, says: str) -> Done:
        """The same for a command that must fail: readably, in both voices, and with no traceback."""
        done = self.run(verb, *overrides, status=status)
        assert done.json.keys() == {"error", "where", "help"}
        assert "Traceback" not in done.err
        told = " ".join(done.json.values())
        assert says in told, told
        assert done.json["error"]
        assert done.json["help"]
        assert all(part in done.err for part in done.json.values())
        return done

    def plan(self, *overrides: str) -> dict[str, str]:
        """The state of each artifact."""
        return {status["artifact"]: status["state"] for status in self.run("plan", *overrides).json["artifacts"]}

    def start(self, verb: str, *overrides: str, hook: Hook | None = None, given: tuple[Any, ...] = ()) -> Running:
        """The same command in a process of its own, in which `hook(*given)` is called before it begins."""
        return Running(self.folder, [verb, str(self.file), *overrides, "--json"], hook, given)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What would show that a folder was touched: each file's size and inode."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_ino) for path in found}


def distft(*arguments: str) -> Done:
    """The command line in this process. Its signal handlers are taken off again."""
    from distft import cli

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err, status, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = ["distft", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
            except Exception:  # a bug, which ends a process with a traceback and 1; a caller looks at both
                traceback.print_exc()
                status = 1
    finally:
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
    return Done(status, out.getvalue(), err.getvalue())


_server = multiprocessing.get_context("forkserver")
# Imported once, in a process without threads that forks the others: a command starts in a moment instead of in ten seconds.
_server.set_forkserver_preload([
    "distft.pipeline", "distft.teacher.build", "distft.train.stage", "distft.export.stage", "distft.evaluate.stage",
    "distft.report.page", "transformers.models.llama.modeling_llama", "tests.helpers.runs",
])  # fmt: skip


class Running:
    """A command in its own process."""

    def __init__(self, folder: Path, arguments: list[str], hook: Hook | None, given: tuple[Any, ...]) -> None:
        stem = f"process-{time.monotonic_ns()}"
        self.out, self.err = folder / f"{stem}.out", folder / f"{stem}.err"
        inherited = {key: value for key, value in os.environ.items() if key.startswith(("AWS_", "DISTFT_", "HF_"))}
        self.process: ForkServerProcess = _server.Process(
            target=_child, args=(arguments, str(self.out), str(self.err), inherited, hook, given)
        )
        self.process.start()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None, "the process has started"
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 120) -> Done:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the command did not end\n{self.err.read_text()}")
        return Done(self.process.exitcode, self.out.read_text(), self.err.read_text())

    def await_file(self, path: Path, seconds: float = 120) -> None:
        """Waits until the process has made a file."""
        until = time.monotonic() + seconds
        while not path.exists():
            if self.process.exitcode is not None or time.monotonic() > until:
                self.process.kill()
                raise AssertionError(f"{path.name} did not come\n{self.err.read_text()}")
            time.sleep(0.01)


def _child(
    arguments: list[str], out: str, err: str, environment: dict[str, str], hook: Hook | None, given: tuple[Any, ...]
) -> None:
    import torch

    for target, descriptor in ((out, 1), (err, 2)):
        opened = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, descriptor)
    for key in [key for key in os.environ if key.startswith(("AWS_", "DISTFT_", "HF_"))]:
        del os.environ[key]
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hook is not None:
        hook(*given)
    from distft import cli

    sys.argv = ["distft", *arguments]
    cli.main()


def make_bench(folder: Path) -> Bench:
    """Sums to learn, others to hold: 24 documents in 12 steps, some of them twice."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model_folder(folder / "model", hidden=32, vocabulary=300, initializer_range=0.1)
    bench, source = Bench(folder), random.Random(0)

    def row() -> dict[str, Any]:
        a, b = source.randint(0, 20), source.randint(0, 20)
        said = [("user", f"What is {a} and {b}?"), ("assistant", f"The answer is {a + b}.")]
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    bench.write_rows([row() for _ in range(24)])
    bench.write_rows([row() for _ in range(6)], "heldout")
    bench.write_rows([{"prompt": "What is 2 and 3?", "answer": 5}, {"prompt": "What is 1 and 1?", "answer": "2"}], "task")
    write_config(bench)
    return bench


def write_config(bench: Bench) -> None:
    """The run file of `make_bench`, with the places of this folder."""
    at = bench.folder
    bench.write({
        "name": "first", "store": str(at / "store"), "model": {"path": str(at / "model"), "dtype": "float32"},
        "data": {"train": {"path": str(at / "train.jsonl")}, "heldout": {"path": str(at / "heldout.jsonl")}, "max_tokens": 128},
        "objective": {"kind": "sft_kl", "kl": 0.5},
        "train": {"epochs": 2, "tokens_per_step": 160, "micro_batch_tokens": 96, "lr": 1e-3, "warmup_steps": 3,
                  "drift_every_steps": 5, "checkpoint": {"every_steps": 5}},
        "evaluate": {"tasks": [
            {"kind": "generate", "name": "sums", "path": str(at / "task.jsonl"), "judge": {"kind": "number"}, "max_new_tokens": 4},
            {"kind": "nll", "name": "held", "source": {"path": str(at / "heldout.jsonl")}},
        ]},
    })  # fmt: skip


def copy_bench(source: Bench, folder: Path) -> Bench:
    """A bench that a test may change, elsewhere; its store comes along."""
    shutil.copytree(source.folder, folder, symlinks=True)
    bench = Bench(folder)
    write_config(bench)
    return bench


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what distft remembers of files comes in or goes out; one thread does the work."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("pristine") / "bench")


@pytest.fixture(scope="session")
def _finished(_pristine: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    import torch

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE_DIR", str(folder / "cache"))
        torch.set_num_threads(1)
        bench = copy_bench(_pristine, folder / "bench")
        bench.run("run")
    return bench


@pytest.fixture
def bench(_pristine: Bench, tmp_path: Path, own_cache: None) -> Bench:
    """A bench with an empty store."""
    return copy_bench(_pristine, tmp_path / "bench")


@pytest.fixture
def finished(_finished: Bench, tmp_path: Path, own_cache: None) -> Bench:
    """A bench whose run is done."""
    return copy_bench(_finished, tmp_path / "finished")
