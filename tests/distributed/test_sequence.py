"""Ranks that share rows take the step that one rank takes with whole rows: loss, gradients, metrics and drift.

Starting ranks takes longer than what they do, so one start serves many tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distft.corpus.reader import Document
from distft.engine.base import PackedTokens
from distft.engine.pack import lay_out, pack
from distft.engine.sequence import share_rows
from distft.engine.world import World
from distft.errors import ModelError
from distft.store.model_folder import resolve_model
from distft.train.drift import Drift, measure_drift
from tests.helpers import zero3
from tests.helpers.models import tiny_model_folder
from tests.helpers.objectives import ALL_POSITIONS, CATALOG
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import Taken, distance, feed, take
from tests.helpers.stores import Lab, document, lab, loaded, shared_model

LENGTHS = [21, 12, 11, 11, 10, 10, 9, 8, 3, 2]
"""In rows of 22 columns, half of them a rank's: one document over both ranks' columns, odd; borders at columns 10, 11 and 12; and
several documents within a rank's columns."""
WHOLE = {"train": {"micro_batch_tokens": 256}}
SFT_KL = CATALOG["sft_kl"]
HIDDEN = {"score": {"distribution": {"kind": "hidden"}, "positions": "all"}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", SFT_KL, WHOLE),
    "three micro-batches": ("llama", SFT_KL, {"train": {"micro_batch_tokens": 70}}),
    "a document to a micro-batch": ("llama", SFT_KL, {"train": {"micro_batch_tokens": 2}}),
    "untied, padded head": ("llama_untied_padded", SFT_KL, WHOLE),
    "norms of queries and keys": ("qwen3", SFT_KL, WHOLE),
    "windows": ("mistral_sliding", SFT_KL, WHOLE),
    "windows and soft cap": ("gemma3_softcap_sliding", SFT_KL, WHOLE),
    "soft cap in attention": ("gemma2", SFT_KL, {**WHOLE, "model": {"attention": "eager"}}),
    "one head for keys": ("one_key_head", SFT_KL, WHOLE),
    "no fewer heads for keys": ("all_key_heads", SFT_KL, WHOLE),
    "recomputed activations": ("gemma3_softcap_sliding", SFT_KL, {"train": {"gradient_checkpointing": True}}),
    "hidden states": ("qwen3", CATALOG["sft, prompt held"], {**WHOLE, **HIDDEN}),
    "prompt held": ("llama", CATALOG["stm, prompt held"], WHOLE),
    "groups of tokens": ("llama", CATALOG["lwf, by group"], {"train": {"micro_batch_tokens": 70}}),
    "live by token": ("llama", CATALOG["asft, prompt held"], WHOLE),
    "live by sequence": ("llama", CATALOG["eksft, prompt held"], {"train": {"micro_batch_tokens": 70}}),
    "live by sequence, collision": ("llama", CATALOG["eksft, published code"], WHOLE),
    "live by sequence, entropy": ("llama", CATALOG["talr"], WHOLE),
}
"""Student, objective, settings; the student is not the teacher."""
SAME = 1e-5
"""float32 sums in another order: of gradients of these peaked models up to 1.2e-6. A label that is lost is worth a hundredth."""


def documents() -> list[Document]:
    """Nearly all tokens are supervised, so that some label is the first of a rank's columns, and its predictor the other's last."""
    random = np.random.default_rng(7)
    return [
        document(random.integers(5, 270, length).tolist(), [n for n in range(1, length) if n % 5 or n == 1]) for length in LENGTHS
    ]


