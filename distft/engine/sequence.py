"""Long documents over several ranks: each has some columns of every row, and around attention they exchange columns for heads.

All that a model does between two attentions it does token by token, so a rank needs only its own columns for it. In attention a rank
gets all columns of its share of the heads, [R, H, L/n, D] to [R, H/n, L, D], runs the model's own attention on whole rows, and gives
the results back (DeepSpeed-Ulysses, arXiv 2309.14509). So activations take 1/n of the memory everywhere. What takes as much as on one
rank is the mask, [R, L, L], of rows with several documents; `sdpa` and flash attention need none where each row is one document.

transformers makes the mask, by its own rules for windows and packed documents, from the whole row's positions. Whether a model mixes
tokens elsewhere (a convolution, a recurrence) nobody can tell from its settings, so a probe compares it with itself.

Shapes: R packed rows of L columns, n ranks, H attention heads of width D.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distft.engine.base import PackedTokens
from distft.engine.load import LanguageModel
from distft.engine.world import World
from distft.errors import ModelError

WHERE = "train.sequence_parallel"
LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""Position encodings whose angles follow from the last position of the batch, which a rank does not see."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""How far a hidden state may be from the one of whole rows, as a share of its length: rounding, of sums in another order. A state
that saw other tokens is off by its own size."""

_numbers = itertools.count()


