"""`distft train` as a person starts it, in processes of its own: alone, by torchrun, or by Ray."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.actors import descendants, shoot
from tests.helpers.runs import Bench, Done


def torchrun(bench: Bench, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    """Under torch's launcher."""
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return _command([*by, "-m", "distft", "train", str(bench.file), *overrides, "--json"])


def plain(bench: Bench, *overrides: str) -> subprocess.Popen[str]:
    """The command; with train.workers=N it starts N ranks by Ray."""
    return _command(["-m", "distft", "train", str(bench.file), *overrides, "--json"])


def _command(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 200) -> Done:
    """Waits for its end, which is a good one."""
    done = end(process, seconds)
    assert done.status == 0, done.err
    return done


def end(process: subprocess.Popen[str], seconds: float = 200) -> Done:
    """Waits for its end, whatever it is; nothing that it started is left."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        kill(process)
    return Done(process.returncode, out, err)


def kill(process: subprocess.Popen[str]) -> None:
    """With all that it has started: each is in a session of its own, or dies when the launcher is gone."""
    shoot(descendants(process.pid))
    if process.poll() is None:
        process.kill()
        process.communicate()
