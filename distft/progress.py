"""Progress that a person can read: bars where stderr is a terminal, with a panel of figures below that of training (`distft.panel`),
and a plain line now and then where it is not.

One call, `track`, serves every stage. Nothing here writes to stdout, which belongs to `--json`. A process whose stderr nobody reads (a
rank that Ray started) speaks through a `Voice` that carries all of it to one that is heard.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from distft import ranks

PLAIN_EVERY_SECONDS = 10.0
WAITING_SECONDS = 2.0


Figures = Mapping[str, float]


class Meter(Protocol):
    """Counts work that is done."""

    def advance(self, amount: float = 1.0, note: str = "", figures: Figures | None = None) -> None:
        """`figures` are for whoever can show more than a note: a training step's line of metrics."""
        ...


class Voice(Protocol):
    """Where all that is said here is heard."""

    def say(self, text: str) -> None: ...

    def track(self, label: str, total: float | None, unit: str, done: float) -> AbstractContextManager[Meter]: ...


_voices: list[Voice] = []
"""None, or one."""


def speak_through(voice: Voice) -> None:
    """From now on, for this process."""
    _voices[:] = [voice]


def say(text: str) -> None:
    """A line for a person, from the leading rank alone."""
    if ranks.rank() != 0:
        return
    if _voices:
        _voices[0].say(text)  # where it is heard there is one voice alone, and no rank needs naming
    else:
        complain(text)


def complain(text: str) -> None:
    """A line that must be seen whichever rank it comes from."""
    told = f"[rank {ranks.rank()}] {text}" if ranks.size() > 1 else text
    if _voices:
        _voices[0].say(told)
        return
    sys.stderr.write(f"{told}\n")
    sys.stderr.flush()


@contextmanager
def track(label: str, total: float | None, unit: str, *, done: float = 0.0) -> Iterator[Meter]:
    """Shows how far `label` is, with its rate and the time left. `done` is what an earlier, interrupted run left behind: it
    counts towards the total and not towards the rate."""
    if _voices and ranks.rank() == 0:
        with _voices[0].track(label, total, unit, done) as meter:
            yield meter
    elif sys.stderr.isatty() and ranks.rank() == 0:
        with _bar(label, total, unit, done) as meter:
            yield meter
    else:
        meter = _PlainMeter(label, total, unit, done)
        yield meter
        meter.finish()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what is going on while nothing can be counted: a turning sign on a terminal, a line elsewhere once it takes a while."""
    if sys.stderr.isatty() and ranks.rank() == 0 and not _voices:
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield
        return
    line = threading.Timer(WAITING_SECONDS, say, (f"{what} ...",))
    line.daemon = True
    line.start()
    try:
        yield
    finally:
        line.cancel()


class _PlainMeter:
    def __init__(self, label: str, total: float | None, unit: str, done: float) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.before, self.done, self.note = done, done, ""
        self.start = self.said = time.monotonic()

    def advance(self, amount: float = 1.0, note: str = "", figures: Figures | None = None) -> None:
        self.done += amount
        self.note = note or self.note
        if time.monotonic() - self.said >= PLAIN_EVERY_SECONDS:
            self._say(ended=False)

    def finish(self) -> None:
        self._say(ended=True)

    def _say(self, *, ended: bool) -> None:
        now = time.monotonic()
        self.said = now
        rate = (self.done - self.before) / max(now - self.start, 1e-9)
        of_total = "" if self.total is None else f" of {self.total:,.0f}"
        parts = [f"{self.label}: {self.done:,.0f}{of_total} {self.unit}", _rate(rate, self.unit)]
        if ended:
            parts.append(f"took {_clock(now - self.start)}")
        elif self.total is not None and rate > 0:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        say("  ".join([*parts, self.note] if self.note else parts))


@contextmanager
def _bar(label: str, total: float | None, unit: str, done: float) -> Iterator[Meter]:
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.text import Text

    from distft.panel import Panel

    class Numbers(ProgressColumn):
        def render(self, task: Task) -> Text:
            of_total = "" if task.total is None else f"/{task.total:,.0f}"
            spent = task.finished_time or task.elapsed or 0.0
            rate = (task.completed - done) / spent if spent > 0 else 0.0
            if task.finished or task.total is None or rate <= 0:
                clock = f"took {_clock(spent)}" if task.finished else _clock(spent)
            else:
                clock = f"{_clock((task.total - task.completed) / rate)} left"
            return Text(f"{task.completed:,.0f}{of_total} {unit}  {_rate(rate, unit)}  {clock}", style="cyan")

    class Shown(Progress):
        """The bar, and below it the panel of a run that has told figures."""

        panel: Panel | None = None

        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            if self.panel is not None:
                yield self.panel

    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description:<22}"), BarColumn(bar_width=24), Numbers(),
               TextColumn("{task.fields[note]}", style="dim"))  # fmt: skip
    with Shown(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        task_id = progress.add_task(label, total=total, completed=int(done), note="")

        class Bar:
            def advance(self, amount: float = 1.0, note: str = "", figures: Figures | None = None) -> None:
                progress.advance(task_id, amount)
                if figures is not None:
                    progress.panel = progress.panel or Panel(label)
                    progress.panel.take(figures)
                elif note:  # the panel says more
                    progress.update(task_id, note=note)

        yield Bar()
        if total is None:
            progress.update(task_id, total=progress.tasks[0].completed)


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
