"""Reads a run file: YAML, then overrides, then the schema; every problem is reported at once, by its dotted path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from distft.config.schema import Run
from distft.errors import ConfigError
from distft.progress import say

_EXAMPLES = "configs/ holds complete, commented examples."
_OVERRIDE = "Write section.key=value, as in train.lr=2e-5 or evaluate.tasks[0].limit=100."


def load_config(path: Path, overrides: Sequence[str] = ()) -> Run:
    """The run in a file with overrides `section.key=value` laid over it, left to right."""
    document = _read(path)
    for override in _kinds_first(overrides):
        _lay_over(document, override)
    return validate(document, where=str(path))


def validate(document: dict[str, Any], *, where: str) -> Run:
    """The run that a parsed document describes, or a ConfigError that lists everything wrong with it."""
    try:
        return Run.model_validate(document)
    except ValidationError as error:
        problems = [_sentence(dict(detail)) for detail in error.errors(include_url=False)]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigError("\n".join([f"{count} in the run file:", *(f"  {p}" for p in problems)]), where=where,
                      help="README, section 'The run file', explains every key.")  # fmt: skip


def dump(run: Run) -> str:
    """The resolved run as YAML: every key, defaults included. Holds no secrets, since the schema has no place for one."""
    return yaml.dump(run.model_dump(mode="json"), Dumper=_Plain, sort_keys=False, allow_unicode=True)


class _Strict(yaml.SafeLoader):
    """YAML in which a key stands once and 1e-5 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a list or a mapping stands as a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Plain(yaml.SafeDumper):
    """Writes what `_Strict` reads: a string that looks like a number to it is quoted."""


# YAML 1.1 reads 1e-5 as a string, since it wants a dot and a sign; every other tool reads a number.
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
_Strict.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Plain.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Strict)  # noqa: S506  (a SafeLoader subclass)


def _read(path: Path) -> dict[str, Any]:
    def refused(problem: str, *, place: str = "", help: str = _EXAMPLES) -> ConfigError:
        return ConfigError(problem, where=f"{path}{place}", help=help)

    try:
        document = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise refused("There is no such run file.") from error
    except IsADirectoryError as error:
        raise refused("This is a folder; a run file is wanted.") from error
    except OSError as error:
        raise refused(f"The run file cannot be read: {error.strerror}.", help="Check its permissions.") from error
    except UnicodeDecodeError as error:
        raise refused(f"The run file is not UTF-8: {error.reason} at byte {error.start}.", help="Save it as UTF-8.") from error
    except RecursionError as error:
        raise refused("The run file is nested too deeply.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        raise refused(
            f"The run file is not valid YAML: {problem}.", place=f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        ) from error
    if not isinstance(document, dict):
        raise refused(f"A run file is a mapping of sections; this is {_shape(document)}.")
    return document


def _kinds_first(overrides: Sequence[str]) -> list[str]:
    """The overrides with each section's kind before its other keys: a new kind sweeps out the old one's keys, not those beside it.
    It never passes an earlier word on the same kind, or one on the section as a whole: of two, the last counts."""
    ordered: list[str] = []
    for override in overrides:
        dotted, place = override.partition("=")[0], len(ordered)
        section = dotted.removesuffix("kind") if dotted.endswith(".kind") else None
        for index in reversed(range(len(ordered))):
            other = ordered[index].partition("=")[0]
            if section is None or other == dotted or section.startswith((f"{other}.", f"{other}[")):
                break
            if other.startswith(section):
                place = index
        ordered.insert(place, override)
    return ordered