STUDENTS: dict[str, dict[str, Any]] = {
    "gemma2": {"family": "gemma2", "sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "one_key_head": {"num_key_value_heads": 1},
    "all_key_heads": {"num_key_value_heads": 4},
}
OTHERS: dict[str, dict[str, Any]] = {
    "quiet": {"initializer_range": 0.02, "layers": 4},
    "lfm2": {"family": "lfm2", "layer_types": ["conv", "full_attention"]},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "gpt_oss": {"family": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1},
}


def student(name: str) -> str:
    settings = STUDENTS.get(name) or OTHERS.get(name)
    if settings is None:
        return str(shared_model(name, seed=1).path)
    path = shared_model().path.parent / f"sequence-{name}"
    if not path.exists():
        tiny_model_folder(path, seed=1, vocabulary=280, hidden=32, **{"initializer_range": 0.5, **settings})
    return str(path)


def variant(made: Lab, name: str, path: str) -> Lab:
    _, objective, settings = CASES[name]
    return replace(made.changed(objective=objective, **settings), model=resolve_model(path, None))


def step(made: Lab, name: str, path: str, world: World) -> Taken:
    _, objective, settings = CASES[name]
    mine = feed(made.changed(objective=objective, **settings), world).step(np.arange(len(LENGTHS)))
    return take(variant(made, name, path), mine, world)


def drift(made: Lab, path: str, world: World) -> Drift:
    engine = replace(made, model=resolve_model(path, None)).engine(world)
    return measure_drift(engine.measure, made.corpus.documents("train"), made.cache(), world, tokens_per_batch=110)


@dataclass(frozen=True)
class Ranks:
    """What one rank has to tell."""

    steps: dict[str, Taken]
    drift: Drift
    zero3: zero3.Taken
    hidden: dict[str, float]
    kept: float
    refused: dict[str, str]


def on_two(world: World, made: Lab, students: dict[str, str], others: dict[str, str]) -> Ranks:
    world = world.in_teams(2)
    path = students["llama"]
    sharded = made.changed(objective=SFT_KL, train={"micro_batch_tokens": 110, "gradient_checkpointing": True})
    return Ranks(
        steps={name: step(made, name, students[model], world) for name, (model, *_) in CASES.items()},
        drift=drift(made, path, world),
        zero3=zero3.train(zero3.open_zero3(sharded, path, world), sharded, world, ZERO3_STEPS),
        hidden={"flash": end_to_end(world, students["mistral_sliding"]), "bfloat16": in_bfloat16(world, others["quiet"])},
        kept=kept(students["qwen3"], world) / kept(students["qwen3"], World()),
        refused={name: refused(world, path) for name, path in others.items() if name != "quiet"},
    )


ZERO3_STEPS = [list(range(10)), [2], [1, 3, 5]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTFT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        made = lab(tmp_path_factory.mktemp("lab"), documents=documents(), score=ALL_POSITIONS).changed(train={"clip": None})
        made.score()
        made.changed(**HIDDEN).score()
        yield made


@pytest.fixture(scope="module")
def students() -> dict[str, str]:
    return {model: student(model) for model, *_ in CASES.values()}


@pytest.fixture(scope="module")
def both(made: Lab, students: dict[str, str]) -> list[Ranks]:
    return run_ranks(on_two, 2, made, students, {name: student(name) for name in OTHERS})


def test_the_documents_lie_as_they_are_meant_to() -> None:
    layout = lay_out(LENGTHS, ranks=2)
    assert layout.width == 22
    borders = {start % 22 for start in layout.starts}
    assert {10, 11, 12} <= borders
    assert any(0 < border < 10 for border in borders) or any(border > 12 for border in borders)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_step_that_one_takes(name: str, both: list[Ranks], made: Lab, students: dict[str, str]) -> None:
    one = step(made, name, students[CASES[name][0]], World())
    for rank in both:
        same_step(one, rank.steps[name])
    assert 0 < both[0].steps[name].weighted < one.weighted
    assert sum(rank.steps[name].weighted for rank in both) == one.weighted


def same_step(one: Taken, other: Taken) -> None:
    assert distance(one.gradients, other.gradients) <= SAME
    for key, gradient in one.gradients.items():
        assert float((gradient - other.gradients[key]).norm()) <= SAME * float(gradient.norm()), key
    assert other.values.loss == pytest.approx(one.values.loss, rel=1e-6)
    assert other.values.counts == one.values.counts
    assert other.line == pytest.approx(one.line, rel=1e-5, abs=1e-7)
    assert other.micro_batches == one.micro_batches


def test_drift_is_that_of_one_rank(both: list[Ranks], made: Lab, students: dict[str, str]) -> None:
    one = drift(made, students["llama"], World())
    assert one.kl > 0.1
    for rank in both:
        assert rank.drift.facts() == pytest.approx(one.facts(), rel=1e-6)
        assert rank.drift.tokens == one.tokens


def test_under_zero3_two_ranks_take_the_steps_that_plain_torch_takes_on_one(
    both: list[Ranks], made: Lab, students: dict[str, str]
) -> None:
    plain = made.changed(objective=SFT_KL, train={"micro_batch_tokens": 110})
    one = zero3.train(zero3.open_local(plain, students["llama"], World()), plain, World(), ZERO3_STEPS)
    assert both[0].zero3.values == both[1].zero3.values, "the ranks part ways"
    for number, (mine, theirs) in enumerate(zip(one.values, both[0].zero3.values, strict=True)):
        assert theirs.loss == pytest.approx(mine.loss, rel=1e-5 if number else 1e-6)
        assert theirs.grad_norm == pytest.approx(mine.grad_norm, rel=3e-5 if number else 1e-6)
        assert theirs.counts == mine.counts
        assert theirs.masses == pytest.approx(mine.masses, rel=1e-5, abs=1e-6)
    found = both[0].zero3.weights
    assert found.keys() == one.weights.keys()
    apart = torch.cat([(one.weights[key] - found[key]).flatten() for key in one.weights]).double().norm()
    assert apart <= 1e-5 * torch.cat([tensor.flatten() for tensor in one.weights.values()]).double().norm()


def rows_of_documents() -> PackedTokens:
    random = np.random.default_rng(3)
    return pack([random.integers(5, 280, length).astype(np.uint32) for length in LENGTHS], lay_out(LENGTHS, ranks=2))


def own_columns(hidden: Tensor, packed: PackedTokens, world: World) -> Tensor:
    rows, width = packed.tokens_RL.shape
    return hidden.view(rows, world.team.size, width // world.team.size, -1)[:, world.team.rank].flatten(0, 1).float()


def end_to_end(world: World, path: str) -> float:
    """How far hidden states are from those of sdpa where attention looks for documents in a single row of positions: as flash
    attention does, which itself needs a GPU."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    packed = rows_of_documents()
    expected = own_columns(loaded(resolve_model(path, None)).hidden(packed), packed, world)
    model = loaded(resolve_model(path, None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", like_flash)
        model.whole.config._attn_implementation_internal = "flash_attention_2"
        found = share_rows(model, world.team).hidden(packed)
    return float((found - expected).norm(dim=1).max() / expected.norm(dim=1).max())


def like_flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, position_ids: Tensor, scaling: float,
    sliding_window: int, **given: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of each document to itself, by position ids alone."""
    assert attention_mask is None
    assert module.config._attn_implementation == "flash_attention_2"
    assert query.shape[0] == len(position_ids) == 1
    number = (position_ids[0] == 0).cumsum(0)
    place = torch.arange(len(number))
    near = place[:, None] - place[None, :]
    seen = (number[:, None] == number[None, :]) & (near >= 0) & (near < sliding_window)
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return found.transpose(1, 2), None


def in_bfloat16(world: World, path: str) -> float:
    """How far hidden states of a model of quiet weights are from those of whole rows; it is not refused either."""
    packed, model = rows_of_documents(), loaded(resolve_model(path, None), dtype="bfloat16")
    expected = own_columns(model.hidden(packed), packed, world)
    found = share_rows(model, world.team).hidden(packed).float()
    return float((found - expected).norm(dim=1).max() / expected.norm(dim=1).max())


def kept(path: str, world: World) -> int:
    """Bytes that the backbone keeps for the way back, of a long document."""
    model, found = share_rows(loaded(resolve_model(path, None)), world.team), dict[int, int]()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.whole.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = pack([np.arange(512, dtype=np.uint32) % 280], lay_out([512], ranks=2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(packed)
    assert hidden.requires_grad
    return sum(found.values())


def test_a_rank_keeps_its_share_of_the_activations(both: list[Ranks]) -> None:
    assert all(0.45 < rank.kept < 0.55 for rank in both)


def refused(world: World, path: str) -> str:
    model = loaded(resolve_model(path, None), attention="eager")
    try:
        share_rows(model, world.team)
    except ModelError as error:
        return error.problem
    return ""


def test_attention_that_looks_for_documents_in_one_row_finds_them(both: list[Ranks]) -> None:
    assert all(rank.hidden["flash"] <= 1e-5 for rank in both)


def test_in_bfloat16_hidden_states_are_those_of_whole_rows_to_rounding(both: list[Ranks]) -> None:
    assert all(rank.hidden["bfloat16"] <= 0.02 for rank in both)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("lfm2", "Lfm2ForCausalLM mixes tokens elsewhere than in attention: hidden states are off by "),
        ("dynamic", "LlamaForCausalLM has positions (dynamic) that follow from a row's length, which no rank sees."),
        ("gpt_oss", "GptOssForCausalLM has weights per attention head within attention, which are not shared among ranks yet."),
    ],
)
def test_a_model_that_cannot_share_rows_is_refused_by_name_on_all_ranks(model: str, says: str, both: list[Ranks]) -> None:
    assert all(rank.refused[model].startswith(says) for rank in both)


def on_four(world: World, made: Lab, path: str) -> dict[str, Taken]:
    two, four = world.in_teams(2), world.in_teams(4)
    return {**{name: step(made, name, path, two) for name in ODD}, "one team": step(made, "llama", path, four)}


ODD = ["three micro-batches", "live by sequence"]
"""Of llama, whose two heads for keys a team of four ranks has to share. Three micro-batches leave one of two teams with nothing."""


def test_four_ranks_in_two_teams_or_one_take_the_step_that_one_takes(made: Lab, students: dict[str, str]) -> None:
    four = run_ranks(on_four, 4, made, students["llama"])
    for name in four[0]:
        one = step(made, "llama" if name == "one team" else name, students["llama"], World())
        for rank in four:
            assert distance(one.gradients, rank[name].gradients) <= SAME
            assert rank[name].line == pytest.approx(one.line, rel=1e-5, abs=1e-7)
            assert rank[name].values.counts == one.values.counts
        assert sum(rank[name].weighted for rank in four) == one.weighted
        assert one.micro_batches % 2 or name == "one team", "no team is left with nothing"


def whole_run(world: World, made: Lab) -> dict[str, Any]:
    return made.train(world)


def test_a_run_on_ranks_that_share_rows_is_the_run_on_one(tmp_path: Path) -> None:
    """From the check of the teacher to the last measurement; its checkpoint is one that any other number of ranks goes on from."""
    made = lab(tmp_path, documents=documents(), heldout=documents()[:3]).changed(
        train={"epochs": 2, "drift_every_steps": 2, "engine": "local"}
    )
    made.score()
    alone = made.changed(name="alone").train()
    shared = made.changed(name="shared", train={"sequence_parallel": 2})
    first, second = run_ranks(whole_run, 2, shared)
    assert first == second
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert first["drift"] == pytest.approx(alone["drift"], rel=1e-4)
    assert shared.changed(train={"sequence_parallel": 1}).run_identity() == shared.run_identity()
    assert shared.train() == {**first, "resumed_from": first["steps"]}, "a run that is finished needs no ranks"
