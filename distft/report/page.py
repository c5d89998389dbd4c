"""Writes the page of one run or several: `report.html`, which opens from any disk without a network, and `report.md`.

Model outputs and run files are untrusted text. Both templates escape whatever they are given, pictures escape for themselves, and
the page forbids scripts and anything from outside by its own content policy. The same runs give the same bytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from distft.report.data import read_runs
from distft.report.table import comparison_rows, comparison_table
from distft.report.view import view
from distft.store.location import Location

__all__ = ["comparison_rows", "comparison_table", "write_report"]

HTML, MARKDOWN = "report.html", "report.md"


def write_report(store: Location, runs: list[str], *, page: Location, title: str | None = None) -> str:
    """Reads the runs from the store and puts their page into `page`; returns where it is. Writes nothing when a run is not there."""
    shown = view(read_runs(store, runs), title)
    html, markdown = _render("page.html.j2", shown), _render("page.md.j2", shown)
    page.replace(MARKDOWN, markdown.encode("utf-8", "replace"))
    page.replace(HTML, html.encode("utf-8", "replace"))
    return f"{page.url}/{HTML}"


def _render(template: str, shown: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    is_html = template.endswith(".html.j2")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=is_html, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=None if is_html else markdown_text,
    )  # fmt: skip
    environment.filters["fenced"] = fenced
    return environment.get_template(template).render(shown)


def markdown_text(value: Any) -> Any:
    """Text that Markdown shows as it is, in a paragraph or a table's cell: no markup, no HTML, one line."""
    if isinstance(value, Fenced):
        return str(value)
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", " ".join(str(value).split(" "))).replace("\r", "").replace("\n", " ")


class Fenced(str):
    """Text inside a code fence: taken literally."""

    __slots__ = ()


def fenced(content: str) -> Fenced:
    """A code block whose fence is longer than any run of backticks inside, so that nothing can close it early."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return Fenced(f"{fence}\n{content}\n{fence}")
