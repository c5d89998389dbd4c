"""`distft checkpoint`: a run's checkpoints to and from DeepSpeed's universal format. As quick to answer as the verbs in `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distft.console import Config, Json, Overrides, run_verb
from distft.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Checkpoints to and from DeepSpeed's universal format: export, import.",
)

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="A folder on this machine's disks.", show_default=False)]
EXPORTED = "The checkpoint of this step; without it, the newest."
IMPORTED = "The step that it stands after, where the folder does not say."


@app.command("export")
def export_(
    config: Config,
    folder: Folder,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(metavar="N", min=1, help=EXPORTED)] = None,
    as_json: Json = False,
) -> None:
    """The run's checkpoint as a new folder that ZeRO-3 loads with "checkpoint": {"load_universal": true}: weights, both moments, the
    optimizer's step. FOLDER must not exist, or be empty."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.export_universal(_folder(folder), step=step))


@app.command("import")
def import_(
    config: Config,
    folder: Folder,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(metavar="N", min=1, help=IMPORTED)] = None,
    as_json: Json = False,
) -> None:
    """A folder that DeepSpeed's ds_to_universal made becomes the checkpoint from which `train` goes on. The run must not have begun.
    Nothing in the folder is run: a file with more than tensors and plain values in it is refused."""
    run_verb(config, overrides, as_json, lambda pipeline: pipeline.import_universal(_folder(folder), step=step))


def _folder(text: str) -> Path:
    if "://" in text or "=" in Path(text).name:
        raise ConfigError(
            f"FOLDER is {text!r}: DeepSpeed reads and writes folders of this machine's disks alone.", where="command line",
            help="Give a folder before any override: distft checkpoint export run.yaml ./universal name=another",
        )  # fmt: skip
    return Path(text).expanduser().absolute()
