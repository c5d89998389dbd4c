"""Is what ranks hold of a model what its files say? Each looks at its own share, and all come to the same end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from distft.engine.base import share
from distft.engine.load import DTYPES
from distft.engine.world import World
from distft.errors import ModelError
from distft.store.model_folder import ModelFolder


def blank_model(folder: ModelFolder, *, dtype: str) -> nn.Module:
    """The architecture with no weights, for its names and shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    except (ValueError, OSError, ImportError) as error:
        raise ModelError(
            f"The model cannot be loaded: {error}", where=str(folder.path),
            help="Copy or download the folder again, and see that this transformers knows the architecture.",
        ) from error  # fmt: skip


def check_shapes(folder: ModelFolder, blank: nn.Module) -> None:
    """Before ranks wait for each other: the one that copies a tensor of another shape would fail alone."""
    shapes = {name: tuple(tensor.shape) for name, tensor in blank.state_dict().items()}
    wrong = [
        f"{name} {found} instead of {shapes[name]}"
        for name, (found, _) in _stored(folder).items()
        if name in shapes and found != shapes[name]
    ]
    if wrong:
        raise ModelError(
            f"The weight files hold {len(wrong)} tensors in another shape: {', '.join(sorted(wrong)[:5])}.", where=str(folder.path),
            help="Random numbers would stand in for them. Take a complete checkpoint.",
        )  # fmt: skip


def check_one_dtype(folder: ModelFolder, blank: nn.Module, dtype: str) -> None:
    """ZeRO-3 holds all weights in the dtype of the passes, and some architectures want a few of theirs in float32 always."""
    patterns = [name.replace("*", ".*") for name in getattr(blank, "_keep_in_fp32_modules_strict", None) or ()]
    kept = [name for name, _ in blank.named_parameters() if any(re.search(pattern, name) for pattern in patterns)]
    if kept and dtype != "float32":
        raise ModelError(
            f"{type(blank).__name__} keeps {len(kept)} weights in float32 ({', '.join(kept[:3])}); ZeRO-3 would take {dtype}.",
            where=str(folder.path), help="Set model.dtype=float32, or train.engine=local.",
        )  # fmt: skip


def check_bytes(
    folder: ModelFolder, parameters: Iterable[tuple[str, nn.Parameter]], local: Callable[[nn.Parameter], Tensor], world: World
) -> None:
    """Compares each rank's share of every parameter with the files, and refuses what is not finite. `local` gives the share, which may
    be padded. What the files have under no such name (transformers renames and joins some) is checked for being finite alone."""
    stored = _stored(folder)
    named = list(parameters)
    differs, infinite = torch.zeros(len(named)), torch.zeros(len(named))
    for number, (name, parameter) in enumerate(named):
        shape = tuple(parameter.ds_shape)  # pyright: ignore[reportAttributeAccessIssue]
        start, stop = share(prod(shape), world.rank, world.size)
        mine = local(parameter)[: stop - start]
        infinite[number] = not bool(mine.isfinite().all())
        if name in stored and start < stop and not infinite[number]:
            differs[number] = not torch.equal(_elements(stored[name][1], name, shape, start, stop).to(mine), mine)
    told = "Use the transformers and DeepSpeed that this version was tested with."
    for flags, problem, help in (
        (infinite, "are not finite", "Take a sound checkpoint, or another model.dtype if the files' numbers are finite."),
        (differs, "are not in memory as the files have them", told),
    ):
        bad = [name for (name, _), flag in zip(named, world.max_(flags).tolist(), strict=True) if flag]
        if bad:
            listed = f"{len(bad)} of the model's weights {problem}: {', '.join(bad[:5])}."
            raise ModelError(listed, where=str(folder.path), help=help)


def _stored(folder: ModelFolder) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and file of each stored tensor."""
    from safetensors import safe_open

    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    for path in folder.weight_files():
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
            found[name] = (tuple(file.get_slice(name).get_shape()), file)
    return found


def _elements(file: Any, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements of a flattened tensor, of which only the rows that hold them are read."""
    row = prod(shape[1:])
    first = start // row
    rows = file.get_slice(name)[first : -(-stop // row)]
    return rows.reshape(-1)[start - first * row : stop - first * row]
