"""The copy of the teacher's output head that a cache of hidden states carries: with it, a hidden state is a whole distribution.

`teacher/<id>/HEAD.json` names one safetensors file. It is committed before the first part, so that no part is without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distft.engine.load import DTYPES, LanguageModel
from distft.engine.world import World
from distft.errors import CorruptArtifactError, MissingArtifactError
from distft.objectives.distributions import DenseHead, DenseRows, LogitShape
from distft.store.digest import file_sha256
from distft.store.local import explained
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest, commit, fetch, read_manifest
from distft.teacher.scores import Scores

HEAD = "HEAD.json"


def commit_head(folder: Location, teacher: LanguageModel, group: World) -> None:
    """Writes the copy, unless it is there. All ranks that hold the teacher together call this at once; the leading one writes."""
    [there] = group.total(group.leads and folder.exists(HEAD))
    if there:
        return
    weight_VT = torch.cat(group.gather(teacher.weight[: teacher.shape.rows].detach()))
    bias_V = None if teacher.bias is None else torch.cat(group.gather(teacher.bias[: teacher.shape.rows].detach()))
    if group.leads:
        _write(folder, weight_VT.cpu(), None if bias_V is None else bias_V.cpu(), teacher.shape)


def _write(folder: Location, weight_VT: Tensor, bias_V: Tensor | None, shape: LogitShape) -> None:
    from safetensors.torch import save_file

    tensors = {"weight": weight_VT.contiguous(), **({} if bias_V is None else {"bias": bias_V.contiguous()})}
    name = f"data/head-{uuid4().hex}.safetensors"
    path = folder.scratch(name)
    try:
        with explained("write", path):
            save_file(tensors, path)
            entry = FileEntry(name=name, size=path.stat().st_size, sha256=file_sha256(path))
        folder.upload(name, path)
    finally:
        path.unlink(missing_ok=True)
    facts = {"scale": shape.scale, "softcap": shape.softcap}
    identity = {"teacher": folder.url.rsplit("/", 1)[-1]}
    committed = commit(folder, Manifest(kind="teacher-head", identity=identity, files=(entry,), facts=facts), HEAD)
    if committed.files[0].name != name:  # another writer was first
        folder.delete(name)


def read_head(folder: Location, staging: Path) -> DenseHead:
    """The copy, whose bytes are checked before they are parsed."""
    from safetensors.torch import load_file

    manifest = read_manifest(folder, HEAD)
    if manifest is None:
        raise MissingArtifactError("The cache has hidden states and no copy of the teacher's head.", where=folder.url,
                                   help="Run `distft score` with this config.")  # fmt: skip
    tensors = load_file(fetch(folder, manifest.files[0], staging))
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
