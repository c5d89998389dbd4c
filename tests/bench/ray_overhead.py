"""What Ray costs above the scoring itself: the same units by two actors and in one process.

    python -m pytest -m bench -s tests/bench/ray_overhead.py

CPU seconds of all processes (the driver, its actors, Ray's own), by turns, when all are warm; and tokens per second of both, which
depend on what else the machine does. Starting Ray and the actors is told apart.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distft.cluster.pool import open_pool
from distft.store.model_folder import resolve_model
from distft.teacher.build import in_process, units_of
from distft.teacher.identity import teacher_folder
from distft.teacher.scorer import ScorerPlan, Unit
from tests.helpers.actors import descendants
from tests.helpers.models import tiny_model_folder
from tests.helpers.stores import lab, random_documents

ROUNDS = 3
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Reads:
    """Scores without committing, so that the same units can be scored again; otherwise as a scorer."""

    plan: ScorerPlan

    def __call__(self) -> Callable[[Unit], Generator[float, None, int]]:
        scorer = self.plan()

        def work(unit: Unit) -> Generator[float, None, int]:
            return (yield from scorer.read([scorer.corpus.document(*place) for place in unit.places])).scored_tokens

        return work


def cpu_seconds() -> float:
    """Of this process and all below it that are alive."""
    spent = 0
    for pid in {os.getpid(), *descendants(os.getpid())}:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        spent += int(fields[11]) + int(fields[12])
    return spent / TICKS


def measured(work: Callable[[], Iterator[Any]]) -> tuple[float, float]:
    cpu, wall = cpu_seconds(), time.perf_counter()
    total = sum(work())
    assert total > 0
    return cpu_seconds() - cpu, time.perf_counter() - wall


@pytest.mark.bench
def test_what_ray_costs_above_scoring(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_model_folder(tmp_path / "model", vocabulary=280, hidden=192, layers=4)
    documents = random_documents(1_650, shortest=60, longest=180)
    made = lab(tmp_path, documents=documents, model=resolve_model(str(model), None), score={"tokens_per_batch": 2048})
    wanted = {digest: ("train", row) for row, digest in enumerate(made.corpus.digests("train"))}
    units, tokens = units_of(made.corpus, wanted, set(wanted)), sum(len(d) for d in documents)
    make = Reads(ScorerPlan(run=made.run, model=made.model, folder=teacher_folder(made.store, made.identity()),
                            corpus=made.corpus.folder, opened=made.corpus))  # fmt: skip
    scorer = make()
    start = time.perf_counter()
    with open_pool(make, workers=2) as pool:
        list(pool.map(units[:4]))
        print(f"\nRay, two actors and their first units: {time.perf_counter() - start:.1f} s")
        alone, actors = [], []
        for turn in range(ROUNDS):
            ways: dict[str, tuple[list[tuple[float, float]], Callable[[], Iterator[Any]]]] = {
                "alone": (alone, lambda: in_process(lambda: scorer, units, lambda *_: None)),  # pyright: ignore
                "actors": (actors, lambda: pool.map(units)),
            }
            for name in ("alone", "actors") if turn % 2 else ("actors", "alone"):
                found, way = ways[name]
                found.append(measured(way))
    ratios = [with_ray[0] / plain[0] for plain, with_ray in zip(alone, actors, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{len(units)} units, {tokens:,} tokens, {ROUNDS} rounds on {os.cpu_count()} cores, medians")
    for name, found in (("one process", alone), ("two actors", actors)):
        cpu, wall = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:<12} {cpu:6.2f} CPU seconds, {tokens / wall:10,.0f} tokens/s")
    print(f"CPU of two actors and Ray / one process: {middle:.3f} [{low:.3f}, {high:.3f}]")
