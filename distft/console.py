"""How every verb begins, with a run file and overrides, and ends: one readable message or one JSON object, and the documented exit
status. What is heavy loads inside."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distft import ranks
from distft.errors import ConfigError, DistftError
from distft.progress import complain, say

if TYPE_CHECKING:
    from distft.pipeline import Pipeline

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file; configs/ holds complete ones.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Laid over the file, left to right.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout at the end.")]


def run_verb(
    config: Path, overrides: list[str] | None, as_json: bool, verb: Callable[[Pipeline], dict[str, Any]],
    *, show: Callable[[dict[str, Any]], None] | None = None, by_ranks: bool = False,
) -> None:  # fmt: skip
    """`by_ranks`: a verb that a launched group of processes does together; others would do the same work side by side."""

    def work() -> dict[str, Any]:
        if not by_ranks:
            refuse_ranks()
        from distft.config.check import check_run
        from distft.config.load import load_config

        loaded = load_config(config, overrides or [])
        check_run(loaded, where=str(config))
        from distft.pipeline import Pipeline

        return verb(Pipeline(loaded))

    guarded(work, as_json, show=show or show_figures)


def refuse_ranks() -> None:
    if ranks.size() > 1:
        raise ConfigError(
            f"{ranks.size()} ranks were launched (WORLD_SIZE), and of all verbs `train` alone shares its work among ranks.",
            where="environment", help="Run this verb once, without torchrun; or unset WORLD_SIZE.",
        )  # fmt: skip


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
