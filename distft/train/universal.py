"""DeepSpeed's universal format: every parameter whole, in files of its own, for any number of ranks.

    FOLDER/latest_universal                                 the name of the folder below
    FOLDER/TAG/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt  a tensor: alone and flat (of ZeRO-3), or under "param" in its shape
    FOLDER/TAG/zero/PARAMETER/step.pt                       the optimizer's count of its steps; of ZeRO-3 there is none
    FOLDER/TAG/zero/optimizer_state.pt                      that count, and the settings of the optimizer's groups
    FOLDER/TAG/*_model_states.pt                            the engine's counters, the parameters' shapes, and whatever its user added

All are made by torch.save, which writes pickle. They are read by torch's own reader of tensors and plain values alone
(`weights_only`): nothing in them is ever run, and a file that holds anything else is refused by its name. That is why
optimizer_state.pt is not opened: DeepSpeed keeps an object of its own there, and what counts is said elsewhere too.

DeepSpeed is not needed here. What ZeRO-3 asks of a folder, and what it does with it, is pinned by tests that let it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.errors import ModelError, StoreError
from distft.store.local import explained, sync_file
from distft.store.location import check_name
from distft.train.rank_files import Parameters, Part

LATEST = "latest_universal"
FILES: dict[Part, str] = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}
COUNT = "step.pt"
MODEL_STATES = ("zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt")
"""Of ZeRO-3 and of the stages below it."""
PIECE = 1 << 22
"""Elements that are looked at together."""


def write_tensor(tag: Path, name: str, part: Part, tensor: Tensor) -> None:
    """A parameter or one of its moments, in its shape."""
    _save({"param": tensor}, tag / "zero" / check_name(name, str(tag)) / FILES[part])


def write_rest(tag: Path, parameters: Parameters, step: int, told: dict[str, Any]) -> None:
    """All but the tensors. `told` is what DeepSpeed hands to whoever loads this, as client state under "distft".

    Of the optimizer's groups no settings are told: ZeRO-3 would put those of the first on all, weight decay on norms included, and
    without any an engine keeps its own. The count is a plain number: a tensor would be one and the same for all groups of an engine,
    and every one of them would raise it in every step."""
    for name, _ in parameters:
        _save(step, tag / "zero" / name / COUNT)
    state = {"state": {0: {"step": step}}, "param_groups": [{"params": []}]}
    _save({"optimizer_state_dict": state}, tag / "zero" / "optimizer_state.pt")
    counters = {"global_steps": step, "skipped_steps": 0, "dp_world_size": 1, "mp_world_size": 1, "lr_scheduler": None}
    shapes = [{name: torch.Size(shape) for name, shape in parameters}]
    _save({"module": {}, "param_shapes": shapes, **counters, "distft": told}, tag / MODEL_STATES[0])


@dataclass(frozen=True, slots=True)
class Universal:
    """A folder of this format that someone else wrote; `tag` is the one that holds `zero`."""

    tag: Path

    @classmethod
    def open(cls, folder: Path) -> Universal:
        """`folder` is the tag's or the one above it, which says which tag is the newest."""
        with explained("read", folder):
            if (folder / "zero").is_dir():
                return cls(folder)
            latest = folder / LATEST
            tag = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
            if tag and tag == Path(tag).name and (folder / tag / "zero").is_dir():
                return cls(folder / tag)
            native = any(folder.glob("*_optim_states.pt")) or any(folder.glob("*/*_optim_states.pt"))
        raise ModelError(
            f"{folder.name} is no checkpoint in DeepSpeed's universal format: it has neither zero/ nor a {LATEST} that names a folder "
            "which has.", where=str(folder),
            help="It is DeepSpeed's own format. Convert it: python -m deepspeed.checkpoint.ds_to_universal --input_folder FOLDER/TAG "
                 "--output_folder FOLDER/TAG_universal" if native else "Give the folder that ds_to_universal wrote.",
        )  # fmt: skip

    def names(self) -> list[str]:
        """What has a folder of its own, sorted."""
        with explained("list", self.tag / "zero"):
            return sorted(path.name for path in (self.tag / "zero").iterdir() if path.is_dir())

    def files(self, name: str) -> dict[Part, Path]:
        """Where a parameter's numbers should be."""
        return {part: self.tag / "zero" / name / file for part, file in FILES.items()}

    def step(self, names: Sequence[str], states: dict[str, Any]) -> int | None:
        """How many steps the optimizer has taken: the count of all these parameters or, where they have none, that of the engine's
        `states`. None where neither says it."""
        files = {name: path for name in names if (path := self.tag / "zero" / name / COUNT).is_file()}
        counts = {name: _count(path, _load(path)) for name, path in files.items()}
        if len(set(counts.values())) > 1:
            low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            raise ModelError(
                f"The optimizer has taken {counts[low]} steps of {low} and {counts[high]} of {high}.", where=str(self.tag),
                help="A run of distft has one count for all parameters. Such a checkpoint cannot be its own.",
            )  # fmt: skip
        if counts:
            return next(iter(counts.values()))
        if "global_steps" not in states:
            return None
        where = self.tag / MODEL_STATES[0]
        return _count(where, states["global_steps"]) - _count(where, states.get("skipped_steps", 0))

    def states(self) -> dict[str, Any]:
        """What the engine's own file says; empty where there is none."""
        path = next((path for name in MODEL_STATES if (path := self.tag / name).is_file()), None)
        states = {} if path is None else _load(path)
        return states if isinstance(states, dict) else {}


