"""The seam between the training loop and the hardware: a micro-batch goes in, gradients or values come out.

Shapes: R packed rows of L tokens, N of them with a weight or to be measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distft.engine.clock import Spent
from distft.objectives.loss import Targets, TokenValues
from distft.objectives.treatment import LiveField


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTokens:
    """Whole documents end to end in rows. Positions restart at 0 with each document: that is what keeps them apart. Padding, at a
    row's right end, goes on counting, so that a row of one document needs no mask but the causal one."""

    tokens_RL: Tensor
    positions_RL: Tensor

    def to(self, device: torch.device) -> PackedTokens:
        return PackedTokens(tokens_RL=self.tokens_RL.to(device), positions_RL=self.positions_RL.to(device))


class Selection(Protocol):
    """An objective that treats tokens by what the student says of all of a document's."""

    @property
    def fields(self) -> frozenset[LiveField]:
        """What has to be known of the student."""
        ...

    def settle(self, seen: TokenValues, targets: Targets) -> tuple[Targets, Tensor]:
        """Targets of the tokens that have a weight now, and which of the batch's tokens, whose targets are given, they are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass. `predictor_N[n]` is the place in the flattened rows whose hidden state predicts label
    n: the place before the label's own (law 1).

    Where a team of ranks shares the rows (`World.team`), all of it have the same rows, whole, each the targets whose predictors lie in
    its columns, and `predictor_N` counts these columns alone. Every rank of a team has as many micro-batches as the others."""

    packed: PackedTokens
    predictor_N: Tensor
    targets: Targets
    selection: Selection | None = None
    """Makes the targets that are trained towards from those above, whose weights do not count then."""
    documents: tuple[str, ...] = ()
    """What its documents are called, for whoever has to look at them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepValues:
    """What a step did, over all ranks and micro-batches. Of each part (`PARTS` of the loss): `sums` are unweighted
    nats over the tokens that bear that weight, `counts` are those tokens, and `masses` are what the part adds to the loss."""

    loss: float
    grad_norm: float
    sums: dict[str, float]
    counts: dict[str, float]
    masses: dict[str, float]
    """In nats, weighted and divided by the normaliser, an entropy's with its sign; they add up to the loss."""
    quadrants: list[float]
    """What the tokens of each of `QUADRANTS` add to the loss; 0 where no teacher was asked."""
    spent: Spent = field(default_factory=Spent, compare=False)
    """Of this rank."""
    memory: int = field(default=0, compare=False)
    """Bytes (`peak_bytes`) of the rank that needed most."""


class Wanted(NamedTuple):
    """Elements start, ..., stop - 1 of a flattened parameter, which is of this shape as a whole."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What a checkpoint keeps of elements start, start + 1, ... of a flattened parameter: three float32 vectors of one length. They
    may be views of what the next step changes."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.weight)


def share(numel: int, rank: int, size: int) -> tuple[int, int]:
    """Start and stop of the elements of a flattened parameter that a rank owns: equal runs, the last ones shorter or empty."""
    run = math.ceil(numel / size)
    return min(rank * run, numel), min((rank + 1) * run, numel)


class Engine(Protocol):
    """What the loop needs of an engine. Every method is called on every rank with as many micro-batches as on the others, and what it
    iterates over is consumed to the end on every rank."""

    @property
    def vocabulary(self) -> int:
        """How many tokens the student chooses among."""
        ...

    def train_step(self, micro_batches: Sequence[MicroBatch], *, normaliser: float, lr: float) -> StepValues:
        """One update from the gradient of (sum of weighted token losses over all ranks) / normaliser.

        Raises TrainingError before anything is updated when loss or gradient is not finite."""
        ...

    def measure(self, batch: MicroBatch) -> TokenValues:
        """Each token's values under the weights as they are, with no gradient."""
        ...

    def slices(self) -> Iterator[Slice]:
        """This rank's part of all that a checkpoint must hold to go on bit for bit. Over all ranks each element comes exactly once,
        by `share`; nothing is gathered."""
        ...

    def wanted(self) -> list[Wanted]:
        """What this rank must be given to be restored."""
        ...

    def restore_slices(self, slices: Iterable[Slice], *, optimizer_steps: int) -> None:
        """Takes back what `slices` of any number of ranks gave, cut in any way, as long as it is just what is `wanted`. After a
        CorruptArtifactError, which says what is not, the engine is unusable."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The same as whole tensors on the leading rank: `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, in float32. Other ranks
        take part, and what they get is nobody's business."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], *, optimizer_steps: int) -> None:
        """The inverse of `tensors`, which every rank is given."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights for export on the leading rank, by the names of the model's own checkpoint, tied ones once, in float32."""
        ...
