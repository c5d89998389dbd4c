"""The reference engine: plain torch, the whole model on every rank, gradients summed over ranks.

Weights are kept in float32 whatever the passes run in; each micro-batch's gradient is added to a float32 sum before the next, so
that bfloat16 never accumulates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from distft.config.schema import Train
from distft.engine.base import MicroBatch, Slice, Wanted, share
from distft.engine.head import TrainedModel, measure_batch
from distft.engine.load import LanguageModel
from distft.engine.sequence import share_rows
from distft.engine.slices import MOMENTS, Taken, cut
from distft.engine.step import Stepper, adamw, to_device
from distft.engine.world import World
from distft.objectives.loss import TokenValues


class LocalEngine(Stepper):
    """See `distft.engine.base.Engine`."""

    def __init__(self, model: LanguageModel, config: Train, world: World) -> None:
        super().__init__(config, world, model.head.weight.device)
        self.model = model = share_rows(model, world.team)
        if config.gradient_checkpointing:
            model.whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trained = TrainedModel(model)
        self.trained.train()
        # named_parameters names a tied weight once, by its first place
        self.parameters: dict[str, nn.Parameter] = {name: p for name, p in model.whole.named_parameters() if p.requires_grad}
        self.masters = {name: p if p.dtype == torch.float32 else p.detach().float() for name, p in self.parameters.items()}
        self.optimizer = adamw([(p, self.masters[name]) for name, p in self.parameters.items()], config)

    @property
    def vocabulary(self) -> int:
        return self.model.shape.rows

    def measure(self, batch: MicroBatch) -> TokenValues:
        with self.evaluating():
            return measure_batch(self.model, to_device(batch, self.device))

    def slices(self) -> Iterator[Slice]:
        for name, master in self.masters.items():
            start, stop = share(master.numel(), self.world.rank, self.world.size)
            if start < stop:
                parts = {part: tensor.view(-1)[start:stop] for part, tensor in self._state(master).items()}
                yield Slice(name=name, shape=tuple(master.shape), start=start, **parts)

    def wanted(self) -> list[Wanted]:
        return [Wanted(name, tuple(master.shape), 0, master.numel()) for name, master in self.masters.items()]

    def restore_slices(self, slices: Iterable[Slice], *, optimizer_steps: int) -> None:
        taken = Taken(self.wanted())
        for master in self.masters.values():
            blank = {moment: torch.zeros_like(master) for moment in MOMENTS}
            self.optimizer.state[master] = {"step": torch.tensor(float(optimizer_steps), device=self.device), **blank}
        for piece in slices:
            taken.add(piece)
            for part, tensor in self._state(self.masters[piece.name]).items():
                tensor.view(-1)[piece.start : piece.stop].copy_(getattr(piece, part))
        taken.check()
        self._spread_masters()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self.masters.items():
            yield from ((f"{part}/{name}", tensor) for part, tensor in self._state(master).items())

    def restore(self, tensors: Mapping[str, Tensor], *, optimizer_steps: int) -> None:
        self.restore_slices(cut(tensors, self.wanted()), optimizer_steps=optimizer_steps)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self.masters.items():
            yield name, master.detach()

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        """A weight and its moments, which are zeros before the first step."""
        state = self.optimizer.state.get(master) or {}
        moments = {moment: state[moment] if moment in state else torch.zeros_like(master) for moment in MOMENTS}
        return {"weight": master.detach(), **moments}

    def _pass(self, batch: MicroBatch, normaliser: float, *, last: bool) -> tuple[Tensor, TokenValues]:
        weighted_sum, values = self.trained(batch)
        self.clock.lap("forward")
        (weighted_sum / normaliser).backward()
        self._gather_gradients()
        self.clock.lap("backward")
        return weighted_sum.detach(), values

    def _gather_gradients(self) -> None:
        """Moves low-precision gradients into the float32 sums."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def _reduce_gradients(self) -> None:
        for gradient in self._gradients():
            self.world.sum_(gradient)

    def _gradients(self) -> list[Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def _grad_norm(self) -> float:
        gradients = self._gradients()
        return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._drop_gradients()
        self._spread_masters()

    def _spread_masters(self) -> None:
        """Rounds the float32 weights into those that the passes read."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def _drop_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    def _training(self, mode: bool) -> None:
        self.trained.train(mode)
