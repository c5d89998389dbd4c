"""The command line: finds the run file, calls the verb, prints what a person or a program wants, ends with the right status.

Everything heavy is imported inside verbs: `distft --help` and a bad run file must be answered at once.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from distft import __version__, cache_cli, checkpoint_cli, stopping
from distft.console import Config, Json, Overrides, guarded, refuse_ranks, run_verb
from distft.errors import ConfigError
from distft.progress import say

app = typer.Typer(
    name="distft", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Fine-tune the full weights of a language model without making it forget.\n\nEvery verb takes a run file and overrides, as in"
    " [cyan]distft train configs/laptop.yaml train.lr=2e-5[/]. Whatever is committed already is used, not made again.",
    epilog="Exit status: 0 done; 2 the input is wrong; 3 an artifact is stale, missing or corrupt; 1 anything else.",
)  # fmt: skip

app.add_typer(cache_cli.app, name="cache")
app.add_typer(checkpoint_cli.app, name="checkpoint")


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
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.plan(calibrate=calibrate, page=page), show=_show_plan)


@app.command()
def tokenize(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Data set to CORPUS: documents as token ids, with what is supervised."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.tokenize())


@app.command()
def score(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """CORPUS to TEACHER: the frozen model reads every document once."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.score())


@app.command()
def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train against the teacher cache; goes on from the last checkpoint."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.train(), by_ranks=True)


@app.command()
def export(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Checkpoint to MODEL: a folder that transformers loads."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.export())


@app.command()
def evaluate(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Tasks before and after, and the drift between them."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.evaluate())


@app.command()
def report(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """One HTML page of what was trained, learned and lost."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.report())


@app.command()
def run(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """All of the above, in order; does what is missing."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.run_all())


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo keeps its model, data and store.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """The whole pipeline on a real small model, on this machine."""

    def whole() -> dict[str, Any]:
        refuse_ranks()
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


def _show_plan(result: dict[str, Any]) -> None:
    from distft.plan.show import plan_text

    say(plan_text(result))
