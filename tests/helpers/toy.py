"""A language model whose logits one can read: what follows a token depends on that token alone, by a table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distft.engine.load import LanguageModel
from distft.objectives.distributions import LogitShape
from distft.store.model_folder import ModelFolder


class Bigram(nn.Module):
    """Hidden states are one-hot, so the head's column c holds the logits of what follows token c."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.head = nn.Linear(len(probabilities), len(probabilities), bias=False)
        self.head.weight.data = torch.tensor(probabilities).log().T.contiguous()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation="sdpa"))

    @property
    def base_model(self) -> Any:
        def states(*, input_ids: Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, self.head.in_features).float())

        return states


def bigram(probabilities: list[list[float]]) -> LanguageModel:
    """`probabilities[c][v]`: how likely v is after c."""
    model = Bigram(probabilities)
    return LanguageModel(whole=model, head=model.head, shape=LogitShape(rows=len(probabilities)))


def nowhere(name: str) -> ModelFolder:
    """Stands for the folder of such a model: it has an identity and no files."""
    folder = SimpleNamespace(
        path=Path(name),
        weights_identity=lambda: {"files": {"model.safetensors": name}, "config": "toy"},
        tokenizer_identity=lambda: {"vocabulary": "toy", "special": "toy", "template": ""},
    )
    return cast(ModelFolder, folder)
