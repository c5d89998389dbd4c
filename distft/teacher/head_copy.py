"""The copy of the teacher's output head that a cache of hidden states carries: with it, a hidden state is a whole distribution.

`teacher/head_file.py` says where it lies. It is committed before the first part, so that no part is without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distft.engine.load import DTYPES, LanguageModel
from distft.engine.world import World
from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.objectives.distributions import DenseHead, DenseRows, LogitShape
from distft.store.location import Location
from distft.store.manifest import Manifest, commit, fetch
from distft.store.put import put_file
from distft.teacher.head_file import CURE, HEAD, KIND, file_is_there, head_is_there, read_head_manifest
from distft.teacher.scores import Scores


def commit_head(folder: Location, teacher: LanguageModel, group: World) -> None:
    """Writes the copy, unless it is there. All ranks that hold the teacher together call this at once; the leading one writes."""
    [there] = group.total(group.leads and head_is_there(folder))
    if there:
        return
    weight_VT = torch.cat(group.gather(teacher.weight[: teacher.shape.rows].detach()))
    bias_V = None if teacher.bias is None else torch.cat(group.gather(teacher.bias[: teacher.shape.rows].detach()))
    if group.leads:
        _write(folder, weight_VT.cpu(), None if bias_V is None else bias_V.cpu(), teacher.shape)


def _write(folder: Location, weight_VT: Tensor, bias_V: Tensor | None, shape: LogitShape) -> None:
    from safetensors.torch import save_file

    tensors = {"weight": weight_VT.contiguous(), **({} if bias_V is None else {"bias": bias_V.contiguous()})}
    entry = put_file(folder, "head", "safetensors", lambda path: save_file(tensors, path))
    facts = {"scale": shape.scale, "softcap": shape.softcap}
    ours = Manifest(kind=KIND, identity={"teacher": folder.url.rsplit("/", 1)[-1]}, files=(entry,), facts=facts)
    theirs = commit(folder, ours, HEAD)
    if theirs.files == ours.files:
        return
    if file_is_there(folder, theirs):  # another writer was first
        folder.delete(entry.name)
    else:  # somebody removed the file, and the same teacher makes the same one
        folder.replace(HEAD, ours.to_json())


def read_head(folder: Location, staging: Path) -> DenseHead:
    """The copy, whose bytes are checked before they are parsed."""
    from safetensors.torch import load_file

    manifest = read_head_manifest(folder)
    if manifest is None:
        raise MissingArtifactError("The cache has hidden states and no copy of the teacher's head.", where=folder.url, help=CURE)
    try:
        path = fetch(folder, manifest.files[0], staging)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(
            f"The copy of the teacher's head is damaged. {error.problem}", where=folder.url, help=CURE
        ) from error  # fmt: skip
    tensors = load_file(path)
    weight_VT: Tensor = tensors["weight"]
    facts: dict[str, Any] = manifest.facts
    shape = LogitShape(rows=len(weight_VT), scale=facts["scale"], softcap=facts["softcap"])
    return DenseHead(weight_VT, tensors.get("bias"), shape)


def dense_rows(scores: list[Scores], head: DenseHead) -> DenseRows:
    """The hidden states of consecutive documents, as the loss wants them."""
    kind, width = head.weight_VT.dtype, head.weight_VT.shape[1]
    words: npt.NDArray[np.uint16] = np.concatenate([one.hidden for one in scores])
    tokens = sum(len(one) for one in scores)
    if words.nbytes != tokens * width * DTYPE_BYTES[kind]:
        raise CorruptArtifactError(
            f"{tokens} tokens have {words.nbytes:,} bytes of hidden states; a head of width {width} wants "
            f"{tokens * width * DTYPE_BYTES[kind]:,}.", where="the teacher cache", help="Run `distft cache verify` on it.",
        )  # fmt: skip
    hidden_NT = torch.from_numpy(words.view(np.int16)).view(kind).reshape(tokens, width)
    return DenseRows(hidden_NT=hidden_NT, head=head)


DTYPE_BYTES = {kind: torch.empty(0, dtype=kind).element_size() for kind in DTYPES.values()}
