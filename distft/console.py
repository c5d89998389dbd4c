"""How every verb ends: one readable message or one JSON object, and the documented exit status."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import typer

from distft import ranks
from distft.errors import DistftError
from distft.progress import complain, say


def guarded(work: Callable[[], dict[str, Any]], as_json: bool, *, show: Callable[[dict[str, Any]], None]) -> None:
    """Runs a verb; turns what went wrong into one readable message and the documented exit status."""
    try:
        result = work()
    except DistftError as error:
        complain(f"error: {error}")
        if as_json:
            _print_json({"error": error.problem, "where": error.where, "help": error.help})
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt as error:
        say(f"{str(error) or 'Stopped.'} The same command goes on from what is committed.")
        if as_json:
            _print_json({"error": "interrupted", "where": "", "help": "Run the same command again."})
        raise typer.Exit(1) from None
    except Exception as error:  # a bug of ours: the traceback is for whoever mends it
        if as_json:
            _print_json({"error": f"{type(error).__name__}: {error}", "where": "distft", "help": "Please report the traceback."})
        raise
    if as_json:
        _print_json(result)
    else:
        show(result)


def show_figures(result: dict[str, Any], indent: str = "") -> None:
    """Figures for a person, a line each."""
    for key, value in result.items():
        if isinstance(value, dict):
            say(f"{indent}{key}")
            show_figures(value, indent + "  ")
        else:
            say(f"{indent}{key}: {_figure(value)}")


def _print_json(result: dict[str, Any]) -> None:
    if ranks.rank() == 0:  # of a launched group, one answers
        sys.stdout.write(json.dumps(_finite(result), allow_nan=False) + "\n")
        sys.stdout.flush()


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
