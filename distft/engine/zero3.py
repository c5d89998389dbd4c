"""DeepSpeed's ZeRO-3 under our step: each rank holds its share of weights, gradients and optimizer, and no rank ever all.

DeepSpeed partitions, gathers and reduces. What a step means stays `Stepper`'s: the normaliser, the norm, clipping, and that nothing
changes after a number that is none (DeepSpeed itself would pass such a step over in silence). DeepSpeed averages gradients over
ranks, so a pass's loss is multiplied by their number. All that reads a weight runs inside the forward of one module (`_Inside`): that
is where DeepSpeed gathers, and where it arms what gathers again on the way back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distft.config.schema import Model, Train
from distft.engine import zero3_settings
from distft.engine.base import MicroBatch, Slice, Wanted, share
from distft.engine.head import TrainedModel, measure_batch
from distft.engine.load import DTYPES, LanguageModel, read_model, take_apart
from distft.engine.sequence import share_rows
from distft.engine.sharded import blank_model, check_bytes, check_one_dtype, check_shapes
from distft.engine.slices import MOMENTS, PARTS, Taken, cut
from distft.engine.step import Stepper, adamw, to_device, whole_shape
from distft.engine.world import World, open_group, this_device
from distft.objectives.loss import TokenValues
from distft.store.model_folder import ModelFolder


class _Inside(nn.Module):
    """Does some work where the model's weights can be read."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, work: Callable[[], Tensor | None]) -> Tensor | None:
        return work()


