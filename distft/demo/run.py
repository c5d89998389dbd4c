"""The demo: a real model, a task it cannot do, and the same training with and without a teacher to hold on to.

Everything goes by the same road as a user's own run: two run files, written beside the data, each through the whole pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distft.config.load import dump, validate
from distft.config.schema import Run
from distft.demo.data import GENERAL_PROMPTS, write_heldout, write_task
from distft.demo.model import smollm2_folder
from distft.pipeline import Pipeline
from distft.progress import say
from distft.report.page import comparison_rows, comparison_table, write_report
from distft.store.location import open_location

ARMS: dict[str, dict[str, Any]] = {"sft-kl": {"kind": "sft_kl", "kl": 1.0}, "sft": {"kind": "sft"}}


def run_demo(folder: Path) -> dict[str, Any]:
    """Does whatever of the demo is not done yet in `folder`; the same call goes on after an interruption."""
    folder = folder.absolute()
    model = smollm2_folder(folder / "model")
    train, task = write_task(folder / "data")
    heldout = write_heldout(folder / "data", model, GENERAL_PROMPTS)
    results, runs = {}, []
    for name, objective in ARMS.items():
        run = run_file(folder, name, objective, model=model, train=train, task=task, heldout=heldout)
        path = folder / f"{name}.yaml"
        path.write_text(dump(run), encoding="utf-8")
        say(f"\n{name}: distft run {path}")
        results[name] = Pipeline(run).run_all()
        runs.append(run.name)
    store = open_location(str(folder / "store"))
    page = write_report(store, runs, page=store, title="distft demo")
    return {"page": page, "runs": results, "table": f"\n{comparison_table(comparison_rows(store, runs))}\n\n{page}"}


def run_file(folder: Path, name: str, objective: dict[str, Any], *, model: Path, train: Path, task: Path, heldout: Path) -> Run:
    """One arm: the same data, order, steps and rate; only the objective differs."""
    document = {
        "name": name,
        "store": str(folder / "store"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": {"path": str(train)}, "heldout": {"path": str(heldout)}, "max_tokens": 512},
        "objective": objective,
        "train": {
            "epochs": 1, "tokens_per_step": 768, "micro_batch_tokens": 1024, "lr": 5e-5, "warmup_steps": 4, "drift_every_steps": 20,
            "checkpoint": {"every_steps": 20, "keep": 1},
        },
        "evaluate": {"tasks": [{"name": "task", "path": str(task), "max_new_tokens": 16}]},
    }  # fmt: skip
    return validate(document, where=f"the demo's {name}")
