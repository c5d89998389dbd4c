"""The model as it is trained: backbone, then the output head that only ever sees tokens with a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distft.engine.base import MicroBatch
from distft.engine.load import LanguageModel
from distft.objectives.loss import TokenValues, measure, token_loss


class TrainedModel(nn.Module):
    """Loss in, gradients out. The projection is read inside this module's forward, which is where a sharded engine gathers it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.whole = model.whole
        self.model = model

    def forward(self, batch: MicroBatch) -> tuple[Tensor, TokenValues]:
        """The sum of weighted token losses, and each token's values. A batch without a weighted token still runs the backbone
        and has a gradient (zero): ranks must not part ways.

        An objective that selects by the student costs one more pass over the head, without gradient, and none over the backbone."""
        hidden_ND = self.model.hidden(batch.packed).index_select(0, batch.predictor_N)
        head, targets = self.model.head, batch.targets
        if batch.selection is not None:
            seen = measure(
                hidden_ND.detach(), head.weight, head.bias, targets, shape=self.model.shape, wanted=batch.selection.fields
            )  # fmt: skip
            targets, borne_N = batch.selection.settle(seen, targets)
            hidden_ND = hidden_ND.index_select(0, borne_N)
        return token_loss(hidden_ND, head.weight, head.bias, targets, shape=self.model.shape)


@torch.no_grad()
def measure_batch(model: LanguageModel, batch: MicroBatch) -> TokenValues:
    """Each token's values, with no gradient."""
    hidden_ND = model.hidden(batch.packed).index_select(0, batch.predictor_N)
    return measure(hidden_ND, model.head.weight, model.head.bias, batch.targets, shape=model.shape)
