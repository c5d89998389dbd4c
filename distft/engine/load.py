"""A transformers model taken apart into backbone and head, so that logits are never made for a whole sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distft.engine.base import PackedTokens
from distft.engine.world import World
from distft.errors import ModelError
from distft.objectives.distributions import LogitShape
from distft.store.model_folder import ModelFolder

if TYPE_CHECKING:
    from distft.engine.sequence import SharedRows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A causal language model in two parts. `shape` says what its own forward does to the head's output."""

    whole: Any
    """The transformers model, for its config, its names and `generate`."""
    head: nn.Linear
    shape: LogitShape
    first_id: int = 0
    """The id of this rank's first head row; not 0 where ranks share the head."""
    rows: SharedRows | None = None
    """How ranks share the rows of a batch; None: each has rows of its own."""

    @property
    def weight(self) -> Tensor:
        """The head rows that this rank holds."""
        return _local(self.head.weight)

    @property
    def bias(self) -> Tensor | None:
        return None if self.head.bias is None else _local(self.head.bias)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def hidden(self, packed: PackedTokens) -> Tensor:
        """Last hidden states [R*L, D], or of the columns of L that this rank has; each document sees itself alone.

        use_cache=False is not for speed: with a cache, transformers lets attention cross documents of a packed row, silently
        (tests/parity/test_packing.py)."""
        if self.rows is not None:
            return self.rows.hidden(packed)
        tokens, positions = packed.tokens_RL, packed.positions_RL
        if self.whole.config.get_text_config()._attn_implementation.startswith("flash"):
            # Variable-length attention looks for documents in a single row only; end to end the rows mean the same.
            tokens, positions = tokens.reshape(1, -1), positions.reshape(1, -1)
        output = self.whole.base_model(input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)


def load_model(
    folder: ModelFolder, *, dtype: str, attention: str, head_rows: int, device: torch.device, group: World | None = None
) -> LanguageModel:
    """Reads safetensors only; runs no code from the folder. The ranks of a `group` hold the model together, each its share of every
    large matrix: all of them call this, and later every pass, at once."""
    group = group or World()
    shared = group.size > 1
    whole = read_model(folder, dtype=dtype, attention=attention, **(_tensor_parallel(folder, group.size) if shared else {}))
    if not shared:
        return take_apart(whole.to(device), head_rows=head_rows, where=str(folder.path))
    if not isinstance(whole.get_output_embeddings().weight, DTensor):
        raise ModelError(
            f"{type(whole).__name__} has no plan for sharing its output head among ranks.", where=str(folder.path),
            help="Set score.tensor_parallel=1, or take an architecture that transformers can share.",
        )  # fmt: skip
    return take_apart(whole, head_rows=head_rows, where=str(folder.path), rank=group.rank, size=group.size)


def read_model(folder: ModelFolder, *, dtype: str, attention: str, **given: Any) -> Any:
    """The transformers model with all its weights, or an error. `given` says how ranks share it."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours say the same, and stay whole
    folder.weight_files()  # says clearly what is missing before transformers says it at length
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=DTYPES[dtype], attn_implementation=attention, local_files_only=True, trust_remote_code=False,
            use_safetensors=True, output_loading_info=True, **given,
        )  # fmt: skip
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"The model cannot be loaded: {error}", where=str(folder.path),
            help="Copy or download the folder again, and see that this transformers knows the architecture.",
        ) from error  # fmt: skip
    whole, report = loaded
    absent = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if absent:
        raise ModelError(
            f"The weight files lack {len(absent)} tensors of the architecture, or hold them in another shape: {sorted(absent)[:5]}.",
            where=str(folder.path), help="Random numbers would stand in for them. Take a complete checkpoint.",
        )  # fmt: skip
    return whole


def _tensor_parallel(folder: ModelFolder, size: int) -> dict[str, Any]:
    """What makes transformers share a model among the ranks of the process group."""
    from transformers.distributed.configuration_utils import DistributedConfig

    folder.check_shared_by(size)
    return {"distributed_config": DistributedConfig(tp_size=size)}


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _head_share(rows: int, head_rows: int, rank: int, size: int) -> tuple[int, int]:
    """First id and number of token rows of a rank: torch cuts `rows` into equal runs, the last ones shorter; rows beyond
    `head_rows` are padding."""
    run = -(-rows // size)
    first = min(rank * run, rows)
    return first, max(0, min(first + run, rows, head_rows) - first)


def take_apart(whole: Any, *, head_rows: int, where: str, rank: int = 0, size: int = 1) -> LanguageModel:
    """Finds backbone, head and logit shape, and proves the shape on a probe: for our logits to differ from the model's own is an
    error here, not a surprise in training. Of a model that `size` ranks hold together, this rank's part."""
    config, head = whole.config.get_text_config(), whole.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"The output head is a {type(head).__name__}; distft needs a linear one.", where=where)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    first, rows = _head_share(head.weight.shape[0], head_rows, rank, size)
    if not rows:
        raise ModelError(f"Rank {rank} of {size} would hold no token of a vocabulary of {head_rows}.", where=where,
                         help="Set score.tensor_parallel lower.")  # fmt: skip
    model = LanguageModel(whole=whole, head=head, shape=LogitShape(rows=rows, scale=scale, softcap=softcap), first_id=first)
    whole.eval()
    tokens = torch.arange(1, 9, device=head.weight.device)[None] % head_rows
    packed = PackedTokens(tokens_RL=tokens, positions_RL=torch.arange(tokens.shape[1], device=tokens.device)[None])
    with torch.no_grad():
        own = whole(input_ids=tokens, use_cache=False).logits[0, :, first : first + rows].float()
        ours = model.shape.logits(model.hidden(packed), model.weight, model.bias)
    if not bool(own.isfinite().all()):
        bad = [name for name, parameter in whole.named_parameters() if not bool(parameter.isfinite().all())]
        raise ModelError(
            f"The model's logits are not finite. Weights that are not: {', '.join(bad[:5]) or 'none'}.", where=where,
            help="Take a sound checkpoint, or another dtype if all weights are finite.",
        )  # fmt: skip
    # Both are the same sums of the same numbers but for the order, so bfloat16 may part them by a few of its steps (2^-8).
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 2e-2
    difference = float((own - ours).abs().max())
    if not difference <= tolerance * max(1.0, float(own.abs().max())):
        raise ModelError(
            f"{type(whole).__name__} does something to its logits that distft does not know: they differ by {difference:.3g}.",
            where=where, help="Known are a bias, logit_scale, logits_scaling and final_logit_softcapping.",
        )  # fmt: skip
    return model
