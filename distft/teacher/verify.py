"""Goes through all of a cache and says what is wrong with it: every byte, every row, and whether coverage keeps its promises.

Nothing stops at the first problem: whoever restores files wants to know all of them. A document that some corpus of the store holds
is compared with it, which shows rows that are whole and yet about other tokens.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distft.corpus.reader import Document
from distft.errors import CorruptArtifactError
from distft.progress import Meter, track
from distft.store.local import explained
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, fetch, read_manifest
from distft.teacher.catalogue import FoundCache
from distft.teacher.head_file import EXPONENT, HEAD, WORDS, HeadForm, head_form, keeps_hidden, read_head_manifest
from distft.teacher.identity import documents_key, held_documents, is_whole, quarantined_documents, scored_positions
from distft.teacher.rows import Documents, Row, rows
from distft.teacher.scores import Scores

MASS_SLACK = 1e-2
"""By how much float16 log-probabilities and the tail may miss 1 together."""
SLACK = 1e-3
"""What float32 sums over a vocabulary may put above the bounds of a log-probability, an entropy or a tail."""
PARTS_CURE = (
    "Without one, remove each damaged part's file in parts/ and all files in coverage/: `distft score` then reads those documents"
    " again, and no others."
)
HEAD_CURE = f"The teacher's head needs no copy: remove {HEAD}, and `distft score` writes it again."
TOLD = 20
PER_FILE = 3


def verify_cache(cache: FoundCache, documents: Documents, staging: Path) -> dict[str, Any]:
    """Figures of a cache that is sound; a CorruptArtifactError names all that is wrong otherwise. `staging` holds, for a moment
    each, files of a remote store: every one is read from there anew, whatever was fetched before."""
    problems: list[str] = []
    found = _manifests(cache.folder, problems)
    parts = {name: manifest for name, manifest in found.items() if name.startswith("parts/")}
    coverage = {name: manifest for name, manifest in found.items() if name.startswith("coverage/")}
    if not cache.folder.url.endswith(f"/{cache.id}"):
        problems.append(f"IDENTITY.json: it is of cache {cache.id}, and lies in a folder of another name")
    for name, manifest in found.items():
        if manifest.identity.get("teacher") != cache.id:
            problems.append(f"{name}: it belongs to cache {manifest.identity.get('teacher')}, not {cache.id}")
    compared, figures = 0, Counter[str]()
    head = _head_manifest(cache, parts, problems)
    total = sum(entry.size for one in (*parts.values(), *([head] if head else [])) for entry in one.files)
    with explained("write", staging):
        staging.mkdir(parents=True, exist_ok=True)
        fresh = tempfile.TemporaryDirectory(dir=staging)
    with track("verify", total, "bytes") as meter, fresh as scratch:
        form = _verify_head(cache, head, Path(scratch), problems, figures, meter) if head else None
        for name, part in parts.items():
            compared += _verify_part(cache, name, part, form, documents, Path(scratch), problems, figures, meter)
    _verify_coverage(coverage, parts, documents, problems)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        told = problems[:TOLD] + ([f"and {len(problems) - TOLD} more"] if len(problems) > TOLD else [])
        cures = [PARTS_CURE] if any(not problem.startswith(HEAD) for problem in problems) else []
        cures += [HEAD_CURE] if any(problem.startswith(HEAD) for problem in problems) else []
        raise CorruptArtifactError(
            "\n".join([f"{len(problems)} {noun} in this cache:", *(f"  {line}" for line in told)]), where=cache.folder.url,
            help=" ".join(["Restore the files that are named from a copy.", *cures]),
        )  # fmt: skip
    return {
        "cache": cache.folder.url, "id": cache.id, "files": figures["files"], "bytes": figures["bytes"], "parts": len(parts),
        "documents": len(held_documents(parts.values())), "quarantined": len(quarantined_documents(parts.values())),
        "scored_tokens": figures["scored_tokens"], "compared_with_corpus": compared,
        "corpora_covered": sum(is_whole(one) for one in coverage.values()),
    }  # fmt: skip


def _manifests(folder: Location, problems: list[str]) -> dict[str, Manifest]:
    """Parts and coverage by name, and a problem for each that is no manifest of its kind."""
    found = {}
    for room, kind in (("parts", "teacher-part"), ("coverage", "teacher-coverage")):
        for name in folder.child(room).names():
            place = f"{room}/{name}"
            try:
                manifest = read_manifest(folder.child(room), name)
            except CorruptArtifactError as error:
                problems.append(f"{place}: {error.problem}")
                continue
            if manifest is not None and manifest.kind == kind:
                found[place] = manifest
            elif manifest is not None:
                problems.append(f"{place}: a {manifest.kind} where a {kind} should be")
    return found


def _head_manifest(cache: FoundCache, parts: dict[str, Manifest], problems: list[str]) -> Manifest | None:
    """The manifest of the head's copy, where hidden states need one, and a problem where it is not as it should be."""
    if not keeps_hidden(cache.identity):
        problems += [f"{HEAD}: it is there, and this cache keeps no hidden states"] if cache.folder.exists(HEAD) else []
        return None
    try:
        head = read_head_manifest(cache.folder)
    except CorruptArtifactError as error:
        problems.append(f"{HEAD}: {error.problem}")
        return None
    if head is None:
        problems += [f"{HEAD}: missing, and without it {len(parts)} parts have no distributions"] if parts else []
    elif head.identity.get("teacher") != cache.id:
        problems.append(f"{HEAD}: it belongs to cache {head.identity.get('teacher')}, not {cache.id}")
    return head


