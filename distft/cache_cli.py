"""`distft cache`: looks after teacher caches. Like the verbs in `cli.py`, and as quick to answer: what is heavy loads inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distft.console import guarded
from distft.errors import ConfigError
from distft.progress import say

if TYPE_CHECKING:
    from distft.teacher.catalogue import FoundCache
    from distft.teacher.rows import Documents

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Look after teacher caches: list, show, verify, prune.",
)

Cache = Annotated[
    str,
    typer.Argument(
        metavar="CACHE", help="A cache's folder or s3:// address, as `score` prints it; or how its id begins.", show_default=False
    ),
]
Store = Annotated[str, typer.Option("--store", metavar="URL", help="The store in which an id is looked for.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout at the end.")]


@app.command("list")
def list_(store: Store = "./store", as_json: Json = False) -> None:
    """The caches of a store: teacher, policy, documents, tokens, bytes, age, and the runs that used them."""

    def work() -> dict[str, Any]:
        from distft.store.location import open_location
        from distft.teacher.catalogue import list_caches

        place = open_location(store)
        return {"store": place.url, "caches": list_caches(place)}

    def show(result: dict[str, Any]) -> None:
        from distft.teacher.tell import list_text

        say(list_text(result))

    guarded(work, as_json, show=show)


@app.command("show")
def show_(
    cache: Cache,
    store: Store = "./store",
    document: Annotated[str | None, typer.Option(metavar="ID", help="One document whole: its digest, or how it begins.")] = None,
    tau: Annotated[float, typer.Option(help="The perplexity above which tokens are counted (`stm` masks them).")] = 2.5,
    as_json: Json = False,
) -> None:
    """What a cache says in sum: histograms of perplexity and entropy, mass kept, share above tau."""

    def work() -> dict[str, Any]:
        if not tau > 1:
            raise ConfigError(f"--tau is {tau:g}; a perplexity is more than 1.", where="command line", help="As in `stm`: 2.5.")
        found = _find(cache, store)
        if document is not None:
            return _document(found, document)
        from distft.teacher.statistics import cache_statistics

        figures = cache_statistics(found.folder, _staging(), tau=tau)
        return {"cache": found.folder.url, "id": found.id, "identity": found.identity, **figures}

    def show(result: dict[str, Any]) -> None:
        from distft.teacher.tell import document_text, statistics_text

        say(statistics_text(result) if document is None else document_text(result))

    guarded(work, as_json, show=show)


@app.command()
def verify(
    cache: Cache,
    store: Store = "./store",
    probe: Annotated[int, typer.Option(metavar="N", min=0, help="Ask the live teacher again about N documents.")] = 0,
    model: Annotated[Path | None, typer.Option(metavar="PATH", help="The teacher's folder, for --probe.")] = None,
    as_json: Json = False,
) -> None:
    """Every byte against its sha256, every row, and what coverage promises; --probe asks the live teacher."""

    def work() -> dict[str, Any]:
        if (probe > 0) != (model is not None):
            raise ConfigError("--probe N and --model PATH go together: the probe needs the teacher.", where="command line",
                              help="Give both, or neither.")  # fmt: skip
        found = _find(cache, store)
        from distft.teacher.verify import verify_cache

        documents = _documents(found)
        result = verify_cache(found, documents, _staging())
        probed = None
        if model is not None:
            from distft.store.model_folder import resolve_model
            from distft.teacher.probe import probe_cache

            probed = probe_cache(found, documents, resolve_model(str(model), None), count=probe, staging=_staging())
        return {**result, "probe": probed}

    def show(result: dict[str, Any]) -> None:
        from distft.teacher.tell import verify_text

        say(verify_text(result))

    guarded(work, as_json, show=show)


@app.command()
def prune(
    cache: Annotated[str | None, typer.Argument(metavar="[CACHE]", help="One cache; without it, all of the store.")] = None,
    store: Store = "./store",
    grace_hours: Annotated[float, typer.Option(min=1.0, help="Nothing younger goes: a build may be about to name it.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Remove data that no manifest names: what killed builds left behind."""

    def work() -> dict[str, Any]:
        from dataclasses import asdict

        from distft.store.location import open_location
        from distft.teacher.catalogue import cache_folders
        from distft.teacher.prune import prune

        folders = cache_folders(open_location(store)) if cache is None else [_find(cache, store).folder]
        done = {folder.url: asdict(prune(folder, grace_seconds=3600 * grace_hours, dry_run=dry_run)) for folder in folders}
        return {
            "dry_run": dry_run, "grace_hours": grace_hours, "files_removed": sum(len(one["files"]) for one in done.values()),
            "bytes_removed": sum(sum(one["files"].values()) for one in done.values()),
            "caches": [{"cache": url, **one} for url, one in done.items()],
        }  # fmt: skip

    def show(result: dict[str, Any]) -> None:
        from distft.teacher.tell import prune_text

        say(prune_text(result))

    guarded(work, as_json, show=show)


def _find(cache: str, store: str) -> FoundCache:
    from distft.teacher.catalogue import find_cache

    return find_cache(cache, store)


def _staging() -> Path:
    from distft.store.digest import memo_path

    return memo_path().parent / "staging"


def _documents(found: FoundCache) -> Documents:
    from distft.teacher.rows import Documents

    return Documents(found.store, _staging())


def _document(found: FoundCache, text: str) -> dict[str, Any]:
    from distft.teacher.rows import document_facts, find_row

    row = find_row(found.folder, text, _staging())
    document = _documents(found).get(row.digest)
    return {"cache": found.folder.url, "id": found.id, **document_facts(row, document, found.identity["dtype"])}
