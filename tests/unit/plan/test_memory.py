"""What a plan says of memory: by what it knows of the run, of the engines, and of models whose needs are published."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from distft.config.load import validate
from distft.config.schema import Run
from distft.plan import memory as model
from distft.plan.largest import GPU_BYTES, largest
from distft.plan.load import Load, load_of
from distft.plan.measured import Lengths
from distft.plan.memory import Memory, memory
from distft.plan.shape import PUBLISHED, Shape, family
from distft.plan.show_memory import largest_lines, memory_lines

BILLION = 1_000_000_000
LLAMA_1B, _, LLAMA_8B, _, _, LLAMA_70B, _, LLAMA_405B = PUBLISHED
USUAL = Load(half=True, zero3=True, ranks=8, tokens=8_192, row=4_096, shared_rows=True, gradient_checkpointing=True)
"""The run file's defaults, with gradient checkpointing."""


def run(**sections: Any) -> Run:
    return validate({"name": "a", "model": {"path": "m"}, "data": {"train": {"path": "t"}}, **sections}, where="")


def test_its_constants_are_those_of_the_code_that_it_speaks_of() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from distft.engine import zero3_settings
    from distft.objectives import loss

    assert (model.HEAD_BUFFER_BYTES, *model.CHUNK_TOKENS) == (loss.BUFFER_BYTES, loss.LEAST_TOKENS, loss.MOST_TOKENS)
    assert (zero3_settings.BUCKET, zero3_settings.PREFETCH, zero3_settings.LIVE) == (model.BUCKET, model.PREFETCH, model.LIVE)
    assert DeepSpeedZeroConfig.model_fields["sub_group_size"].default == model.UPDATED_AT_ONCE


def test_a_chunk_is_as_large_as_the_losss() -> None:
    import torch

    from distft.objectives.distributions import LogitShape
    from distft.objectives.loss import loss_chunk

    for rows in (32_000, 128_256, 262_144):
        shape = replace(LLAMA_1B, vocabulary=rows)
        for half, dtype in ((False, torch.float32), (True, torch.bfloat16)):
            chunk = loss_chunk(LogitShape(rows=rows), None, dtype)
            assert model._buffers(shape, replace(USUAL, half=half)) == pytest.approx(4 * (1 + 0.5 * half) * chunk * rows)


def standing(found: Memory) -> float:
    """What stands throughout, with neither passes nor checkpoints: bytes of weights, gradients and optimizer."""
    names = ("weights", "float32 weights", "moments", "gradient sums")
    return sum(terms.get(name, 0) for terms in (found.device, found.host) for name in names)


@pytest.mark.parametrize(
    ("load", "bytes_a_parameter"),
    [
        ({"half": False, "zero3": False}, 16),  # weight, gradient, two moments
        ({"half": True, "zero3": False}, 18),  # and the weight in bfloat16
        ({"half": False, "zero3": True}, 20),  # weights twice: DeepSpeed keeps its float32 ones apart
        ({"half": True, "zero3": True}, 18),
        ({"half": True, "zero3": True, "offload_optimizer": True}, 22),  # gradients twice
    ],
)
def test_bytes_a_parameter_by_engine(load: dict[str, Any], bytes_a_parameter: float) -> None:
    one = memory(LLAMA_8B, replace(USUAL, ranks=1, **load))
    assert standing(one) == pytest.approx(bytes_a_parameter * LLAMA_8B.parameters)
    eight = memory(LLAMA_8B, replace(USUAL, ranks=8, **load))
    assert standing(eight) == pytest.approx(standing(one) / (8 if load["zero3"] else 1))
    assert eight.host["copy for a checkpoint"] == pytest.approx(12 * LLAMA_8B.parameters / (8 if load["zero3"] else 1))


def test_what_is_offloaded_is_the_hosts() -> None:
    usual = memory(LLAMA_8B, USUAL)
    optimizer = memory(LLAMA_8B, replace(USUAL, offload_optimizer=True))
    both = memory(LLAMA_8B, replace(USUAL, offload_optimizer=True, offload_parameters=True))
    assert usual.device_bytes > optimizer.device_bytes > both.device_bytes
    assert usual.host_bytes < optimizer.host_bytes < both.host_bytes
    assert not {"moments", "float32 weights", "gradient sums", "weights"} & both.device.keys()


