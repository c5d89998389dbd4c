"""The run files that are shipped work, and the one that promises to be complete is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distft.config.check import check_run
from distft.config.load import load_config
from distft.config.schema import GenerateTask, NllTask, Run
from tests.helpers.runs import Bench

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def test_there_are_some() -> None:
    assert {"laptop.yaml", "one_gpu.yaml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_is_a_valid_run(path: Path) -> None:
    check_run(load_config(path), where=str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_plans_on_a_model(path: Path, bench: Bench) -> None:
    config, own = yaml.safe_load(path.read_text()), bench.config()
    config |= {"model": config["model"] | {"path": str(bench.model)}, "store": own["store"]}
    for split in config["data"].keys() & own["data"].keys() - {"max_tokens"}:
        config["data"][split]["path"] = own["data"][split]["path"]
    for task in config["evaluate"]["tasks"]:
        if task["kind"] == "generate":
            task["path"] = str(bench.folder / "task.jsonl")
        else:
            task["source"]["path"] = own["data"]["heldout"]["path"]
    bench.write(config)
    assert set(bench.plan().values()) == {"missing"}
    bench.refused("plan", f"model.path={bench.folder / 'nowhere'}", status=2, says="neither a folder nor reachable on the hub")


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from keys(inner, f"{prefix}{key}.")


def test_the_laptop_file_names_every_key() -> None:
    written = set(keys(yaml.safe_load((CONFIGS / "laptop.yaml").read_text())))
    known = set(keys(load_config(CONFIGS / "laptop.yaml").model_dump()))
    # `heldout` is read like `train`, whose keys are all there; tasks are a list.
    assert {key for key in known - written if not key.startswith("data.heldout.")} == set()
    tasks = yaml.safe_load((CONFIGS / "laptop.yaml").read_text())["evaluate"]["tasks"]
    assert [set(task) for task in tasks] == [set(GenerateTask.model_fields), set(NllTask.model_fields)]


def test_the_laptop_file_comments_every_section() -> None:
    text = (CONFIGS / "laptop.yaml").read_text()
    undocumented = [line for line in text.splitlines() if line.startswith("  ") and line.strip()[0].isalpha() and "#" not in line]
    assert len(undocumented) < len(text.splitlines()) / 4, undocumented
    assert set(Run.model_fields) <= set(yaml.safe_load(text))
