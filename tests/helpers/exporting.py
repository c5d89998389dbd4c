"""Exports for tests: models of many architectures, weights as a checkpoint gives them, and both ways of writing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.config.schema import Run
from distft.engine.base import Slice, share
from distft.engine.sharded import blank_model
from distft.export.layout import Shard, index, shards, sources
from distft.export.whole import write_whole
from distft.export.write import stored_bytes, write_shards
from distft.progress import track
from distft.store.location import Location, open_location
from distft.store.manifest import Manifest, commit
from distft.store.model_folder import ModelFolder, resolve_model
from distft.train.identity import run_identity
from distft.train.rank_files import Memory, manifest_facts, put_rank_file
from tests.helpers.models import tiny_tokenizer_folder
from tests.helpers.stores import run_config

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied": {"tie_word_embeddings": False},
    "qwen3": {},
    "mistral, untied": {"tie_word_embeddings": False},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt_neox, untied": {"tie_word_embeddings": False},  # the head has another name on disk
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},  # experts are apart on disk
    "mixtral": {"num_local_experts": 4},  # and have other names
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },  # and a buffer is stored
}  # fmt: skip
"""What differs between architectures where what is stored could differ from what is computed with."""


def architecture(folder: Path, name: str) -> ModelFolder:
    """A random model of two small layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_tokenizer_folder(folder, vocabulary=280)
    given = {
        "vocab_size": 280, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    config = AutoConfig.for_model(name.partition(",")[0], **{**given, **ARCHITECTURES[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for buffer in (tensor for name, tensor in whole.named_buffers() if name in whole.state_dict()):
                buffer.copy_(torch.rand_like(buffer))
    whole.save_pretrained(folder)
    return resolve_model(str(folder), None)


def random_weights(model: ModelFolder, seed: int = 1) -> dict[str, Tensor]:
    """Trained weights, as it were: each parameter once."""
    random = torch.Generator().manual_seed(seed)
    named = blank_model(model, dtype="float32").named_parameters()
    return {name: torch.randn(parameter.shape, generator=random) for name, parameter in named}


def runs(weights: dict[str, Tensor], length: int = 1000) -> Iterator[tuple[str, Tensor]]:
    """As a checkpoint gives them: run by run."""
    for name, tensor in weights.items():
        for run in tensor.view(-1).split(length):
            yield name, run.clone()


def stream(
    model: ModelFolder, weights: dict[str, Tensor], target: Path, *, dtype: str = "float32", shard_bytes: int = 1 << 30
) -> list[Shard]:
    """Writes the files of weights, and the index."""
    target.mkdir(parents=True)
    whole: Any = blank_model(model, dtype=dtype)
    found = sources(whole, model, [(name, tuple(tensor.shape)) for name, tensor in weights.items()], dtype)
    assert found is not None, "it cannot be streamed"
    files = shards(found, shard_bytes)
    with track("export", None, "bytes") as meter:
        write_shards(files, stored_bytes(found, runs(weights), whole), target, lambda entry, path: None, meter)
    for name, text in index(files, whole.num_parameters()).items():
        (target / name).write_bytes(text)
    return files


def save_pretrained(
    model: ModelFolder, weights: dict[str, Tensor], target: Path, *, dtype: str = "float32", shard_bytes: int = 1 << 30
) -> None:
    """What transformers writes of the same; of a model with buffers, they are those of its folder."""
    from transformers import AutoModelForCausalLM

    whole: Any = blank_model(model, dtype=dtype)
    if any(name in whole.state_dict() for name, _ in whole.named_buffers()):
        whole = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, local_files_only=True)
        whole._weight_conversions = None
        dtype = "float32"
    write_whole(whole, weights, target, dtype=dtype, shard_bytes=shard_bytes)


def run_of(folder: Path, **export: Any) -> tuple[Run, ModelFolder, dict[str, Any], Location]:
    """What `export_run` takes, of the model and the store in a folder."""
    model = resolve_model(str(folder / "model"), None)
    run = run_config(folder / "store", model, objective={"kind": "sft"}, export=export)
    return run, model, run_identity(run, model, corpus={"heldout": None}, teacher=None), open_location(run.store)


def save_checkpoint(folder: Path, *, ranks: int, **export: Any) -> dict[str, Tensor]:
    """The checkpoint of a run of so many ranks that was never run, over the model in a folder; returns its weights."""
    run, model, identity, store = run_of(folder, **export)
    where, weights = store.child("runs", run.name, "checkpoints", "step-00000003"), random_weights(model)
    entries = []
    for rank in range(ranks):
        slices = []
        for name, tensor in weights.items():
            start, stop = share(tensor.numel(), rank, ranks)
            mine = tensor.view(-1)[start:stop]
            slices.append(Slice(name=name, shape=tuple(tensor.shape), start=start, weight=mine, exp_avg=mine, exp_avg_sq=mine))
        entries.append(put_rank_file(where, Memory().copy(slices), rank))
    facts = {"loss": 1.0, "drift": None, "total_steps": 3, **manifest_facts([(n, tuple(t.shape)) for n, t in weights.items()])}
    commit(where, Manifest(kind="checkpoint", identity={"step": 3, "run": identity}, files=tuple(entries), facts=facts))
    return weights