class SharedRows:
    """One model's passes over rows that the ranks of a team share; all of them make one at once, and take every pass at once.

    What attention has to know of a pass stays until the next one: activations that are computed again on the way back need it, too."""

    def __init__(self, whole: Any, team: World) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self.whole, self.team = whole, team
        self.plain: str = whole.config.get_text_config()._attn_implementation
        self.positions_RL: Tensor | None = None
        name = f"distft_shared_rows_{next(_numbers)}"  # one of its own: there may be other models in this process
        AttentionInterface.register(name, _weakly(self._attend))
        AttentionMaskInterface.register(name, _weakly(self._mask))
        whole.set_attn_implementation(name)
        if whole.config.get_text_config()._attn_implementation != name:
            raise _refused(whole, "computes attention by code of its own, which cannot be shared among ranks")

    def hidden(self, packed: PackedTokens) -> Tensor:
        """Last hidden states [R*L/n, D] of this rank's columns."""
        rows, width = packed.tokens_RL.shape
        columns = width // self.team.size
        own = slice(self.team.rank * columns, (self.team.rank + 1) * columns)
        self.positions_RL = packed.positions_RL
        # Given a mask, one that masks nothing, transformers does not look for documents in positions of a part of a row.
        nothing = torch.ones(rows, columns, dtype=torch.bool, device=packed.tokens_RL.device)
        output = self.whole.base_model(
            input_ids=packed.tokens_RL[:, own], position_ids=packed.positions_RL[:, own], attention_mask=nothing, use_cache=False
        )
        return output.last_hidden_state.flatten(0, 1)

    def _mask(
        self, *, mask_function: Callable[..., Any], allow_is_causal_skip: bool = True, batch_size: int, q_length: int,
        kv_length: int, attention_mask: Tensor | None, **given: Any,
    ) -> Tensor | None:  # fmt: skip
        """The mask of whole rows. `mask_function` is what transformers wants of a row with one document, in places of the row."""
        from transformers.masking_utils import (
            ALL_MASK_ATTENTION_FUNCTIONS,
            find_packed_sequence_indices,
            packed_sequence_compatibility_function,
        )

        positions_RL = self._positions()
        rows, width = positions_RL.shape
        assert (batch_size, q_length * self.team.size) == (rows, width)
        documents_RL = find_packed_sequence_indices(positions_RL)
        if documents_RL is not None:
            mask_function = packed_sequence_compatibility_function(mask_function, positions_RL, documents_RL)
        return ALL_MASK_ATTENTION_FUNCTIONS[self.plain](
            mask_function=mask_function, allow_is_causal_skip=allow_is_causal_skip and documents_RL is None, batch_size=rows,
            q_length=width, kv_length=width, attention_mask=None, **given,
        )  # fmt: skip

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        """In the place of one of transformers' attention functions."""
        if getattr(module, "sinks", None) is not None or given.get("s_aux") is not None or given.get("position_bias") is not None:
            raise _refused(self.whole, "has weights per attention head within attention, which are not shared among ranks yet")
        positions_RL, ranks = self._positions(), self.team.size
        rows, width = positions_RL.shape
        if attention_mask is not None and attention_mask.shape[-1] != width:
            raise _refused(self.whole, "makes its attention mask by code of its own, which sees a part of a row")
        if query.shape[1] % ranks or (key.shape[1] % ranks and ranks % key.shape[1]):
            raise _refused(self.whole, f"has {query.shape[1]} attention heads, {key.shape[1]} for keys, for {ranks} ranks")
        if key.shape[1] % ranks:  # fewer than ranks: each needs the one that its queries look at
            key, value = (one.repeat_interleave(ranks // one.shape[1], dim=1) for one in (key, value))
        query, key, value = (_Exchange.apply(one, self.team, 1, 2) for one in (query, key, value))
        local = _Local(module, heads_per_key=query.shape[1] // key.shape[1], attention=self.plain)
        given["position_ids"] = positions_RL
        flash = self.plain.startswith("flash")
        if flash:  # it looks for documents in a single row only; end to end the rows mean the same
            given["position_ids"] = positions_RL.reshape(1, -1)
            query, key, value = (_end_to_end(one) for one in (query, key, value))
        found, _ = self._plain(module)(local, query, key, value, attention_mask, **given)
        if flash:
            found = found.reshape(rows, width, *found.shape[2:])
        return _Exchange.apply(found, self.team, 1, 2), None

    def _plain(self, module: nn.Module) -> Callable[..., Any]:
        """The attention that the run file asks for; `eager` is part of each model's own code."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.plain != "eager":
            return ALL_ATTENTION_FUNCTIONS[self.plain]
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if own is None:
            raise _refused(self.whole, "has no attention that could be called by itself; take another model.attention")
        return own

    def _positions(self) -> Tensor:
        assert self.positions_RL is not None, "a pass began elsewhere than in `hidden`"
        return self.positions_RL


class _Local:
    """An attention module as attention sees it that has some of its heads."""

    def __init__(self, module: nn.Module, *, heads_per_key: int, attention: str) -> None:
        self.module, self.num_key_value_groups = module, heads_per_key
        self.config = _Settings(getattr(module, "config", None), attention)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Settings:
    """A model's settings under the name of the attention that is really computed."""

    def __init__(self, config: Any, attention: str) -> None:
        self.config, self._attn_implementation = config, attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


class _Exchange(torch.autograd.Function):
    """Cuts dimension `scatter` into a part for each rank, and joins what comes from them along `gather`. Its gradient is the same the
    other way round."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, team: World, scatter: int, gather: int) -> Tensor:
        ctx.team, ctx.scatter, ctx.gather = team, scatter, gather
        return _exchanged(mine, team, scatter, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchanged(grads[0], ctx.team, ctx.gather, ctx.scatter), None, None, None


def _exchanged(mine: Tensor, team: World, scatter: int, gather: int) -> Tensor:
    return torch.cat(team.swap(torch.stack(mine.chunk(team.size, scatter))).unbind(), gather)


def _end_to_end(heads_RHLD: Tensor) -> Tensor:
    """[1, H, R*L, D]"""
    return heads_RHLD.transpose(0, 1).flatten(1, 2)[None]


def share_rows(model: LanguageModel, team: World) -> LanguageModel:
    """The model, its rows from now on shared among the ranks of a team, which all call this at once; the same model where there is no
    team. Proves on a probe that hidden states are those of whole rows: for a model that cannot be shared so, that is an error here."""
    if team.size == 1:
        return model
    kinds = {kind for module in model.whole.modules() for kind in _angles(module)} & LENGTH_DEPENDENT
    if kinds:
        raise _refused(
            model.whole, f"has positions ({', '.join(sorted(kinds))}) that follow from a row's length, which no rank sees"
        )
    packed = _probe(team.size, model.shape.rows, model.device)
    with torch.no_grad():
        rows, width = packed.tokens_RL.shape
        expected = model.hidden(packed).view(rows, team.size, width // team.size, -1)[:, team.rank].flatten(0, 1).float()
        shared = replace(model, rows=SharedRows(model.whole, team))
        apart = (shared.hidden(packed).float() - expected).norm(dim=1) / expected.norm(dim=1)
    # one rank alone must not stop: the others would wait for it
    worst = float(team.max_(apart.nan_to_num(nan=torch.inf).max().double().cpu()))
    if not worst <= TOLERANCE[model.head.weight.dtype]:
        raise _refused(
            model.whole, f"mixes tokens elsewhere than in attention: hidden states are off by {worst:.3g} of their size"
        )
    return shared


def _probe(ranks: int, vocabulary: int, device: torch.device) -> PackedTokens:
    """A row of one document, and one of three whose borders lie within the ranks' columns and between them."""
    width = 4 * ranks
    tokens = torch.arange(1, 2 * width + 1, device=device).view(2, width) % vocabulary
    places = torch.arange(width, device=device)
    starts = torch.where(places < 3, 0, torch.where(places < width - 4, 3, width - 4))
    return PackedTokens(tokens_RL=tokens, positions_RL=torch.stack([places, places - starts]))


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, for whoever never forgets it: that must not keep a model in memory."""
    found = weakref.WeakMethod(method)

    def call(*args: Any, **named: Any) -> Any:
        known = found()
        assert known is not None, "the model has outlived what shares its rows"
        return known(*args, **named)

    return call


def _angles(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", None)
    return list(kind.values()) if isinstance(kind, dict) else [kind] if isinstance(kind, str) else []


def _refused(whole: Any, why: str) -> ModelError:
    return ModelError(
        f"{type(whole).__name__} {why}.", where=WHERE,
        help="Set train.sequence_parallel=1; train.gradient_checkpointing and a smaller train.micro_batch_tokens save memory, too.",
    )  # fmt: skip