def test_what_saves_memory_saves_it_in_the_estimate() -> None:
    def needed(**changed: Any) -> int:
        return memory(LLAMA_8B, replace(USUAL, **changed)).device_bytes

    assert needed() < needed(gradient_checkpointing=False)
    assert needed(tokens=1_024) < needed()
    assert needed(gradient_checkpointing=False, shared_rows=False) < needed(gradient_checkpointing=False)
    assert needed(gradient_checkpointing=False, attention="flash_attention_2") < needed(gradient_checkpointing=False)
    assert needed(gradient_checkpointing=False, attention="eager") > needed(gradient_checkpointing=False)
    assert needed(teacher_head=10**9) >= needed() + 10**9


def test_a_micro_batch_is_as_full_as_it_can_be() -> None:
    def tokens(lengths: list[int] | None, **train: Any) -> int:
        return load_of(run(train=train), lengths=None if lengths is None else Lengths.of(np.array(lengths))).tokens

    assert tokens(None) == 8_192
    assert tokens(None, tokens_per_step=1_000) == 1_000, "no step fills the micro-batch"
    assert tokens([100] * 50) == 5_000, "nor does the whole corpus"
    assert tokens([100] * 5_000) == 8_192
    assert tokens([100] * 5_000 + [9_000]) == 9_000, "a longer document has a micro-batch of its own"


@pytest.mark.parametrize(("lengths", "shared"), [([100, 100], False), ([60, 100], False), ([60, 40, 100], True), ([7], False)])
def test_rows_that_can_hold_two_documents_need_a_mask(lengths: list[int], shared: bool) -> None:
    assert Lengths.of(np.array(lengths)).share_rows == shared


def test_which_engine_is_taken() -> None:
    def zero3(**train: Any) -> bool:
        return load_of(run(train=train), lengths=None).zero3

    assert not zero3()
    assert zero3(workers=8)
    assert not zero3(workers=8, engine="local")
    assert zero3(engine="zero3")
    assert zero3(zero3={"offload_optimizer": True})


def test_a_shape_is_read_from_the_config() -> None:
    config = {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128_256, "model_type": "llama",
    }  # fmt: skip
    assert Shape.of(config, LLAMA_1B.parameters) == LLAMA_1B, "tied, by its size"
    assert not Shape.of(config, LLAMA_1B.parameters + LLAMA_1B.head).tied
    inside = {"text_config": {**config, "head_dim": 128, "model_type": "qwen3"}}
    found = Shape.of(inside, BILLION)
    assert (found.queries, found.keys, found.norms_heads) == (4096, 1024, True)


@pytest.mark.parametrize(
    ("shape", "billions"), zip(PUBLISHED, (1.24, 3.21, 8.03, 14.8, 32.8, 70.6, 122.6, 405.9), strict=True)
)  # fmt: skip
def test_published_models_have_their_size(shape: Shape, billions: float) -> None:
    assert shape.parameters / BILLION == pytest.approx(billions, rel=0.01)
    assert family(shape.parameters) == shape


@pytest.mark.parametrize("billions", [0.5, 2, 5, 20, 100, 250, 1000])
def test_models_between_have_the_size_asked_for(billions: float) -> None:
    assert family(billions * BILLION).parameters == pytest.approx(billions * BILLION, rel=0.06)


@pytest.mark.parametrize(
    ("shape", "gpus", "offloaded", "fits"),
    [
        (LLAMA_8B, 8, False, True),
        (LLAMA_8B, 1, False, False),  # 18 bytes a parameter are 144 GB
        (LLAMA_8B, 1, True, True),  # 16 GB of weights remain
        (LLAMA_70B, 32, False, True),
        (LLAMA_70B, 8, False, False),
        (LLAMA_70B, 8, True, True),
        (LLAMA_405B, 32, False, False),
    ],
)
def test_what_is_known_to_fit_fits(shape: Shape, gpus: int, offloaded: bool, fits: bool) -> None:
    """As full fine-tunings by ZeRO-3 in bfloat16 are published: 16 to 20 bytes a parameter, shared by all GPUs, and activations."""
    found = memory(shape, replace(USUAL, ranks=gpus, offload_optimizer=offloaded))
    assert (found.device_bytes <= GPU_BYTES) == fits


