"""The plain way: all weights in memory, and transformers puts them on disk. For architectures that it stores in an arrangement which
cannot be written parameter by parameter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from distft.engine.load import DTYPES
from distft.store.put import fill


def write_whole(whole: Any, weights: dict[str, Tensor], target: Path, *, dtype: str, shard_bytes: int) -> None:
    """Puts the trained weights into a model without any, and lets transformers name them on disk."""
    state = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    whole.load_state_dict(state, assign=True, strict=False)
    whole.tie_weights()
    bare = sorted(name for name, tensor in whole.state_dict().items() if tensor.is_meta)
    if bare:
        raise RuntimeError(f"the checkpoint has no weights for {bare[:5]}")
    fill(target, partial(whole.save_pretrained, max_shard_size=shard_bytes))
