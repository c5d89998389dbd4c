"""Loss functions of other projects, out of their installed packages.

    pip install --no-deps --target /tmp/peers -r tests/peers/requirements.txt
    DISTFT_PEERS=/tmp/peers ./launch/test.sh -m peers

What these packages depend on is not installed, so their modules cannot all be imported. A function's source is taken from the
installed file and compiled alone; nothing of it is in this repository.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

HOW = "see tests/peers/published.py for the two commands of this lane"


def folder() -> Path:
    named = os.environ.get("DISTFT_PEERS")
    if not named or not Path(named).is_dir():
        pytest.fail(f"DISTFT_PEERS names no folder with the peers' packages; {HOW}")
    return Path(named)


def version(package: str) -> str:
    for found in importlib.metadata.distributions(name=package, path=[str(folder())]):
        return found.version
    pytest.fail(f"{package} is not in {folder()}; {HOW}")


def functions(*wanted: tuple[str, str]) -> list[Callable[..., Any]]:
    """Functions or static methods, each by file and name; all see one another as their own module's would."""
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional}
    for file, name in wanted:
        path = folder() / file
        if not path.is_file():
            pytest.fail(f"{path} is missing; {HOW}")
        found = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        if len(found) != 1:
            pytest.fail(f"{path} has {len(found)} functions {name}; another version is installed than was compared; {HOW}")
        found[0].decorator_list = []
        # compiled with this module's own `annotations` from the future: names in annotations are never looked up
        exec(compile(ast.Module(body=[found[0]], type_ignores=[]), str(path), "exec"), names)
    return [names[name] for _, name in wanted]
