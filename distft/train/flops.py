"""How much arithmetic a step is, and how much of what its devices can do that took. Torch-free: plans use the same table.

    FLOPs of a step =  6 * P * T                      every weight between embedding and head, for every token
                    + 12 * H * sum over layers of A   queries with keys, and what is read by them
                    +  6 * V * D * N                  the output head, for tokens that reach it

with T tokens, N of them at the head, P parameters that a token meets (of experts those that it is sent to; norms and biases count
along, and are next to nothing), H the width of all query heads, A the pairs of tokens of which one sees the other: n(n+1)/2 of a
document of n tokens, less under a sliding window, and none across documents of a packed row. Each 6 is a multiplication and an
addition, once forward and twice backward.

MFU (model FLOPs utilisation, arXiv 2204.02311) divides that by time and by PEAKS. Work that only the method makes is left out:
recomputed activations, padding, a second look at the head, optimizer, drift.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distft.store.model_folder import ModelFolder

PEAKS = {
    "A30": 165e12, "A40": 149.7e12, "A100": 312e12, "A800": 312e12, "L4": 121e12, "L40": 181e12, "L40S": 362e12,
    "H20": 148e12, "H100": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H800": 989e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12,
}  # fmt: skip
"""Dense bfloat16 operations a second at most, by NVIDIA's data sheets, whatever dtype a run has. A name alone is the module (SXM)."""


def device_peak(name: str) -> float | None:
    """Of a device by the name that its driver gives it; None of one that is not in the table, or is a part of one (MIG)."""
    words = re.split(r"[\s_-]+", name)
    if "MIG" in words:
        return None
    known = [key for key in PEAKS if set(key.split()) <= set(words)]
    return PEAKS[max(known, key=len)] if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What of a model decides how much there is to compute."""

    active: float
    """P above."""
    heads: int
    """H above."""
    layers: tuple[tuple[int | None, int], ...]
    """Windows, None for one that is open, with how many layers of attention have each."""
    head: int
    """V * D above."""

    @classmethod
    def of(cls, model: ModelFolder) -> Arithmetic:
        """From the model's settings and the headers of its files."""
        config = model.config.get("text_config") or model.config
        width, count = int(config.get("hidden_size") or 0), int(config.get("num_attention_heads") or 0)
        head = model.vocabulary_rows() * width
        share = _expert_share(config)
        active = sum(
            size * (share if ".experts." in name else 1.0) for name, size in model.tensor_sizes().items() if size != head
        )  # the other one of this size is the embedding, which multiplies nothing
        each = int(config.get("head_dim") or (width // count if count else 0))
        return cls(active=active, heads=count * each, layers=_layers(config), head=head)

    def flops(self, lengths: npt.NDArray[np.int64], headed: float) -> float:
        """Of a step with documents of these lengths, `headed` of whose tokens reach the head."""
        seen = sum(count * pairs(lengths, window) for window, count in self.layers)
        return 6 * self.active * float(lengths.sum()) + 12 * self.heads * seen + 6 * self.head * headed


def pairs(lengths: npt.NDArray[np.int64], window: int | None) -> float:
    """How many tokens see how many, themselves included."""
    reach = lengths if window is None else np.minimum(lengths, window)
    return float((reach * (reach + 1) / 2 + (lengths - reach) * reach).sum())


def _layers(config: dict[str, Any]) -> tuple[tuple[int | None, int], ...]:
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    all_alike = ["sliding_attention" if window else "full_attention"] * int(config.get("num_hidden_layers") or 0)
    kinds = config.get("layer_types") or all_alike
    windows = {"sliding_attention": window, "full_attention": None}
    return tuple(Counter(windows[kind] for kind in kinds if kind in windows).items())  # others have no pairs: they are linear


def _expert_share(config: dict[str, Any]) -> float:
    """Of a layer's experts, those that a token is sent to."""
    count = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
    return int(config.get("num_experts_per_tok") or count) / int(count) if count else 1.0
