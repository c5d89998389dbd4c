"""How much of a corpus a cache holds: what `coverage/<documents>.json` states, and what `distft score` tells of it.

A coverage names the parts that hold all documents of a corpus, and those that the teacher could not read. One with such documents
serves no run, since training refuses it; it alone may be replaced, once the documents could be read after all. One without stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distft.corpus.reader import Corpus
from distft.errors import DistftError
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit, read_manifest
from distft.teacher.identity import documents_key, held_documents, is_whole, quarantined_documents, read_parts

TOLD = 10
"""Quarantined documents that a person is told by name."""

Places = Mapping[str, tuple[str, int]]
"""Split and number of documents, by digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How far a corpus is covered. Where two parts hold one document, the first in name order serves it."""

    wanted: Places
    held: set[str]
    quarantined: dict[str, str]
    """Reasons by digest, in the order of the corpus."""
    files: tuple[FileEntry, ...]
    facts: dict[str, int]
    """What the parts that serve add up to, whatever else they hold."""

    @property
    def missing(self) -> list[str]:
        """The documents that nobody has tried to read, in the order of the corpus."""
        return [digest for digest in self.wanted if digest not in self.held and digest not in self.quarantined]

    @property
    def bytes_per_token(self) -> float:
        """Of a scored token."""
        return self.facts["bytes"] / max(1, self.facts["scored_tokens"])


def places_of(corpus: Corpus) -> dict[str, tuple[str, int]]:
    """Each document of the corpus once, in its order."""
    return {digest: (split, row) for split in corpus.splits for row, digest in enumerate(corpus.digests(split))}


def survey(wanted: Places, parts: Iterable[Manifest]) -> Coverage:
    """What these parts hold of the wanted documents."""
    listed = list(parts)
    reasons, held = quarantined_documents(listed), held_documents(listed) & wanted.keys()
    files: list[FileEntry] = []
    open_digests, facts = set(held), {"scored_tokens": 0, "entries": 0, "bytes": 0}
    for part in listed:
        useful = open_digests & set(part.facts["digests"])
        if useful:
            files.extend(part.files)
            facts["scored_tokens"] += part.facts["scored_tokens"]
            facts["entries"] += part.facts["entries"]
            facts["bytes"] += sum(entry.size for entry in part.files)
            open_digests -= useful
    quarantined = {digest: reasons[digest] for digest in wanted if digest in reasons}
    return Coverage(wanted=wanted, held=held, quarantined=quarantined, files=tuple(files), facts=facts)


def read_coverage(folder: Location, wanted: Places) -> Coverage | None:
    """The corpus's coverage, if one is committed that no later part can have changed: with all documents."""
    stated = read_manifest(folder.child("coverage"), f"{documents_key(wanted)}.json")
    return None if stated is None or not is_whole(stated) else _whole(wanted, stated)


def _whole(wanted: Places, stated: Manifest) -> Coverage:
    facts = {key: stated.facts[key] for key in ("scored_tokens", "entries", "bytes")}
    return Coverage(wanted=wanted, held=set(wanted), quarantined={}, files=stated.files, facts=facts)


def commit_coverage(folder: Location, wanted: Places, parts: Iterable[Manifest] | None = None) -> Coverage:
    """States that the corpus is covered, and returns what is stated then; every document must have been tried. `parts` are those of
    the cache, where they were read already.

    Another driver may read what was quarantined here, and state that while this one looks. A whole coverage is never replaced by
    what was surveyed before it; where that happens between a look and a write, the survey behind the write finds the other's part,
    and states it again. Parts only grow in number, so it ends."""
    name, found = f"coverage/{documents_key(wanted)}.json", survey(wanted, read_parts(folder) if parts is None else parts)
    while True:
        if found.missing:
            raise DistftError(
                f"{len(found.missing)} documents are in no part of the cache although all were scored.", where=folder.url,
                help="Parts were deleted while this ran. Run `distft score` again.",
            )  # fmt: skip
        ours = _statement(folder, found)
        there = read_manifest(folder, name) or commit(folder, ours, name)
        if is_whole(there):
            return _whole(wanted, there)
        if there.facts["quarantined"] == found.quarantined:
            return found
        folder.replace(name, ours.to_json())
        found = survey(wanted, read_parts(folder))


def _statement(folder: Location, found: Coverage) -> Manifest:
    identity = {"teacher": folder.url.rsplit("/", 1)[-1], "documents": documents_key(found.wanted)}
    facts = {**found.facts, "documents": len(found.wanted), "quarantined": found.quarantined}
    return Manifest(kind="teacher-coverage", identity=identity, files=found.files, facts=facts)


def coverage_report(found: Coverage, corpus: Corpus, positions: str) -> dict[str, Any]:
    """As `--json` prints it: `tokens` and `scored_tokens` are those of the documents that are held, `bytes` those of the files that
    serve them."""
    tokens, scored = token_counts(corpus, found.wanted, found.held, positions)
    return {
        "documents": len(found.wanted),
        "held": len(found.held),
        "missing": len(found.missing),
        "quarantined": quarantined_rows(found.quarantined, found.wanted, corpus),
        "complete": len(found.held) == len(found.wanted),
        "tokens": tokens,
        "scored_tokens": scored,
        "bytes": found.facts["bytes"],
    }


def token_counts(corpus: Corpus, wanted: Places, digests: Iterable[str], positions: str) -> tuple[int, int]:
    """Tokens of some documents, and how many of them are scored."""
    lengths = {split: corpus.lengths(split) for split in corpus.splits}
    scored = {split: lengths[split] - 1 if positions == "all" else corpus.supervised_counts(split) for split in corpus.splits}
    places = [wanted[digest] for digest in digests]
    return sum(int(lengths[split][row]) for split, row in places), sum(int(scored[split][row]) for split, row in places)


def quarantined_rows(quarantined: Mapping[str, str], wanted: Places, corpus: Corpus) -> list[dict[str, Any]]:
    """Where each quarantined document comes from, and why it could not be read."""
    found = []
    for digest, reason in quarantined.items():
        document = corpus.document(*wanted[digest])
        found.append({"document": digest, "file": document.file, "row": document.row, "reason": reason})
    return found


def quarantine_text(rows: list[dict[str, Any]]) -> str:
    """The first of them by name, and how many there are."""
    more = [f"  and {len(rows) - TOLD:,} more; `distft score --json` names all"] if len(rows) > TOLD else []
    return "\n".join([*(f"  {one['document']}  {one['file']}:{one['row']}: {one['reason']}" for one in rows[:TOLD]), *more])


def counted(number: int) -> str:
    return "1 document" if number == 1 else f"{number:,} documents"


def how_to_exclude(rows: list[dict[str, Any]], corpus: Corpus) -> str:
    """The setting that leaves them out, and those that are left out already."""
    listed = ",".join([*corpus.exclude, *(one["document"] for one in rows[:TOLD])]) + (",..." if len(rows) > TOLD else "")
    return (
        f"To do without them, set data.exclude=[{listed}], and run `distft score` and what follows. To read them again, as with more"
        " memory: `distft score` with score.retry_quarantined=true."
    )
