"""Workers for tests of the pool, cheap to start, and processes that are watched until they are gone.

python -m tests.helpers.actors FOLDER      maps slow units on an embedded Ray until a signal comes; says in FOLDER what it runs
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.errors import CorruptArtifactError


@dataclass(frozen=True)
class Task:
    """Steps of work, and what happens behind the first: nothing, `die`, `die once`, `raise`, `bug`."""

    name: str
    steps: int = 2
    fate: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Answer:
    name: str
    pid: int
    nth: int
    """Which unit of its worker."""
    threads: str


@dataclass(frozen=True)
class MakeToy:
    """Notes each worker that is made and each unit that is begun as a file of its folder."""

    folder: Path
    fate: str = ""
    """What happens when a worker is made."""

    def __call__(self) -> Callable[[Task], Generator[float, None, Answer]]:
        note(self.folder, "made")
        suffer(self.fate, self.folder)
        done = 0

        def work(task: Task) -> Generator[float, None, Answer]:
            nonlocal done
            done += 1
            note(self.folder, task.name)
            for step in range(task.steps):
                time.sleep(task.seconds)
                yield 1.0
                if step == 0:
                    suffer(task.fate, self.folder)
            return Answer(task.name, os.getpid(), done, os.environ.get("OMP_NUM_THREADS", ""))

        return work


def suffer(fate: str, folder: Path) -> None:
    if fate == "raise":
        raise CorruptArtifactError("a unit that is broken", where="here", help="Mend it.")
    if fate == "bug":
        raise KeyError("a mistake of ours")
    if fate == "die" or (fate == "die once" and first(folder / "died")):
        time.sleep(0.2)  # what was said before arrives
        os.kill(os.getpid(), signal.SIGKILL)


def first(path: Path) -> bool:
    """Whether nobody was here before, in any process."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def note(folder: Path, what: str) -> None:
    (folder / f"{what}.{os.getpid()}.{time.monotonic_ns()}").touch()


def noted(folder: Path, what: str) -> int:
    return len(list(folder.glob(f"{what}.*")))


@dataclass(frozen=True)
class DiesOnce:
    """A maker of workers, the first of which is killed behind the first step of its second unit."""

    make: Callable[[], Any]
    folder: Path

    def __call__(self) -> Callable[[Any], Generator[float, None, Any]]:
        worker, units = self.make(), 0

        def work(unit: Any) -> Generator[float, None, Any]:
            nonlocal units
            units += 1
            steps = worker(unit)
            yield next(steps)
            if units == 2:
                suffer("die once", self.folder)
            return (yield from steps)

        return work


def descendants(pid: int) -> set[int]:
    """Processes below this one, at any depth."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
    found, grown = {pid}, True
    while grown:
        below = {child for child, parent in parents.items() if parent in found} - found
        found |= below
        grown = bool(below)
    return found - {pid}


def actors_of(pid: int) -> list[int]:
    """The pool's actors below a driver, in the order in which they were started; Ray gives their processes this title."""
    return [child for child in sorted(descendants(pid)) if title(child).startswith(b"ray::_Actor")]


def title(pid: int) -> bytes:
    """A process's command line; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def shoot(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_end(pids: set[int], seconds: float = 20.0) -> set[int]:
    """Those that are still there after so long."""
    until = time.monotonic() + seconds
    while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def main(folder: Path) -> None:
    from distft import stopping
    from distft.cluster.pool import map_units

    stopping.install()
    results = map_units(MakeToy(folder), [Task(f"u{i}", seconds=0.2) for i in range(500)], lambda amount, note: None, workers=2)
    try:
        for number, _ in enumerate(results):
            if number == 2:
                (folder / "pids.partial").write_text(" ".join(map(str, descendants(os.getpid()))))
                (folder / "pids.partial").rename(folder / "pids")
    except KeyboardInterrupt:
        results.close()
        sys.stderr.write("stopped\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