def _verify_head(
    cache: FoundCache, head: Manifest, staging: Path, problems: list[str], figures: Counter[str], meter: Meter
) -> HeadForm | None:
    """The form of the head, once its bytes are those of its manifest."""
    [entry] = head.files
    figures.update(files=1, bytes=entry.size)
    meter.advance(entry.size)
    form = None
    try:
        form = head_form(fetch(cache.folder, entry, staging / "head"))
    except CorruptArtifactError as error:
        problems.append(f"{HEAD}: {error.problem if entry.name in error.problem else f'{entry.name}: {error.problem}'}")
    except ValueError as error:
        problems.append(f"{HEAD}: {entry.name} is no output head: {error}")
    if form is not None and form.dtype != cache.identity["dtype"]:
        problems.append(f"{HEAD}: the head is {form.dtype}, and the teacher was {cache.identity['dtype']}")
    return form


def _verify_part(
    cache: FoundCache, name: str, part: Manifest, form: HeadForm | None, documents: Documents, staging: Path, problems: list[str],
    figures: Counter[str], meter: Meter,
) -> int:  # fmt: skip
    """Adds what is wrong with one part, and returns how many of its documents were compared with a corpus."""
    wrong: list[str] = []
    digests: list[str] = []
    compared, counts = 0, Counter[str]()
    for entry in part.files:
        try:
            for row in rows(cache.folder, entry, staging):
                document = documents.get(row.digest)
                compared += document is not None
                digests.append(row.digest)
                counts.update(tokens=row.tokens, scored_tokens=len(row.scores.positions), entries=len(row.scores.ids))
                wrong += [f"document {row.digest}: {problem}" for problem in row_problems(row, document, cache.identity, form)]
        except CorruptArtifactError as error:
            wrong.append(error.problem if entry.name in error.problem else f"{entry.name}: {error.problem}")
        figures.update(files=1, bytes=entry.size)
        meter.advance(entry.size)
    if not wrong:
        wrong = _part_problems(part, digests, counts)
    problems += [f"{name}: {problem}" for problem in wrong[:PER_FILE]]
    if len(wrong) > PER_FILE:
        problems.append(f"{name}: and {len(wrong) - PER_FILE} more of its rows")
    figures.update(scored_tokens=counts["scored_tokens"])
    return compared


def _part_problems(part: Manifest, digests: list[str], counts: Counter[str]) -> list[str]:
    """Whether the files hold what their manifest says."""
    promised = part.facts["digests"]
    if digests != promised:
        place = next(
            (n for n, (a, b) in enumerate(zip(digests, promised, strict=False)) if a != b), min(len(digests), len(promised))
        )
        told = [one[place] if place < len(one) else "nothing" for one in (digests, promised)]
        return [f"row {place} is of document {told[0]}, and the manifest lists {told[1]} there"]
    if part.identity.get("documents") != documents_key([*promised, *part.facts.get("quarantined", {})]):
        return ["its identity is not that of its documents"]
    return [
        f"{counts[fact]:,} {fact} in its files, and {part.facts[fact]:,} in its manifest"
        for fact in ("tokens", "scored_tokens", "entries")
        if counts[fact] != part.facts[fact]
    ]


def row_problems(
    row: Row, document: Document | None, identity: dict[str, Any], form: HeadForm | None = None
) -> list[str]:  # fmt: skip
    """What cannot be true of a row: alone, and beside the document that it is about. `form` is that of the head that hidden states
    belong to, where it is known."""
    scores, hidden = row.scores, keeps_hidden(identity)
    positions_N = scores.positions.astype(np.int64)
    tokens_M = np.repeat(np.arange(len(positions_N)), scores.counts)
    logprobs_M = scores.logprobs.astype(np.float64)
    mass_N = np.bincount(tokens_M, weights=np.exp(logprobs_M), minlength=len(positions_N)) + scores.tail
    same_token_M = tokens_M[1:] == tokens_M[:-1]
    tests = {
        "positions do not ascend from 1 to its last token": bool((np.diff(positions_N, prepend=0) > 0).all())
        and (not len(positions_N) or positions_N[-1] < row.tokens),
        "a label's log-probability is above 0 or not finite": _within(scores.label_logprob, high=SLACK),
        "an entropy is below 0 or not finite": _within(scores.entropy, low=-SLACK),
        "a tail is not a probability": _within(scores.tail, low=-SLACK, high=1 + SLACK),
        "ids do not ascend within a token": bool((np.diff(scores.ids.astype(np.int64)) > 0)[same_token_M].all()),
        "a kept log-probability is above 0 or not a number": bool((logprobs_M <= SLACK).all()),
        "kept probabilities and tail do not sum to 1": hidden or _within(mass_N, low=1 - MASS_SLACK, high=1 + MASS_SLACK),
    }  # fmt: skip
    if hidden:
        tests |= _hidden_tests(scores, identity["dtype"], form)
    else:
        tests["there are hidden states, which its policy does not keep"] = not len(scores.hidden)
    wrong = [problem for problem, holds in tests.items() if not holds]
    return wrong if wrong or document is None else _document_problems(row, document, identity)


