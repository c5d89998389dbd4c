"""What decides about a language model's memory: its widths, from config.json; and models of any size, between published ones."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model of blocks of attention and a gated MLP, as in Llama, Qwen, Mistral and Gemma. Of another architecture it is a guess."""

    parameters: int
    layers: int
    width: int
    inner: int
    """Width of the MLP."""
    heads: int
    queries: int
    """Numbers of a token's queries, over all heads; as many are the attention's output."""
    keys: int
    """Numbers of a token's keys; as many are its values."""
    vocabulary: int
    tied: bool
    """Whether embedding and output head are one matrix."""
    norms_heads: bool = False
    """Whether queries and keys are normalised head by head (Qwen3, Gemma3)."""

    @property
    def head(self) -> int:
        """Numbers of the output head."""
        return self.vocabulary * self.width

    @property
    def block(self) -> int:
        """Parameters of one block."""
        return 2 * self.width * (self.queries + self.keys) + 3 * self.width * self.inner + 2 * self.width

    @classmethod
    def of(cls, config: dict[str, Any], parameters: int) -> Shape:
        """From config.json; of a model of text and images, from its part on text."""
        text = config.get("text_config") or config
        width, heads = int(text.get("hidden_size", 0)), int(text.get("num_attention_heads") or 1)
        size = int(text.get("head_dim") or width // heads)
        rows, layers = int(text.get("vocab_size", 0)), int(text.get("num_hidden_layers", 0))
        found = cls(
            parameters=parameters, layers=layers, width=width, inner=int(text.get("intermediate_size") or 4 * width), heads=heads,
            queries=heads * size, keys=int(text.get("num_key_value_heads") or heads) * size, vocabulary=rows, tied=False,
            norms_heads=str(text.get("model_type", "")).startswith(("qwen3", "gemma3")),
        )  # fmt: skip
        # Not by config.json, which leaves it out where it is its architecture's default: a second matrix would be in the files.
        return replace(found, tied=parameters - layers * found.block < 1.5 * found.head)


def _published(layers: int, width: int, inner: int, heads: int, groups: int, vocabulary: int, *, tied: bool = False) -> Shape:
    return _sized(Shape(
        parameters=0, layers=layers, width=width, inner=inner, heads=heads, queries=width, keys=groups * width // heads,
        vocabulary=vocabulary, tied=tied,
    ))  # fmt: skip


def _sized(shape: Shape) -> Shape:
    """The same with as many parameters as such a model has."""
    matrices = 1 if shape.tied else 2
    return replace(shape, parameters=shape.layers * shape.block + matrices * shape.head + shape.width)


PUBLISHED = (
    _published(16, 2048, 8192, 32, 8, 128_256, tied=True),  # Llama 3.2 1B
    _published(28, 3072, 8192, 24, 8, 128_256, tied=True),  # Llama 3.2 3B
    _published(32, 4096, 14_336, 32, 8, 128_256),  # Llama 3.1 8B
    _published(48, 5120, 13_824, 40, 8, 152_064),  # Qwen2.5 14B
    _published(64, 5120, 27_648, 40, 8, 152_064),  # Qwen2.5 32B
    _published(80, 8192, 28_672, 64, 8, 128_256),  # Llama 3.1 70B
    _published(88, 12_288, 28_672, 96, 8, 32_768),  # Mistral Large, 123B
    _published(126, 16_384, 53_248, 128, 8, 128_256),  # Llama 3.1 405B
)
"""By their config.json, but for the biases that some have."""

WIDTHS = ("width", "inner", "heads", "queries", "keys", "vocabulary")


def family(parameters: float) -> Shape:
    """A model of about so many parameters: every width is between those of the two published models around that size, by the logarithm
    of the size, and there are as many layers as make it up. Below the first and beyond the last, their widths."""
    sizes = [shape.parameters for shape in PUBLISHED]
    above = min(max(bisect_left(sizes, parameters), 1), len(sizes) - 1)
    low, high = PUBLISHED[above - 1], PUBLISHED[above]
    share = min(max(math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters), 0.0), 1.0)
    widths = {name: round(getattr(low, name) ** (1 - share) * getattr(high, name) ** share) for name in WIDTHS}
    made = replace(high if share > 0 else low, **widths)
    rest = parameters - _sized(replace(made, layers=0)).parameters
    return _sized(replace(made, layers=max(1, round(rest / made.block))))
