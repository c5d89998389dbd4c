"""The README is a promise: its map, its run file and its verbs are those that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import yaml

from distft.cli import app
from distft.config.load import validate
from distft.objectives.catalog import Objective

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_has_a_line_for_every_module_and_none_too_many() -> None:
    mapped = set(re.findall(r"^  ([\w/]+\.py) ", README, flags=re.MULTILINE))
    modules = {
        path.relative_to(ROOT / "distft").as_posix() for path in (ROOT / "distft").rglob("*.py") if path.name != "__init__.py"
    }
    assert mapped == modules


def test_the_run_file_shown_is_valid() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert block
    run = validate(yaml.safe_load(block[1].replace("1e-3", "1.0e-3").replace("1e-5", "1.0e-5")), where="README")
    assert run.objective.kind == "sft_kl"


def test_the_table_of_verbs_is_the_command_lines() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    kinds = {rule.model_fields["kind"].annotation.__args__[0] for rule in get_args(Objective)}
    assert listed - kinds == verbs


def test_no_figure_is_left_open() -> None:
    assert "@@" not in README