def _hidden_tests(scores: Scores, dtype: str, form: HeadForm | None) -> dict[str, bool]:
    """Of a row with hidden states, which has nothing else of a distribution. The head's width is the states', or else any width."""
    each = len(scores.hidden) // max(1, len(scores))
    wanted = each if form is None else form.width * WORDS[dtype]
    last_words = scores.hidden[WORDS[dtype] - 1 :: WORDS[dtype]] & EXPONENT
    return {
        "a hidden state is not as wide as the teacher's head": bool(wanted or not len(scores))
        and len(scores.hidden) == len(scores) * wanted and wanted % WORDS[dtype] == 0,
        "a hidden state is not finite": bool((last_words != EXPONENT).all()),
        "there are kept entries or a tail beside hidden states": not scores.counts.any() and not scores.tail.any(),
    }  # fmt: skip


def _document_problems(row: Row, document: Document, identity: dict[str, Any]) -> list[str]:
    expected = scored_positions(document, identity["positions"])
    if row.tokens != len(document.tokens) or not np.array_equal(row.scores.positions, expected):
        return [
            f"the row is about {row.tokens} tokens and {len(row.scores.positions)} positions, the corpus's document has"
            f" {len(document.tokens)} tokens and {len(expected)} positions, or others"
        ]
    policy = identity["distribution"]
    if policy["kind"] == "topk" and not _labels_agree(row.scores, document, policy["min_prob"]):
        return ["what was kept of a label and its own log-probability contradict each other: the row is about other tokens"]
    return []


def _labels_agree(scores: Scores, document: Document, min_prob: float) -> bool:
    """A kept label has its log-probability twice, as the label's and rounded to float16 among the kept. One that was not kept is
    less likely than all that were, or than the floor."""
    labels_N = document.tokens[scores.positions.astype(np.int64)]
    row_M = np.repeat(np.arange(len(labels_N)), scores.counts)
    both_M = scores.ids == labels_N[row_M]
    exact_N, kept_M = scores.label_logprob.astype(np.float64), scores.logprobs.astype(np.float64)
    slack_N = SLACK + 2.0**-10 * np.abs(exact_N)
    agree = np.abs(exact_N[row_M[both_M]] - kept_M[both_M]) <= slack_N[row_M[both_M]]
    least_N = np.full(len(labels_N), np.inf)
    np.minimum.at(least_N, row_M, kept_M)
    floor = np.log(min_prob) if min_prob else -np.inf
    absent_N = np.ones(len(labels_N), np.bool_)
    absent_N[row_M[both_M]] = False
    below = exact_N[absent_N] <= np.maximum(least_N, floor)[absent_N] + slack_N[absent_N]
    return bool(agree.all() and below.all())


def _verify_coverage(
    coverage: dict[str, Manifest], parts: dict[str, Manifest], documents: Documents, problems: list[str]
) -> None:
    """A coverage says that some files hold all documents of a corpus. Which documents those are follows from the corpus alone; where
    the store has it, they are counted off."""
    holders: dict[str, tuple[FileEntry, set[str]]] = {
        entry.name: (entry, set(part.facts["digests"])) for part in parts.values() for entry in part.files
    }
    corpora = {documents_key(digests): digests for digests in documents.corpora}
    for name, manifest in coverage.items():
        strange = [entry.name for entry in manifest.files if holders.get(entry.name, (None,))[0] != entry]
        if strange:
            problems.append(
                f"{name}: it names {strange[0]}, which no part names, or with other bytes ({len(strange)} such files)"
            )
            continue
        held = {digest for entry in manifest.files for digest in holders[entry.name][1]}
        quarantined = manifest.facts.get("quarantined", {})
        absent = corpora.get(manifest.identity["documents"], set()) - held - quarantined.keys()
        promised = manifest.facts["documents"] - len(quarantined)
        if absent or len(held) < promised:
            lacking = len(absent) or promised - len(held)
            problems.append(f"{name}: {lacking} of its {manifest.facts['documents']} documents are in none of its files")


def _within(values: npt.NDArray[Any], *, low: float = -np.inf, high: float = np.inf) -> bool:
    """All finite and between the bounds; NaN is between none."""
    return bool((np.isfinite(values) & (values >= low) & (values <= high)).all())
