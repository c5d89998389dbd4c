"""Where a cache of hidden states keeps its teacher's output head, and whether it is there and of the right form; torch-free, for all
that looks after a cache and computes nothing with it.

`teacher/<id>/HEAD.json` is a manifest of one safetensors file: `weight` [rows, width], and `bias` [rows] where the teacher has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.store.location import Location
from distft.store.manifest import Manifest, read_manifest

HEAD = "HEAD.json"
KIND = "teacher-head"
WORDS = {"float32": 2, "bfloat16": 1}
"""16-bit words of a number in a teacher's dtype."""
EXPONENT = 0x7F80
"""Bits that are all ones in a NaN or an infinity alone, in a number's last word; the same in both dtypes."""
CURE = (
    f"Remove {HEAD} from the cache's folder if it is there, then run `distft score` with this config: it writes the copy again and"
    " reads no document twice."
)

_NAMES = {"F32": "float32", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """What a head's file holds."""

    rows: int
    width: int
    dtype: str


def keeps_hidden(identity: Mapping[str, Any]) -> bool:
    """Whether a cache with this identity has hidden states, and so a head."""
    return identity["distribution"]["kind"] == "hidden"


def read_head_manifest(folder: Location) -> Manifest | None:
    """None where no head is committed. What is wrong with it is told with the cure that a head has, and no other artifact."""
    try:
        manifest = read_manifest(folder, HEAD)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(error.problem, where=error.where, help=CURE) from error
    if manifest is not None and (manifest.kind != KIND or len(manifest.files) != 1):
        raise CorruptArtifactError(
            f"{HEAD} is a {manifest.kind} of {len(manifest.files)} files, where a {KIND} of one should be.", where=folder.url,
            help=CURE,
        )  # fmt: skip
    return manifest


def head_is_there(folder: Location) -> bool:
    """Whether the head is committed and its file has the size that it should have. Reads no byte of it: whoever uses it does."""
    return (manifest := read_head_manifest(folder)) is not None and file_is_there(folder, manifest)


def file_is_there(folder: Location, manifest: Manifest) -> bool:
    [entry] = manifest.files
    try:
        return folder.size(entry.name) == entry.size
    except MissingArtifactError:
        return False


def head_bytes(folder: Location) -> int:
    """What the head takes; 0 in a cache without one."""
    manifest = read_head_manifest(folder)
    return 0 if manifest is None else manifest.files[0].size


def head_form(path: Path) -> HeadForm:
    """The form of a head's file, whose bytes were checked, from its own header; a ValueError says why it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            found = {name: (tensors.get_slice(name).get_dtype(), tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    kind, shape = found.get("weight", ("", []))
    if len(shape) != 2 or kind not in _NAMES or found.keys() - {"weight", "bias"}:
        raise ValueError(f"it holds {found}")
    if "bias" in found and found["bias"] != (kind, shape[:1]):
        raise ValueError(f"its bias {found['bias']} does not fit its weight {kind, shape}")
    return HeadForm(rows=shape[0], width=shape[1], dtype=_NAMES[kind])