def shapes_of(states: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that the engine's own file tells; empty where it does not, or tells those of parts of parameters."""
    if states.get("mp_world_size") == 1:
        with suppress(TypeError, ValueError, AttributeError):
            groups = states.get("param_shapes") or ()
            return {str(name): tuple(int(n) for n in shape) for group in groups for name, shape in group.items()}
    return {}


def read_tensor(path: Path) -> Tensor:
    """The numbers of a file, which stay on the disk until they are looked at; refused unless they are plain float32."""
    found = _load(path)
    if isinstance(found, dict):
        found = found.get("param")
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.device.type != "cpu":
        raise _wrong(path, "holds no plain tensor")
    if found.dtype != torch.float32:
        raise _wrong(path, f"holds {str(found.dtype).removeprefix('torch.')} and not float32")
    return found.detach()


def check_numbers(path: Path, part: Part, numbers: Tensor) -> None:
    """Refuses what an optimizer cannot go on from."""
    if not bool(numbers.isfinite().all()):
        raise _wrong(path, "holds numbers that are not finite")
    if part == "exp_avg_sq" and bool((numbers < 0).any()):
        raise _wrong(path, "holds mean squares below 0")


def _load(path: Path) -> Any:
    with explained("read", path):
        if not path.is_file():
            raise _wrong(path, "is not there")
        path.open("rb").close()
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever torch's reader says of bytes that it will not take
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise _wrong(path, f"cannot be read as tensors and plain values ({told[:160]})") from error


def _count(path: Path, value: Any) -> int:
    """A whole number, in whatever a plain value or a tensor of one keeps it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < 0
        or value != int(value)
    ):
        raise _wrong(path, f"says {str(value)[:40]} where steps are counted")
    return int(value)


def _wrong(path: Path, problem: str) -> ModelError:
    return ModelError(
        f"{path.parent.name}/{path.name} {problem}.", where=str(path),
        help="Copy or convert the checkpoint again. Nothing in such a file is run, so what needs to be cannot be taken over.",
    )  # fmt: skip


def _save(value: Any, path: Path) -> None:
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(value, path)
        except RuntimeError as error:  # how torch tells of a full disk
            raise StoreError(f"{path} could not be written: {error}", where=str(path), help="Make room there.") from error
        sync_file(path)
