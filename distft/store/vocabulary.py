"""What each token id of a model folder means, read from the tokenizer's files as they lie there, and how two folders differ, id by id.

For errors alone: whether two vocabularies are the same is decided by their bytes (`ModelFolder.tokenizer_identity`). Nothing of a
tokenizer is loaded, so a file of an unknown form says nothing here instead of failing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.store.model_folder import ModelFolder

SHOWN = 5
TOKEN_CHARS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyDifference:
    """Ids in ascending order."""

    same: int
    """Ids that mean the same token in both."""
    other: tuple[tuple[int, str, str], ...]
    """Ids that both have for different tokens: id, teacher's token, model's token."""
    only_teacher: tuple[int, ...]
    only_model: tuple[int, ...]

    def __str__(self) -> str:
        """Counts, the first few ids, and which ids one side alone has."""
        both = self.same + len(self.other)
        lines = [f"{len(self.other):,} of the {both:,} ids that both have mean another token{':' if self.other else '.'}"]
        if self.other:
            lines.append("  id: teacher's token / model's token")
            lines += [f"  {number:,}: {_token(teacher)} / {_token(model)}" for number, teacher, model in self.other[:SHOWN]]
        if len(self.other) > SHOWN:
            lines.append(f"  ... and {len(self.other) - SHOWN:,} more")
        for ids, owner in ((self.only_teacher, "teacher"), (self.only_model, "model")):
            if ids:
                lines.append(f"{len(ids):,} {'id is' if len(ids) == 1 else 'ids are'} only in the {owner}: {_spans(ids)}")
        return "\n".join(lines)


def compare_vocabularies(teacher: ModelFolder, model: ModelFolder) -> str:
    """How two folders whose vocabularies have different bytes differ, for a person; "" where one cannot be read id by id."""
    theirs, ours = read_vocabulary(teacher), read_vocabulary(model)
    if not theirs or not ours:
        return ""
    found = difference(theirs, ours)
    if found.other or found.only_teacher or found.only_model:
        return str(found)
    parts = _differing_parts(teacher, model)
    return (
        f"All {found.same:,} ids mean the same tokens, but the files differ in {', '.join(parts) or 'how they are written'}: "
        "a copy of the teacher's folder with the model's tokenizer files would serve."
    )


def difference(teacher: dict[int, str], model: dict[int, str]) -> VocabularyDifference:
    both = sorted(teacher.keys() & model.keys())
    other = tuple((number, teacher[number], model[number]) for number in both if teacher[number] != model[number])
    return VocabularyDifference(
        same=len(both) - len(other), other=other,
        only_teacher=tuple(sorted(teacher.keys() - model.keys())), only_model=tuple(sorted(model.keys() - teacher.keys())),
    )  # fmt: skip


def read_vocabulary(folder: ModelFolder) -> dict[int, str] | None:
    """The token of every id, as the files spell it; added tokens stand over others. None where the files are of another form, as
    sentencepiece's are."""
    path = folder.path
    whole = _json(path / "tokenizer.json")
    if whole is not None:
        return _whole(whole)
    table = _json(path / "vocab.json")
    if table is not None:
        found = _by_id(table)
    else:
        lines = _text(path / "vocab.txt")
        found = dict(enumerate(lines.removesuffix("\n").split("\n"))) if lines else None
    added = _by_id(_json(path / "added_tokens.json") or {})
    return None if found is None or added is None else found | added


def _whole(document: Any) -> dict[int, str] | None:
    """tokenizer.json: a table, or a list of (token, score) whose places are the ids."""
    model = document.get("model") if isinstance(document, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        sound = all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocabulary)
        found = {number: entry[0] for number, entry in enumerate(vocabulary)} if sound else None
    else:
        found = _by_id(vocabulary)
    added = document.get("added_tokens") or [] if isinstance(document, dict) else []
    if found is None or not isinstance(added, list):
        return None
    for token in added:
        if not isinstance(token, dict) or type(token.get("id")) is not int or not isinstance(token.get("content"), str):
            return None
        found[token["id"]] = token["content"]
    return found


def _by_id(table: Any) -> dict[int, str] | None:
    if not isinstance(table, dict) or not all(type(number) is int for number in table.values()):
        return None
    return {number: token for token, number in table.items()}


def _differing_parts(teacher: ModelFolder, model: ModelFolder) -> list[str]:
    """The entries of the two tokenizer.json that differ, those of its `model` one by one."""
    flat: list[dict[str, Any]] = []
    for folder in (teacher, model):
        document = _json(folder.path / "tokenizer.json")
        parts = dict(document) if isinstance(document, dict) else {}
        inner = parts.pop("model", None)
        flat.append({**parts, **({f"model.{key}": value for key, value in inner.items()} if isinstance(inner, dict) else {})})
    one, two = flat
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


def _spans(ids: Iterable[int]) -> str:
    """Runs of ids, the first few: `3, 151,643 to 151,664`."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in runs[:SHOWN]]
    return "; ".join([*told, f"and {len(runs) - SHOWN:,} more runs"] if len(runs) > SHOWN else told)


def _token(text: str) -> str:
    """Quoted, so that spaces and control characters show."""
    return repr(text if len(text) <= TOKEN_CHARS else text[:TOKEN_CHARS] + "...")


def _json(path: Path) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
