"""Deliberate bugs: a function of distft with one piece of its source exchanged, for as long as a test looks.

The function keeps its identity and gets other code, so that every module that imported it has the bug. A piece that is not there
exactly once is an error: a table of mutants must not go out of date in silence.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import pytest


@dataclass(frozen=True)
class Mutant:
    """`where` is module:function or module:Class.method; `piece` of its source becomes `bug`."""

    where: str
    piece: str
    bug: str

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        function = _function(self.where)
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.piece) != 1:
            raise LookupError(f"{self.where} has {self.piece!r} {source.count(self.piece)} times: bring the mutant up to date")
        lines = source.replace(self.piece, self.bug).splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("def "))  # without decorators
        scope: dict[str, Any] = {}
        code = compile("from __future__ import annotations\n" + "\n".join(lines[start:]), f"<mutant of {self.where}>", "exec")
        exec(code, function.__globals__, scope)
        patch.setattr(function, "__code__", scope[function.__name__].__code__)


def _function(where: str) -> FunctionType:
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for step in classes:
        owner = getattr(owner, step)
    found = inspect.getattr_static(owner, name)
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    found = inspect.unwrap(found)
    if not isinstance(found, FunctionType) or found.__closure__:
        raise LookupError(f"{where} is no plain function")
    return found