class Zero3Engine(Stepper):
    """See `distft.engine.base.Engine`. All ranks make one at once."""

    def __init__(self, folder: ModelFolder, model: Model, config: Train, world: World, *, head_rows: int) -> None:
        super().__init__(config, world, this_device())
        deepspeed = _deepspeed()
        blank = blank_model(folder, dtype=model.dtype)
        check_shapes(folder, blank)
        check_one_dtype(folder, blank, model.dtype)
        settings = zero3_settings.settings(
            config, dtype=model.dtype, sizes=zero3_settings.Sizes.of(blank), cuda=self.device.type == "cuda"
        )
        with _quiet():
            whole = _read_sharded(folder, model, settings)
            self.parameters: dict[str, Any] = {name: p for name, p in whole.named_parameters() if p.requires_grad}
            optimizer = adamw([(p, p) for p in self.parameters.values()], config)
            self.engine, *_ = deepspeed.initialize(
                model=_Inside(whole), optimizer=optimizer, config=settings, dist_init_required=False
            )
        self.zero: Any = self.engine.optimizer
        self.optimizer = optimizer
        zero3_settings.compare(
            zero3_settings.effective(self.engine), zero3_settings.wanted(config, dtype=DTYPES[model.dtype], ranks=world.size)
        )
        self._check_partition()
        check_bytes(folder, whole.named_parameters(), lambda p: p.ds_tensor.data, world)  # pyright: ignore[reportAttributeAccessIssue]
        self.model: LanguageModel = self._inside(lambda: take_apart(whole, head_rows=head_rows, where=str(folder.path)))
        if world.team.size > 1:
            self.model = self._inside(lambda: share_rows(self.model, world.team))
        if config.gradient_checkpointing:
            whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trained = TrainedModel(self.model)
        self._training(True)

    @property
    def vocabulary(self) -> int:
        return self.model.shape.rows

    def measure(self, batch: MicroBatch) -> TokenValues:
        with self.evaluating():
            return self._inside(lambda: measure_batch(self.model, to_device(batch, self.device)))

    def slices(self) -> Iterator[Slice]:
        for name, shape, start, stop in self.wanted():
            parts = {part: view[: stop - start] for part, view in self._state(name).items()}
            yield Slice(name=name, shape=shape, start=start, **parts)

    def wanted(self) -> list[Wanted]:
        shapes = {name: whole_shape(parameter) for name, parameter in self.parameters.items()}
        mine = ((name, shape, share(math.prod(shape), self.world.rank, self.world.size)) for name, shape in shapes.items())
        return [Wanted(name, shape, start, stop) for name, shape, (start, stop) in mine if start < stop]

    def restore_slices(self, slices: Iterable[Slice], *, optimizer_steps: int) -> None:
        taken = Taken(self.wanted())
        starts = {one.name: one.start for one in taken.wanted.values()}
        for flat in self.zero.fp32_partitioned_groups_flat:
            blank = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.tensor(float(optimizer_steps), device=flat.device), **blank}
        for piece in slices:
            taken.add(piece)
            for part, view in self._state(piece.name).items():
                view.narrow(0, piece.start - starts[piece.name], len(piece.weight)).copy_(getattr(piece, part))
        taken.check()
        self.zero.empty_partition_cache()  # whole copies that are about: kept, or fetched ahead and not used yet
        for name, parameter in self.parameters.items():
            parameter.ds_tensor.data.copy_(self._state(name)["weight"])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.parameters:
            for part in PARTS:
                yield from ((f"{part}/{name}", whole) for whole in self._whole(name, part))

    def restore(self, tensors: Mapping[str, Tensor], *, optimizer_steps: int) -> None:
        self.restore_slices(cut(tensors, self.wanted()), optimizer_steps=optimizer_steps)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.parameters:
            yield from ((name, whole) for whole in self._whole(name, "weight"))

    def _whole(self, name: str, part: str) -> list[Tensor]:
        """Gathers a tensor on the leading rank; nothing on the others."""
        mine, shape = self._state(name)[part], whole_shape(self.parameters[name])
        parts = [mine]
        if self.world.size > 1:
            parts = [torch.empty_like(mine) for _ in range(self.world.size)] if self.world.leads else []
            dist.gather(mine.contiguous(), parts or None)
        return [torch.cat(parts)[: math.prod(shape)].view(shape)] if self.world.leads else []

    def _state(self, name: str) -> dict[str, Tensor]:
        """This rank's share of a weight and its moments, padded to the length that all ranks have: views, but for moments before the
        first step, which are zeros."""
        group, offset, length = self.zero.grad_position[self.zero.get_param_id(self.parameters[name])]
        flat = self.zero.fp32_partitioned_groups_flat[group]
        state = self.optimizer.state.get(flat) or {}
        views = {moment: state[moment].narrow(0, offset, length) for moment in MOMENTS if moment in state}
        mine = flat.detach().narrow(0, offset, length)
        return {"weight": mine, **{moment: views[moment] if views else torch.zeros_like(mine) for moment in MOMENTS}}

    def _check_partition(self) -> None:
        """That DeepSpeed cuts a parameter as `share` does."""
        for name, parameter in self.parameters.items():
            start, stop = share(math.prod(whole_shape(parameter)), 0, self.world.size)
            if parameter.ds_tensor.numel() != stop - start:
                raise RuntimeError(f"DeepSpeed holds {parameter.ds_tensor.numel()} elements of {name}, not {stop - start}")

    def _inside(self, work: Callable[[], Any]) -> Any:
        found = []
        with torch.no_grad():
            self.engine(lambda: found.append(work()))
        return found[0]

    def _pass(self, batch: MicroBatch, normaliser: float, *, last: bool) -> tuple[Tensor, TokenValues]:
        found: list[tuple[Tensor, TokenValues]] = []

        def work() -> Tensor:
            weighted_sum, values = self.trained(batch)
            found.append((weighted_sum.detach(), values))
            return weighted_sum / (normaliser / self.world.size)

        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(work)
        self.clock.lap("forward")
        self.engine.backward(loss, scale_wrt_gas=False)
        self.clock.lap("backward")
        return found[0]

    def _reduce_gradients(self) -> None:
        """Each pass has."""

    def _gradients(self) -> list[Tensor]:
        return [gradient for group in self.zero.get_fp32_grad_partitions().values() for gradient in group.values()]

    def _grad_norm(self) -> float:
        norms = [torch.linalg.vector_norm(gradient) for gradient in self._gradients()]
        [squares] = self.world.total(float(torch.stack(norms).double().square().sum()))
        return math.sqrt(squares) if squares >= 0 else math.nan

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed passed over a step whose numbers are finite")

    def _drop_gradients(self) -> None:
        self.zero.zero_grad()
        self.zero.averaged_gradients = {}
        self.zero.reset_cpu_buffers()

    def _training(self, mode: bool) -> None:
        self.engine.train(mode)


def _read_sharded(folder: ModelFolder, model: Model, settings: dict[str, Any]) -> Any:
    """Every parameter is cut up as soon as it is made; the leading rank reads the files, and hands out one module at a time."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    told = HfDeepSpeedConfig(settings)  # transformers looks for it as long as it lives
    try:
        return read_model(folder, dtype=model.dtype, attention=model.attention)
    finally:
        unset_hf_deepspeed_config()  # no other model of this process is to be sharded
        del told


def _deepspeed() -> Any:
    """DeepSpeed, on the process group that is there, or on one of this process alone."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    with _quiet():
        import deepspeed
        import deepspeed.ops

    # None of its own operators: looking for a compiler takes seconds, and its CPU collectives a minute to compile; gloo serves.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    open_group()
    with _quiet():
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """stdout belongs to --json. Of DeepSpeed's own log, warnings reach stderr."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    for handler in logging.getLogger("DeepSpeed").handlers:
        # what else listens to that log is somebody's own: a file, a test's
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.__stdout__):
            handler.setStream(sys.stderr)