def _lay_over(document: dict[str, Any], override: str) -> None:
    """Values are not repeated in errors: what stands in the wrong place may be a secret."""
    dotted, equals, text = override.partition("=")
    parts = _parts(dotted)
    if not equals or not parts:
        raise ConfigError(f"{dotted!r} is not an override.", where="command line", help=_OVERRIDE)
    try:
        value = _parse(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError("The override's value is not valid YAML.", where=dotted,
                          help="Quote it for the shell: 'a.b=[1, 2]'.") from error  # fmt: skip
    section: Any = document
    for depth, (part, after) in enumerate(pairwise(parts), 1):
        if isinstance(part, str):
            section.setdefault(part, _default_kind(parts[:depth]))
        section = section[part]
        if isinstance(after, str) and not isinstance(section, dict):
            raise ConfigError(f"The override reaches into {part!r}, which is not a section.", where=dotted, help=_OVERRIDE)
        if isinstance(after, int) and not 0 <= after < _length(section):
            raise ConfigError(f"{part!r} has {_length(section)} items, counted from 0.", where=dotted, help=_OVERRIDE)
    last = parts[-1]
    old = section.get(last) if isinstance(last, str) else section[last]
    if isinstance(old, dict) and isinstance(value, dict):
        raise ConfigError(
            "The override would replace a whole section.", where=dotted, help=f"Override its keys one by one: {dotted}.KEY=VALUE."
        )
    # Another kind brings other keys: those of the old kind would only be complained about.
    if last == "kind" and old not in (None, value):
        dropped = sorted(key for key in section if key != last)
        if dropped:
            say(f"{dotted}={value}: {', '.join(dropped)} belonged to kind {old} and count no more")
        section.clear()
    section[last] = value


def _default_kind(path: list[str | int]) -> dict[str, str]:
    """What a section that the file leaves out begins with when one of its keys is overridden: its default's kind, if it has one."""
    default: Any = None
    model: type[BaseModel] | None = Run
    for part in path:
        field = model.model_fields.get(str(part)) if model else None
        default = field.default if field else None
        model = type(default) if isinstance(default, BaseModel) else None
    kind = getattr(default, "kind", None)
    return {"kind": kind} if kind else {}


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


_PIECE = re.compile(r"([^.\[\]]+)((?:\[\d+\])*)")


def _parts(dotted: str) -> list[str | int]:
    """`a.b[0].c` as a, b, 0, c; empty when it is no such path."""
    parts: list[str | int] = []
    for piece in dotted.split("."):
        match = _PIECE.fullmatch(piece)
        if match is None:
            return []
        parts += [match[1], *map(int, re.findall(r"\d+", match[2]))]
    return parts


def _sentence(detail: dict[str, Any]) -> str:
    """One problem, as `path: what is wrong; what may stand there`."""
    path = _dotted(detail["loc"])
    kind, given = detail["type"], detail.get("input")
    if kind == "missing":
        return f"{path}: is missing"
    if kind == "extra_forbidden":
        wrong = str(detail["loc"][-1])
        near = difflib.get_close_matches(wrong, list(_siblings(detail["loc"])), n=3, cutoff=0.5)
        near.sort(key=lambda key: not key.startswith(wrong))  # stable: a key that goes on where it ends, or else the nearest
        known = ", ".join(sorted(_siblings(detail["loc"])))
        return f"{path}: no such key; " + (f"did you mean {near[0]!r}?" if near else f"known are {known}")
    if kind == "union_tag_not_found":
        return f"{path}.kind: is missing; one of {detail['ctx'].get('expected_tags') or _tags(detail['loc'])}"
    if kind == "union_tag_invalid":
        expected = [tag.strip().strip("'") for tag in detail["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(str(detail["ctx"]["tag"]), expected, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{path}.kind: {detail['ctx']['tag']!r} is none of {', '.join(expected)}{hint}"
    if kind in ("model_type", "model_attributes_type") and given is None:
        return f"{path}: is an empty section; give it keys or leave it out"
    if kind == "tuple_type":
        return f"{path}: should be a list"
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    if kind == "secret" or (kind in ("model_type", "model_attributes_type") and isinstance(given, str)):
        return f"{path}: {message}"  # not repeated: a password, or an address or a key that someone put for a whole section
    return (
        f"{path}: {given!r}: {message}" if isinstance(given, str | int | float | bool) or given is None else f"{path}: {message}"
    )


def _dotted(location: tuple[Any, ...]) -> str:
    """The path as an override would write it: pydantic's location without union tags, and with [n] for places in a list."""
    text = ""
    for part in _without_tags(location):
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text or "(the whole file)"


def _without_tags(location: tuple[Any, ...]) -> Iterator[Any]:
    """Drops the parts of a location that name a union's branch: where a union stands, the next string is its tag."""
    annotation: Any = Run
    for part in location:
        branches = {
            branch.model_fields["kind"].annotation: branch for branch in _models(annotation) if "kind" in branch.model_fields
        }
        tags = {get_args(kind)[0]: branch for kind, branch in branches.items()}
        if len(_models(annotation)) > 1 and part in tags:
            annotation = tags[part]
            continue
        yield part
        annotation = _step(annotation, part)


def _step(annotation: Any, part: Any) -> Any:
    """The annotation one key or list place further in."""
    if isinstance(part, int):
        return next(iter(get_args(annotation)), None) if get_origin(annotation) is tuple else annotation
    for model in _models(annotation):
        if part in model.model_fields:
            return model.model_fields[part].annotation
    return None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _siblings(location: tuple[Any, ...]) -> set[str]:
    """The keys that may stand where an unknown one stood."""
    annotation: Any = Run
    for part in location[:-1]:
        tagged = [
            m for m in _models(annotation) if "kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation)
        ]
        annotation = tagged[0] if len(_models(annotation)) > 1 and tagged else _step(annotation, part)
    return {key for model in _models(annotation) for key in model.model_fields}


def _tags(location: tuple[Any, ...]) -> str:
    annotation: Any = Run
    for part in _without_tags(location):
        annotation = _step(annotation, part)
    return ", ".join(get_args(m.model_fields["kind"].annotation)[0] for m in _models(annotation))


def _shape(document: Any) -> str:
    return "empty" if document is None else f"a {type(document).__name__}"
