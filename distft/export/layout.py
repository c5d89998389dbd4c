"""Which tensors an exported model consists of, under which names and in which files, known before a number is read.

Names and cuts are those of transformers' own `save_pretrained`: some architectures are stored otherwise than they are computed with
(names of old, experts apart that a module holds together), and what it would do is asked of it, with tensors that have no numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distft.engine.load import DTYPES
from distft.errors import ModelError
from distft.store.model_folder import INDEX, SINGLE, ModelFolder

ALIGNED = 8
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Source:
    """What becomes one or several stored tensors, one after another: a parameter, or a buffer, which is nobody's to train."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: tuple[Stored, ...]
    plain: bool
    """Whether it is stored as it is, so that any part of it can be written without the rest."""
    buffer: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A file and its tensors, in their order in it."""

    name: str
    tensors: tuple[Stored, ...]

    @property
    def size(self) -> int:
        """In bytes, without the head."""
        return sum(tensor.size for tensor in self.tensors)

    def head(self) -> bytes:
        """All that comes before the tensors' bytes in a safetensors file."""
        told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for one in self.tensors:
            told[one.name] = {"dtype": CODES[one.dtype], "shape": list(one.shape), "data_offsets": [place, place + one.size]}
            place += one.size
        text = json.dumps(told, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNED)
        return len(text).to_bytes(8, "little") + text


def sources(whole: Any, folder: ModelFolder, trained: Sequence[tuple[str, tuple[int, ...]]], dtype: str) -> list[Source] | None:
    """All that is stored of a model without numbers (`whole`), in the order in which a checkpoint gives what was `trained`; buffers,
    which it does not have, come first, with their numbers from the folder that training began with. None where a stored tensor is made
    of several parameters, for which they would have to be in memory together."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = dict(whole.state_dict(keep_vars=True))
    for name in whole._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, whole)
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    _check_trained(state, parameters, trained)
    stored_as = _cuts(whole, state)
    if stored_as is None:
        return None
    by_parameter = {id(parameters[name]): name for name in state if name in parameters}
    kept = [*(whole._keep_in_fp32_modules_strict or ())]  # as transformers loads them again, whatever it is asked for
    found = [_buffer(folder, name, stored_as[name]) for name in state if name not in parameters]
    for name, shape in trained:
        named = by_parameter.get(id(parameters[name]))
        if named is None:
            continue  # one that transformers never stores
        precise = any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)
        kind = torch.float32 if precise else DTYPES[dtype]
        tensors = tuple(Stored(one, tuple(tensor.shape), kind) for one, tensor in stored_as[named].items())
        plain = all(tensor is state[named] for tensor in stored_as[named].values())
        if not plain and name != named:
            return None  # what it becomes is told by the other name; no architecture is known to do that
        found.append(Source(name, shape, kind, tensors, plain))
    return found


def shards(found: Sequence[Source], shard_bytes: int) -> list[Shard]:
    """The files, none larger than `shard_bytes` but those of a single tensor that is. A tensor begins where its numbers may lie."""
    files: list[list[Stored]] = [[]]
    size = 0
    for tensor in (tensor for source in found for tensor in source.stored):
        if files[-1] and (size + tensor.size > shard_bytes or size % tensor.dtype.itemsize):
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.size
    stem, suffix = SINGLE.rsplit(".", 1)
    names = [f"{stem}-{n:05d}-of-{len(files):05d}.{suffix}" for n in range(1, len(files) + 1)] if len(files) > 1 else [SINGLE]
    return [Shard(name, tuple(tensors)) for name, tensors in zip(names, files, strict=True)]


def index(files: Sequence[Shard], parameters: int) -> dict[str, bytes]:
    """The file that says which tensor is where; none for a single file."""
    if len(files) == 1:
        return {}
    document = {
        "metadata": {"total_parameters": parameters, "total_size": sum(file.size for file in files)},
        "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
    }
    return {INDEX: (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()}


def _check_trained(
    state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], trained: Sequence[tuple[str, tuple[int, ...]]]
) -> None:
    """The checkpoint's parameters are the model's, each of its shape, and none is missing; tied ones have one name of several."""
    unknown = [name for name, shape in trained if name not in parameters or tuple(parameters[name].shape) != shape]
    if unknown:
        raise RuntimeError(f"the checkpoint is not of this model, which has no such {unknown[:5]}")
    there = {id(parameters[name]) for name, _ in trained}
    bare = sorted(name for name in state if name in parameters and id(parameters[name]) not in there)
    if bare:
        raise RuntimeError(f"the checkpoint has no weights for {bare[:5]}")


def _cuts(whole: Any, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
    """What each entry of the state is stored as, by name; None unless transformers makes of each alone what it makes of all
    together."""
    from transformers.core_model_loading import revert_weight_conversion

    together = revert_weight_conversion(whole, dict(state))
    unchanged = {id(tensor): name for name, tensor in together.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if id(tensor) in unchanged:
            found[name] = {unchanged[id(tensor)]: tensor}
            continue
        try:
            found[name] = revert_weight_conversion(whole, {name: tensor})
        except Exception:  # each architecture's conversion fails in its own way without the others: then all are stored together
            return None
    apart = {stored: tensor.shape for tensors in found.values() for stored, tensor in tensors.items()}
    alike = apart == {stored: tensor.shape for stored, tensor in together.items()}
    return found if alike and len(apart) == sum(len(tensors) for tensors in found.values()) else None


def _buffer(folder: ModelFolder, name: str, stored_as: dict[str, Tensor]) -> Source:
    """A buffer as the folder has it: no step changes one, and no checkpoint has one."""
    from safetensors import safe_open

    [(stored, tensor)] = stored_as.items()
    for path in folder.weight_files():
        with safe_open(path, framework="pt") as file:
            if stored in file.keys():  # noqa: SIM118  (safe_open is no dict)
                found = file.get_tensor(stored)
                if found.shape == tensor.shape and found.dtype in CODES:
                    kept = Stored(stored, tuple(found.shape), found.dtype)
                    return Source(name, kept.shape, kept.dtype, (kept,), plain=True, buffer=found)
    raise ModelError(f"The model's weight files have no {stored} of the shape {list(tensor.shape)}.", where=str(folder.path),
                     help="Take a complete checkpoint.")  # fmt: skip
