"""Training reads what the teacher said, and holds nothing of the teacher itself."""

from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

from distft.store.digest import YOUNG_SECONDS
from tests.helpers.models import tiny_model_folder
from tests.helpers.opened import held, listen
from tests.helpers.runs import Bench

WIDTH = 176
"""The teacher's, which no tensor of the student has."""

SETTINGS = {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}
"""Text of some kilobytes, by which training knows whose cache it is to read. Weights and vocabulary are known by digests of before."""


def watch(report: str, teacher: str, cache: str) -> None:
    """Writes at each step what was opened of the teacher and of its cache, and which tensors as wide as the teacher live."""
    import torch

    from distft.engine.step import Stepper

    def theirs(path: str) -> bool:
        return path.startswith((teacher, cache))

    opened, seen, wide, plain = listen(theirs), set[str](), set[str](), Stepper.train_step

    def look() -> None:
        while True:
            seen.update(held(theirs))
            time.sleep(0.002)

    def step(self: Any, *args: Any, **named: Any) -> Any:
        done = plain(self, *args, **named)
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
        wide.update(str(tuple(one.shape)) for one in tensors if WIDTH in one.shape)
        told = {"opened": sorted({*opened, *seen}), "wide": sorted(wide), "tensors": len(tensors)}
        Path(report).write_text(json.dumps(told))
        return done

    threading.Thread(target=look, daemon=True).start()
    Stepper.train_step = step


def test_training_opens_no_weights_of_the_teacher_and_holds_no_tensor_of_it(bench: Bench) -> None:
    teacher = tiny_model_folder(bench.folder / "teacher", seed=7, hidden=WIDTH, vocabulary=300, initializer_range=0.1)
    settings = f"teacher.path={teacher}"
    time.sleep(YOUNG_SECONDS)  # only then are digests of files that were just written remembered
    bench.run("tokenize", settings)
    bench.run("score", settings)
    report = bench.folder / "report.json"
    done = bench.start("train", settings, hook=watch, given=(str(report), str(teacher), str(bench.store / "teacher"))).wait()
    assert done.status == 0, done.err
    told = json.loads(report.read_text())
    ours = [path for path in told["opened"] if path.startswith(str(bench.store))]
    theirs = {Path(path).name for path in told["opened"] if path not in ours}
    assert theirs <= SETTINGS, "nothing of the teacher but what says which cache is its own"
    assert [path for path in ours if path.endswith(".arrow")], "the cache is what it reads"
    assert told["wide"] == []
    assert told["tensors"] > 50, "the student's were seen"
