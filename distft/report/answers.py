"""Answers side by side, what was lost first. Taken in the order of the items, never by how they look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distft.report import figures, words
from distft.report.data import RunData
from distft.report.results import Outcome, outcomes, task_names

SORTS = {
    "lost": ("Right before, wrong after", "Right before, wrong after in at least one run"),
    "split": ("", "Wrong before, right after in some runs"),
    "gained": ("Wrong before, right after", "Wrong before, right after in every run"),
    "wrong": ("Wrong before and after", "Wrong before and after in every run"),
}
"""Sorts of questions, as said of one run and of several."""
SHOWN = {"lost": 4, "split": 2, "gained": 2, "wrong": 2}
LONGEST = 900


def answer_groups(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """A block per judged task and start: runs that were asked the same from the same model share one."""
    blocks = []
    for name in task_names(runs):
        found = [o for o in outcomes(runs, name) if o.task.kind == "generate" and o.item_gains is not None]
        starts = dict.fromkeys(o.task.before.artifact for o in found)
        for start in starts:
            blocks.append(_block(runs, [o for o in found if o.task.before.artifact == start]))
    return blocks


def _block(runs: Sequence[RunData], found: list[Outcome]) -> dict[str, Any]:
    before = found[0].task.before.rows or ()
    after = [outcome.task.after.rows or () for outcome in found]
    sorts: dict[str, list[int]] = {sort: [] for sort in SORTS}
    for item, row in enumerate(before):
        right = [bool(rows[item]["right"]) for rows in after]
        if row["right"]:
            if not all(right):
                sorts["lost"].append(item)
        elif not any(right):
            sorts["wrong"].append(item)
        else:
            sorts["gained" if all(right) else "split"].append(item)
    # Questions that more runs lost come first; the sort keeps the items' order within.
    sorts["lost"].sort(key=lambda item: sum(bool(rows[item]["right"]) for rows in after))
    places = [next(i for i, run in enumerate(runs) if run is outcome.run) for outcome in found]
    named = [(o.run.name, place, rows) for o, place, rows in zip(found, places, after, strict=True)]
    return {
        "task": found[0].task.name,
        "tallies": [_tally(place, outcome) for place, outcome in zip(places, found, strict=True)],
        "sorts": [
            {
                "label": SORTS[sort][len(found) > 1], "count": len(items),
                "cards": [_card(item, before, named) for item in items[: SHOWN[sort]]],
            }
            for sort, items in sorts.items() if items
        ],
        "questions": len(before),
    }  # fmt: skip


def _tally(place: int, outcome: Outcome) -> dict[str, str]:
    pairs = [
        (bool(b["right"]), bool(a["right"]))
        for b, a in zip(outcome.task.before.rows or (), outcome.task.after.rows or (), strict=True)
    ]
    counts = {"lost": (True, False), "gained": (False, True), "kept": (True, True), "wrong": (False, False)}
    return {
        "swatch": figures.dot(place),
        "name": outcome.run.name,
        **{key: words.whole(pairs.count(pair)) for key, pair in counts.items()},
    }


def _card(
    item: int, before: Sequence[dict[str, Any]], after: Sequence[tuple[str, int, Sequence[dict[str, Any]]]]
) -> dict[str, Any]:
    row = before[item]
    said = [("untouched", -1, before), *after]
    return {
        "number": item + 1,
        "prompt": _cut(_prompt(row["prompt"])),
        "reference": _cut(words.said(row["reference"])),
        "answers": [
            {
                "swatch": figures.dot(place),
                "name": name,
                "right": bool(rows[item]["right"]),
                "text": _cut(words.said(rows[item]["answer"])),
            }
            for name, place, rows in said
        ],
    }


def _prompt(messages: Any) -> str:
    """The user's words where that is all there is; else every turn under its role."""
    if not isinstance(messages, list):
        return words.said(messages)
    turns = [(str(m.get("role", "")), words.said(m.get("content", ""))) for m in messages if isinstance(m, dict)]
    return turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {content}" for role, content in turns)


def _cut(content: str) -> str:
    if len(content) <= LONGEST:
        return content
    return f"{content[:LONGEST]}… ({words.whole(len(content) - LONGEST)} more characters)"
