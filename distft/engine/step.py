"""A training step as every engine takes it; what differs is where gradients and weights are kept."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distft.config.schema import Train
from distft.engine.base import MicroBatch, StepValues
from distft.engine.clock import StepClock
from distft.engine.memory import forget_peak, peak_bytes
from distft.engine.world import World
from distft.errors import TrainingError
from distft.objectives.loss import PARTS, TokenValues
from distft.objectives.quadrants import NONE, QUADRANTS

FIGURES = ("sums", "counts", "masses")
SIGNS = {"entropy": -1.0}
"""Of what a part adds to the loss, where it is not added."""
MOST_NAMED = 8
"""Documents that an error names."""


class Stepper(ABC):
    """One update from the gradient of (sum of weighted token losses over all ranks) / normaliser, or none and an error on all ranks.

    A subclass holds float32 gradients, the float32 weights that they change, and the optimizer of those."""

    def __init__(self, config: Train, world: World, device: torch.device) -> None:
        self.clip, self.world, self.device = config.clip, world, device
        self.clock = StepClock(device)

    def train_step(self, micro_batches: Sequence[MicroBatch], *, normaliser: float, lr: float) -> StepValues:
        forget_peak(self.device)
        self.clock.start()
        sums: list[Tensor] = []  # on the device, and read when all passes are queued
        figures = torch.zeros(len(FIGURES), len(PARTS), dtype=torch.float64, device=self.device)
        by_quadrant = torch.zeros(len(QUADRANTS), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            weighted_sum, values = self._pass(to_device(batch, self.device), normaliser, last=number == len(micro_batches))
            sums.append(weighted_sum.double())
            figures += figures_of(values)
            by_quadrant += quadrant_masses(values)
        self._reduce_gradients()
        figures, by_quadrant, mine = figures.cpu(), by_quadrant.cpu(), torch.stack(sums).tolist()
        loss = 0.0
        for one in mine:
            loss += one / normaliser
        [loss] = self.world.total(loss)
        self.world.sum_(figures)
        self.world.sum_(by_quadrant)
        grad_norm = self._grad_norm()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._drop_gradients()
            raise TrainingError(
                f"The loss is {loss} and the gradient norm {grad_norm}; nothing was updated.",
                where=self._where_it_came_up(micro_batches, mine),
            )
        if not figures[FIGURES.index("counts")].any():
            # a rule that counts every token may still give none a weight, and an update would then be weight decay and old momentum
            self._drop_gradients()
            raise TrainingError(
                f"No token has a weight: the objective counts {normaliser:.0f} and trains nothing; nothing was updated.",
                help="Raise train.tokens_per_step, or loosen the objective's selection.",
            )  # fmt: skip
        if self.clip is not None and grad_norm > self.clip:
            for gradient in self._gradients():
                gradient.mul_(self.clip / grad_norm)
        self._update(lr)
        self.clock.lap("update")
        spent, memory = self.clock.read(), self.world.max_(torch.tensor(peak_bytes(self.device)))
        figures[-1] /= normaliser
        unweighted, counts, masses = (dict[str, float](zip(PARTS, row, strict=True)) for row in figures.tolist())
        return StepValues(
            loss=loss, grad_norm=grad_norm, sums=unweighted, counts=counts, masses=masses,
            quadrants=(by_quadrant / normaliser).tolist(), spent=spent, memory=int(memory),
        )  # fmt: skip

    def _where_it_came_up(self, micro_batches: Sequence[MicroBatch], sums: Sequence[float]) -> str:
        """The documents of the first micro-batch of each rank whose loss is no number, the same on all ranks; "" where each loss is
        one, and their sum or a gradient is not. All ranks must call this."""
        bad = next((batch for batch, one in zip(micro_batches, sums, strict=True) if not math.isfinite(one)), None)
        said = json.dumps([] if bad is None else list(bad.documents)).encode()
        told = [json.loads(bytes(one.tolist())) for one in self.world.gather(torch.tensor(list(said), dtype=torch.uint8))]
        where = []
        for rank, names in enumerate(told):
            if names:
                more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
                where.append(f"{', '.join(names[:MOST_NAMED])}{more}" + (f" (rank {rank})" if self.world.size > 1 else ""))
        return "; ".join(where)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off while it lasts."""
        self._training(False)
        try:
            yield
        finally:
            self._training(True)

    @abstractmethod
    def _pass(self, batch: MicroBatch, normaliser: float, *, last: bool) -> tuple[Tensor, TokenValues]:
        """Forward and backward, each ended by a lap of the clock; gives this rank's weighted sum, detached, and adds its gradient /
        normaliser to the others."""

    @abstractmethod
    def _reduce_gradients(self) -> None:
        """Sums gradients over ranks, unless every pass has."""

    @abstractmethod
    def _gradients(self) -> list[Tensor]:
        """This rank's float32 gradients, reduced, to be changed in place."""

    @abstractmethod
    def _grad_norm(self) -> float:
        """Of the whole gradient; the same number on all ranks."""

    @abstractmethod
    def _update(self, lr: float) -> None:
        """Steps the optimizer, and forgets the gradients."""

    @abstractmethod
    def _drop_gradients(self) -> None:
        """Forgets the gradients."""

    @abstractmethod
    def _training(self, mode: bool) -> None:
        """Sets the model to train or to evaluate."""


def figures_of(values: TokenValues) -> Tensor:
    """[figures, parts] of a micro-batch, where its values are: see `StepValues`, where masses are divided."""
    rows = torch.zeros(len(FIGURES), len(PARTS), dtype=torch.float64, device=values.ce_N.device)
    for column, part in enumerate(PARTS):
        value_N = getattr(values, f"{part}_N")
        if value_N is None:
            continue
        value_N, weight_N = value_N.double(), getattr(values.weights, f"{part}_N").to(value_N.device)
        borne_N, sign = weight_N != 0, SIGNS.get(part, 1.0)
        rows[:, column] = torch.stack([(value_N * borne_N).sum(), borne_N.sum().double(), sign * (value_N * weight_N).sum()])
    return rows


def quadrant_masses(values: TokenValues) -> Tensor:
    """What the tokens of each of QUADRANTS add to a micro-batch's loss, where its values are, not divided yet."""
    if values.quadrant_N is None:
        return torch.zeros(len(QUADRANTS), dtype=torch.float64, device=values.ce_N.device)
    loss_N = torch.zeros_like(values.ce_N, dtype=torch.float64)
    for part in PARTS:
        value_N = getattr(values, f"{part}_N")
        if value_N is not None:
            loss_N += SIGNS.get(part, 1.0) * value_N.double() * getattr(values.weights, f"{part}_N").to(value_N.device)
    places_N = values.quadrant_N.to(loss_N.device, torch.int64)
    return loss_N.new_zeros(NONE + 1).scatter_add_(0, places_N, loss_N)[:NONE]


def adamw(named: Sequence[tuple[nn.Parameter, Tensor]], config: Train) -> torch.optim.AdamW:
    """The optimizer of tensors, each with the parameter that it stands for: matrices decay, norms and biases do not."""
    groups: list[dict[str, Any]] = [
        {"params": [tensor for parameter, tensor in named if is_matrix(parameter)], "weight_decay": config.weight_decay},
        {"params": [tensor for parameter, tensor in named if not is_matrix(parameter)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whole or sharded, of which the second knows its shape by another name."""
    return len(whole_shape(parameter)) >= 2


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, whole or sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    if batch.predictor_N.device == device:
        return batch
    return replace(
        batch, packed=batch.packed.to(device), predictor_N=batch.predictor_N.to(device), targets=batch.targets.to(device)
    )  # fmt: skip
