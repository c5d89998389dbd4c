"""The command line: finds the run file, calls the verb, prints what a person or a program wants, ends with the right status.

Everything heavy is imported inside verbs: `distft --help` and a bad run file must be answered at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distft import __version__, cache_cli, ranks, stopping
from distft.console import guarded, show_figures
from distft.errors import ConfigError
from distft.progress import say

if TYPE_CHECKING:
    from distft.pipeline import Pipeline

app = typer.Typer(
    name="distft", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Fine-tune the full weights of a language model without making it forget.\n\nEvery verb takes a run file and overrides, as in"
    " [cyan]distft train configs/laptop.yaml train.lr=2e-5[/]. Whatever is committed already is used, not made again.",
    epilog="Exit status: 0 done; 2 the input is wrong; 3 an artifact is stale, missing or corrupt; 1 anything else.",
)  # fmt: skip

app.add_typer(cache_cli.app, name="cache")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file; configs/ holds complete ones.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Laid over the file, left to right.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout at the end.")]


def main() -> None:
    """Entry point of the console script."""
    # Before anything imports them: their own bars and notices would run through ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed, which accelerate imports whether or not we use it, warns on every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    stopping.install()


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Let the teacher read 20 documents here, and measure.")] = False,
    page: Annotated[
        Path | None,
        typer.Option("--page", metavar="FILE.html", help="Show what is done with each token, in its text, as a page."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check everything and say what a run would do and cost; writes nothing to the store."""
    _run_verb(config, overrides, as_json, lambda pipeline: pipeline.plan(calibrate=calibrate, page=page), show=_show_plan)


@app.command()
def tokenize(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Data set to CORPUS: documents as token ids, with what is supervised."""
    _run_verb(config, overrides, as_json, lambda pipeline: pipeline.tokenize())


@app.command()
def score(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """CORPUS to TEACHER: the frozen model reads every document once."""
    _run_verb(config, overrides, as_json, lambda pipeline: pipeline.score())


@app.command()
def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train against the teacher cache; goes on from the last checkpoint."""
    _run_verb(config, overrides, as_json, lambda pipeline: pipeline.train(), by_ranks=True)


@app.command()
def export(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Checkpoint to MODEL: a folder that transformers loads."""
    _run_verb(config, overrides, as_json, lambda pipeline: pipeline.export())


@app.command()
def evaluate(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Tasks before and after, and the drift between them."""
    _run_verb(config, overrides, as_json, lambda pipeline: pipeline.evaluate())


@app.command()
def report(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """One HTML page of what was trained, learned and lost."""
    _run_verb(config, overrides, as_json, lambda pipeline: pipeline.report())


@app.command()
def run(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """All of the above, in order; does what is missing."""
    _run_verb(config, overrides, as_json, lambda pipeline: pipeline.run_all())


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo keeps its model, data and store.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """The whole pipeline on a real small model, on this machine."""

    def whole() -> dict[str, Any]:
        _refuse_ranks()
        if "=" in folder.name:
            raise ConfigError(
                f"The demo takes a folder and no overrides; {folder} looks like one.", where="command line",
                help="Its run files take them: distft run demo/sft-kl.yaml name=another train.seed=1",
            )  # fmt: skip
        from distft.demo.run import run_demo

        return run_demo(folder)

    def show(result: dict[str, Any]) -> None:
        from distft.report.page import comparison_table

        say(f"\n{comparison_table(result['comparison'])}\n\n{result['page']}")

    guarded(whole, as_json, show=show)


def _run_verb(
    config: Path, overrides: list[str] | None, as_json: bool, verb: Callable[[Pipeline], dict[str, Any]],
    *, show: Callable[[dict[str, Any]], None] | None = None, by_ranks: bool = False,
) -> None:  # fmt: skip
    """`by_ranks`: a verb that a launched group of processes does together; others would do the same work side by side."""

    def work() -> dict[str, Any]:
        if not by_ranks:
            _refuse_ranks()
        from distft.config.check import check_run
        from distft.config.load import load_config

        loaded = load_config(config, overrides or [])
        check_run(loaded, where=str(config))
        from distft.pipeline import Pipeline

        return verb(Pipeline(loaded))

    guarded(work, as_json, show=show or show_figures)


def _refuse_ranks() -> None:
    if ranks.size() > 1:
        raise ConfigError(
            f"{ranks.size()} ranks were launched (WORLD_SIZE), and of all verbs `train` alone shares its work among ranks.",
            where="environment", help="Run this verb once, without torchrun; or unset WORLD_SIZE.",
        )  # fmt: skip


def _show_plan(result: dict[str, Any]) -> None:
    from distft.plan.show import plan_text

    say(plan_text(result))