def test_more_gpus_fit_larger_models() -> None:
    sizes = {one["gpus"]: one["parameters"] / BILLION for one in largest(USUAL, workers=16, local=False)}
    assert list(sizes) == [1, 8, 16, 32]
    assert 3 < sizes[1] < 8 < sizes[8] < 70 < sizes[32] < 120
    whole = {one["parameters"] for one in largest(USUAL, workers=8, local=True)}
    assert len(whole) == 1, "every GPU would hold all of it"


def test_it_fits_as_the_estimate_says() -> None:
    for one in largest(USUAL, workers=8, local=False):
        load = replace(USUAL, ranks=one["gpus"])
        assert 0.9 * GPU_BYTES < memory(family(one["parameters"]), load).device_bytes <= GPU_BYTES
        assert memory(family(one["parameters"]), load).host_bytes == one["host_bytes_per_rank"]


def test_memory_is_told_by_what_it_is_for() -> None:
    found = memory(LLAMA_8B, USUAL)
    told = memory_lines(found.facts())
    assert told[0].endswith(
        f"{found.device_bytes / 1e9:.3g} GB on the device, engine zero3 on 8 ranks, fullest in the {found.moment}"
    )
    terms = [line.split("  ")[-1] for line in told if line.startswith(" " * 23 + " ")]
    assert terms[0] == "moments", "largest first"
    assert terms.index("float32 weights") < terms.index("others") < len(terms) - 1
    assert terms[-1] == "copy for a checkpoint"
    assert any(line.endswith("12 GB of its host, and about 0.55 GB for the process itself") for line in told)
    assert told[-1].endswith("where there is no GPU")


def test_the_largest_is_told_in_billions() -> None:
    found = [
        {"gpus": 8, "gpu_bytes": GPU_BYTES, "parameters": 27_000_000_000, "host_bytes_per_rank": 40_500_000_000},
        {"gpus": 32, "gpu_bytes": GPU_BYTES, "parameters": 0, "host_bytes_per_rank": 0},
    ]
    first, second = largest_lines(found)
    assert first == "largest that fits        8 x 80 GB: 27 billion parameters, with 40.5 GB of host memory a GPU"
    assert second.split() == ["32", "x", "80", "GB:", "none", "at", "these", "settings"]


def test_ranks_that_share_rows_share_activations() -> None:
    """But for the mask of packed rows, which attention needs whole on each of them."""
    config = {"train": {"micro_batch_tokens": 32_768, "tokens_per_step": 1 << 20, "workers": 8}, "data": {"train": {"path": "t"}}}
    lengths = Lengths(longest=32_768, tokens=1 << 24, share_rows=False)
    alone = load_of(run(**config), lengths=lengths)
    shared = load_of(run(**{**config, "train": {**config["train"], "sequence_parallel": 4}}), lengths=lengths)
    assert (alone.tokens, shared.tokens) == (32_768, 8_192)
    activations = [memory(LLAMA_8B, load).device["activations"] for load in (alone, shared)]
    assert activations[1] == pytest.approx(activations[0] / 4, rel=1e-6)
    packed = replace(shared, shared_rows=True)
    mask = memory(LLAMA_8B, packed).device["activations"] - memory(LLAMA_8B, shared).device["activations"]
    assert mask >= 2 * 32_768 * 32_768 * LLAMA_8B.layers


def test_a_number_of_gpus_that_rows_cannot_be_shared_by_is_left_out() -> None:
    shared = replace(USUAL, sharing=8)
    assert [one["gpus"] for one in largest(shared, workers=16, local=False)] == [8, 16, 32]
