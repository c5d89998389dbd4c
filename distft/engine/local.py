"""The reference engine: plain torch, the whole model on every rank, gradients summed over ranks.

Weights are kept in float32 whatever the passes run in; each micro-batch's gradient is added to a float32 sum before the next, so
that bfloat16 never accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from distft.config.schema import Train
from distft.engine.base import MicroBatch, StepValues
from distft.engine.head import TrainedModel, measure_batch
from distft.engine.load import LanguageModel
from distft.engine.world import World
from distft.errors import TrainingError
from distft.objectives.loss import PARTS, TokenValues

FIGURES = ("sums", "counts", "masses")


class LocalEngine:
    """See `distft.engine.base.Engine`."""

    def __init__(self, model: LanguageModel, config: Train, world: World) -> None:
        self.model, self.world, self.clip = model, world, config.clip
        self.device = model.head.weight.device
        if config.gradient_checkpointing:
            model.whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trained = TrainedModel(model)
        self.trained.train()
        # named_parameters names a tied weight once, by its first place
        self.parameters: dict[str, nn.Parameter] = {name: p for name, p in model.whole.named_parameters() if p.requires_grad}
        self.masters = {name: p if p.dtype == torch.float32 else p.detach().float() for name, p in self.parameters.items()}
        decayed = [m for m in self.masters.values() if m.dim() >= 2]
        others = [m for m in self.masters.values() if m.dim() < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    def train_step(self, micro_batches: Sequence[MicroBatch], *, normaliser: float, lr: float) -> StepValues:
        loss, figures = 0.0, torch.zeros(len(FIGURES), len(PARTS), dtype=torch.float64)
        for batch in micro_batches:
            weighted_sum, values = self.trained(_to(batch, self.device))
            (weighted_sum / normaliser).backward()
            self._gather_gradients()
            loss += float(weighted_sum.detach().double()) / normaliser
            figures += _figures(values)
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        for gradient in gradients:
            self.world.sum_(gradient)
        [loss] = self.world.total(loss)
        self.world.sum_(figures)
        grad_norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._drop_gradients()
            raise TrainingError(f"The loss is {loss} and the gradient norm {grad_norm}; nothing was updated.")
        if not figures[FIGURES.index("counts")].any():
            # a rule that counts every token may still give none a weight, and an update would then be weight decay and old momentum
            self._drop_gradients()
            raise TrainingError(
                f"No token has a weight: the objective trains none of the {normaliser:.0f} that count; nothing was updated.",
                help="Raise train.tokens_per_step, or loosen the objective's selection.",
            )  # fmt: skip
        if self.clip is not None and grad_norm > self.clip:
            for gradient in gradients:
                gradient.mul_(self.clip / grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._drop_gradients()
        self._spread_masters()
        figures[-1] /= normaliser
        sums, counts, masses = (dict[str, float](zip(PARTS, row, strict=True)) for row in figures.tolist())
        return StepValues(loss=loss, grad_norm=grad_norm, sums=sums, counts=counts, masses=masses)

    def measure(self, batch: MicroBatch) -> TokenValues:
        with self._evaluating():
            return measure_batch(self.model, _to(batch, self.device))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self.masters.items():
            yield f"weight/{name}", master.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                state = self.optimizer.state.get(master, {})
                yield f"{moment}/{name}", state.get(moment, torch.zeros_like(master))

    def restore(self, tensors: dict[str, Tensor], *, optimizer_steps: int) -> None:
        for name, master in self.masters.items():
            with torch.no_grad():
                master.copy_(tensors[f"weight/{name}"])
            self.optimizer.state[master] = {
                "step": torch.tensor(float(optimizer_steps), device=self.device),
                "exp_avg": tensors[f"exp_avg/{name}"].to(self.device, copy=True),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(self.device, copy=True),
            }
        self._spread_masters()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self.masters.items():
            yield name, master.detach()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Dropout off while it lasts."""
        self.trained.eval()
        try:
            yield
        finally:
            self.trained.train()

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

    def _spread_masters(self) -> None:
        """Rounds the float32 weights into those that the passes read."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def _drop_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None


def _figures(values: TokenValues) -> Tensor:
    """[figures, parts] of a micro-batch: see `StepValues`, where masses are divided."""
    rows = torch.zeros(len(FIGURES), len(PARTS), dtype=torch.float64)
    for column, part in enumerate(PARTS):
        value_N = getattr(values, f"{part}_N")
        if value_N is None:
            continue
        value_N, weight_N = value_N.double(), getattr(values.weights, f"{part}_N").to(value_N.device)
        borne_N, sign = weight_N != 0, -1.0 if part == "entropy" else 1.0
        rows[:, column] = torch.stack(
            [(value_N * borne_N).sum(), borne_N.sum().double(), sign * (value_N * weight_N).sum()]
        ).cpu()
    return rows


def _to(batch: MicroBatch, device: torch.device) -> MicroBatch:
    if batch.predictor_N.device == device:
        return batch
    return replace(
        batch, packed=batch.packed.to(device), predictor_N=batch.predictor_N.to(device), targets=batch.targets.to(device)
    )  # fmt: skip
