"""The demo: a real model, a task it cannot do, and the same training with and without a teacher to hold on to.

Everything goes by the same road as a user's own run: two run files, written beside the data, each through the whole pipeline. Both
arms see the same documents in the same order at the same rates. What is measured is the task, and the drift on the model's own answers
to general questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distft.config.load import dump, validate
from distft.config.schema import Run
from distft.demo.data import write_own_answers, write_task
from distft.demo.model import smollm2_folder
from distft.demo.prompts import HELD_OUT
from distft.pipeline import Pipeline
from distft.progress import say
from distft.report.page import comparison_rows, write_report
from distft.store.local import explained
from distft.store.location import open_location

ARMS: dict[str, dict[str, Any]] = {"sft-kl": {"kind": "sft_kl", "kl": 0.5}, "sft": {"kind": "sft"}}
EXAMPLES, TESTS = 320, 64


def run_demo(folder: Path) -> dict[str, Any]:
    """Does whatever of the demo is not done yet in `folder`; the same call goes on after an interruption."""
    folder = folder.absolute()
    model, data = smollm2_folder(folder / "model"), folder / "data"
    write_task(data, train=EXAMPLES, test=TESTS)
    write_own_answers(data / "heldout.jsonl", model, HELD_OUT)
    results: dict[str, Any] = {}
    for name, objective in ARMS.items():
        path = folder / f"{name}.yaml"
        run = run_file(folder, name, objective, model=model, data=data)
        with explained("write", path):
            path.write_text(dump(run), encoding="utf-8")
        say(f"\n{name}: distft run {path}")
        results[name] = Pipeline(run).run_all()
    store = open_location(str(folder / "store"))
    page = write_report(store, list(ARMS), page=store, title="distft demo")
    return {"page": page, "runs": results, "comparison": comparison_rows(store, list(ARMS))}


def run_file(folder: Path, name: str, objective: dict[str, Any], *, model: Path, data: Path) -> Run:
    """One arm; only the objective differs."""
    document = {
        "name": name,
        "store": str(folder / "store"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": {"path": str(data / "train.jsonl")}, "heldout": {"path": str(data / "heldout.jsonl")}, "max_tokens": 256},
        "score": {"tokens_per_batch": 2048},
        "objective": objective,
        "train": {
            "epochs": 1, "tokens_per_step": 256, "micro_batch_tokens": 512, "lr": 5e-5, "warmup_steps": 4, "drift_every_steps": 20,
            "checkpoint": {"every_steps": 20, "keep": 1},
        },
        "evaluate": {
            "tasks": [
                {"kind": "generate", "name": "last-word", "path": str(data / "test.jsonl"), "max_new_tokens": 12},
                {"kind": "nll", "name": "last-word-nll", "source": {"path": str(data / "test-chats.jsonl")}},
            ],
            "tokens_per_batch": 2048,
        },
    }  # fmt: skip
    return validate(document, where=f"the demo's {name}")
