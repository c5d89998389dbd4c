"""ZeRO-3 on two ranks is plain torch on one: losses, norms, weights; and what stops it stops all ranks before anything changes.

Starting two ranks takes longer than what they do, so one start serves many tests.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distft.engine.base import MicroBatch, Slice, StepValues, share
from distft.engine.world import World
from distft.errors import CorruptArtifactError
from tests.helpers.models import tiny_model_folder
from tests.helpers.objectives import ALL_POSITIONS, uneven
from tests.helpers.quiet import no_memo  # noqa: F401
from tests.helpers.ranks import run_ranks
from tests.helpers.stores import Lab, lab, shared_model
from tests.helpers.zero3 import (
    STEPS,
    Taken,
    batches,
    copied,
    damaged,
    open_local,
    open_zero3,
    recut,
    refused,
    same,
    storage,
    train,
)  # fmt: skip

SFT_KL = {"kind": "sft_kl", "kl": 0.7}
PLAIN = "tied, many micro-batches"
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    PLAIN: ("llama", SFT_KL, {}),
    "untied, one micro-batch": ("llama_untied_padded", SFT_KL, {"train": {"micro_batch_tokens": 256}}),
    "untied, live by sequence": ("llama_untied_padded", {"kind": "eksft", "rho": 0.3, "lambda_kl": 0.4}, {}),
    "soft cap, live by token": ("gemma3_softcap_sliding", {"kind": "asft", "kl": 0.1}, {}),
    "head with a bias": ("phi", SFT_KL, {}),
    "recomputed activations": ("qwen3", SFT_KL, {"train": {"gradient_checkpointing": True}}),
    "offloaded": ("llama", SFT_KL, {"train": {"zero3": {"offload_optimizer": True, "offload_parameters": True}}}),
    "bfloat16": ("llama", SFT_KL, {"model": {"dtype": "bfloat16"}}),
}
"""Student, objective, settings; all with clipping that cuts every step, weight decay, and documents of uneven weight."""
MORE = STEPS[:3]


@dataclass(frozen=True)
class First:
    """What one rank of the first start has to tell."""

    cases: dict[str, Taken]
    more: Taken
    restored: dict[str, bool]
    stored: tuple[int, int]
    refused: dict[str, str]
    unharmed: bool
    good_after_bad: StepValues


@cache
def student(name: str) -> str:
    if name != "phi":
        return str(shared_model(name, seed=1).path)
    path = Path(shared_model().path.parent / name)
    tiny_model_folder(path, family="phi", seed=1, tied=False, vocabulary=280, hidden=32)  # pyright: ignore[reportArgumentType]
    return str(path)


def variant(made: Lab, name: str) -> Lab:
    _, objective, settings = CASES[name]
    return made.changed(objective=objective, **settings)


def first(world: World, made: Lab, students: dict[str, str], broken: dict[str, str]) -> First:
    torch.set_num_threads(1)
    engine = open_zero3(made, students["llama"], world)
    cases = {PLAIN: train(engine, made, world, STEPS)}
    kept, whole = copied(engine), {key: tensor.clone() for key, tensor in engine.tensors()}
    stored = storage(engine), sum(math.prod(p.ds_shape) * 4 for p in engine.parameters.values())
    more = train(engine, made, world, MORE)
    for name, (model, *_) in CASES.items():
        if name != PLAIN:
            engine = open_zero3(variant(made, name), students[model], world)
            cases[name] = train(engine, variant(made, name), world, STEPS)
    # back to where the ten steps ended: a fresh engine by slices, the same one by whole tensors
    again = open_zero3(made, students["llama"], world)
    again.restore_slices(recut(kept, again), optimizer_steps=len(STEPS))
    tensors: list[Any] = [whole]
    torch.distributed.broadcast_object_list(tensors)
    restored = {"slices": alike(train(again, made, world, MORE), more)}
    again.restore(tensors[0], optimizer_steps=len(STEPS))
    restored["tensors"] = alike(train(again, made, world, MORE), more)

    again.restore_slices(recut(kept, again), optimizer_steps=len(STEPS))
    mine, normaliser = batches(made, STEPS[0], world)
    bad = [spoilt(batch) for batch in mine] if world.rank == 1 else mine
    told = {
        "nan": refused(lambda: again.train_step(bad, normaliser=normaliser, lr=1e-3)),
        "no weight": refused(lambda: again.train_step([weightless(one) for one in mine], normaliser=normaliser, lr=1e-3)),
        **{name: refused(lambda path=path: open_zero3(made, path, world)) for name, path in broken.items()},
        "told otherwise": refused(lambda: told_otherwise(made, students["llama"], world)),
        "not as the file": refused(lambda: changed_on_the_way(made, students["llama"], world)),
    }
    unharmed = all(bytes_equal(one, two) for one, two in zip(copied(again), kept, strict=True))
    good = again.train_step(mine, normaliser=normaliser, lr=3e-4)
    return First(cases, more, restored, stored, told, unharmed, good)


def alike(one: Taken, two: Taken) -> bool:
    return one.values == two.values and same(one.weights, two.weights)


def bytes_equal(one: Slice, two: Slice) -> bool:
    return (one.name, one.start) == (two.name, two.start) and all(
        torch.equal(getattr(one, part), getattr(two, part)) for part in ("weight", "exp_avg", "exp_avg_sq")
    )


def spoilt(batch: MicroBatch) -> MicroBatch:
    return replace(batch, targets=replace(batch.targets, ce_N=batch.targets.ce_N * float("nan")))


def weightless(batch: MicroBatch) -> MicroBatch:
    none = {f"{part}_N": getattr(batch.targets, f"{part}_N") * 0 for part in ("ce", "kl", "rkl", "entropy")}
    return replace(batch, targets=replace(batch.targets, **none))


def told_otherwise(made: Lab, student: str, world: World) -> None:
    """DeepSpeed is told to clip, to add up in bfloat16, and nothing of the offloading."""
    from distft.engine import zero3_settings

    plain = zero3_settings.settings
    other = {"gradient_clipping": 0.5, "communication_data_type": "bf16"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero3_settings, "settings", lambda *args, **named: {**plain(*args, **named), **other})
        open_zero3(made, student, world)


def changed_on_the_way(made: Lab, student: str, world: World) -> None:
    """One number of one rank is not what was read."""
    from distft.engine import zero3

    plain = zero3._read_sharded

    def reading(*args: Any) -> Any:
        whole = plain(*args)
        if world.rank == 1:
            whole.model.layers[1].mlp.up_proj.weight.ds_tensor.data[-1] += 1
        return whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero3, "_read_sharded", reading)
        open_zero3(made, student, world)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    before = os.environ.get("DISTFT_CACHE_DIR")
    os.environ["DISTFT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    made = lab(tmp_path_factory.mktemp("lab"), documents=uneven(), score=ALL_POSITIONS, objective=SFT_KL)
    made.score()
    half = made.changed(model={"dtype": "bfloat16"})
    half.score()
    yield made.changed(train={"clip": 0.05, "micro_batch_tokens": 16, "weight_decay": 0.1})
    if before is not None:
        os.environ["DISTFT_CACHE_DIR"] = before


@pytest.fixture(scope="module")
def both(made: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[First]:
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("broken"), shared_model("llama", seed=1)

    def missing(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def reshaped(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].clone()

    def infinite(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][-1, -1] = float("inf")

    broken = {change.__name__: damaged(model, folder / change.__name__, change) for change in (missing, reshaped, infinite)}
    students = {model: student(model) for model, *_ in CASES.values()}
    return run_ranks(first, 2, made, students, broken)


@pytest.fixture(scope="module")
def alone(made: Lab) -> dict[str, Taken]:
    torch.set_num_threads(1)
    taken = {}
    for name, (model, *_) in CASES.items():
        one = variant(made, name)
        taken[name] = train(open_local(one, student(model), World()), one, World(), STEPS)
    return taken


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_on_two_ranks_are_those_of_plain_torch_on_one(name: str, both: list[First], alone: dict[str, Taken]) -> None:
    """In bfloat16, too: each micro-batch is rounded alike on any rank, and what follows is float32 sums in another order. Norms are as
    close before the first update; after it, these peaked models turn 1e-7 of a weight into up to 1e-5 of a gradient."""
    one, two = alone[name], both[0].cases[name]
    assert two.values == both[1].cases[name].values, "the ranks part ways"
    assert two.micro_batches != one.micro_batches or "one micro-batch" in name
    for number, (mine, theirs) in enumerate(zip(one.values, two.values, strict=True)):
        assert theirs.loss == pytest.approx(mine.loss, rel=1e-6)
        assert theirs.grad_norm == pytest.approx(mine.grad_norm, rel=3e-5 if number else 1e-6)
        assert theirs.counts == mine.counts
        assert theirs.sums == pytest.approx(mine.sums, rel=1e-5, abs=1e-6)
        assert theirs.masses == pytest.approx(mine.masses, rel=1e-5, abs=1e-6)
        assert mine.grad_norm > 0.05, "nothing is clipped"
    assert one.weights.keys() == two.weights.keys()
    assert both[1].cases[name].weights == {}
    apart = torch.cat([(one.weights[key] - two.weights[key]).flatten() for key in one.weights]).double().norm()
    assert apart <= 1e-6 * torch.cat([tensor.flatten() for tensor in one.weights.values()]).double().norm()


def test_no_rank_ever_holds_the_whole(both: list[First]) -> None:
    for rank in both:
        held, whole = rank.stored
        assert held <= 0.52 * whole, "half, and the norms"


@pytest.mark.parametrize("name", CASES)
def test_over_all_ranks_each_element_is_given_once(name: str, both: list[First]) -> None:
    found: Counter[tuple[str, int]] = Counter()
    weights = both[0].cases[name].weights
    for rank, one in enumerate(both):
        for piece in one.cases[name].slices:
            assert (piece.start, piece.stop) == share(math.prod(piece.shape), rank, 2)
            assert torch.equal(weights[piece.name].flatten()[piece.start : piece.stop], piece.weight)
            assert len(piece.exp_avg) == len(piece.exp_avg_sq) == len(piece.weight)
            found.update((piece.name, element) for element in range(piece.start, piece.stop))
    assert len(found) == sum(tensor.numel() for tensor in weights.values())
    assert set(found.values()) == {1}


@pytest.mark.parametrize("how", ["slices", "tensors"])
def test_restored_on_as_many_ranks_it_goes_on_bit_for_bit(how: str, both: list[First]) -> None:
    assert all(rank.restored[how] for rank in both)


def test_what_is_no_number_stops_all_ranks_and_changes_nothing(both: list[First]) -> None:
    for rank in both:
        assert rank.refused["nan"].startswith("TrainingError: The loss is nan and the gradient norm ")
        assert rank.refused["no weight"].startswith("TrainingError: No token has a weight")
        assert rank.unharmed
        assert rank.good_after_bad == both[0].more.values[0]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "ModelError: The weight files lack 1 tensors of the architecture"),
        ("reshaped", "ModelError: The weight files hold 1 tensors in another shape: model.layers.0.mlp.up_proj.weight (63, 32)"),
        ("infinite", "ModelError: 1 of the model's weights are not finite: model.layers.0.mlp.down_proj.weight"),
        ("not as the file", "ModelError: 1 of the model's weights are not in memory as the files have them: model.layers.1"),
        ("told otherwise", "TrainingError: DeepSpeed does not do what it was told: dtype of reduction is torch.bfloat16"),
    ],
)
def test_all_ranks_refuse_what_is_not_what_it_should_be(case: str, says: str, both: list[First]) -> None:
    for rank in both:
        assert rank.refused[case].startswith(says), rank.refused[case]
    assert "clipping is {0.5}, and {0.0} was asked for" in both[0].refused["told otherwise"]


def one_rank(world: World, made: Lab, student: str, slices: list[Slice]) -> tuple[Taken, Taken]:
    torch.set_num_threads(1)
    engine = open_zero3(made, student, world)
    engine.restore_slices(recut(slices, engine), optimizer_steps=len(STEPS))
    return train(engine, made, world, MORE), train(engine, made, world, MORE)


def two_ranks(world: World, made: Lab, student: str, slices: list[Slice]) -> Taken:
    torch.set_num_threads(1)
    engine = open_zero3(made, student, world)
    engine.restore_slices(recut(slices, engine), optimizer_steps=len(STEPS) + len(MORE))
    return train(engine, made, world, MORE)


def test_restored_on_another_number_of_ranks_it_goes_on(made: Lab, both: list[First]) -> None:
    """From two to one, from one to two, and from ZeRO-3 to plain torch; always to the losses of who was not stopped."""
    slices, expected = [piece for rank in both for piece in rank.cases[PLAIN].slices], both[0].more

    [(one, further)] = run_ranks(one_rank, 1, made, student("llama"), slices)
    first, second = run_ranks(two_ranks, 2, made, student("llama"), one.slices)
    local = open_local(made, student("llama"), World())
    local.restore_slices(recut(slices, local), optimizer_steps=len(STEPS))
    plain = train(local, made, World(), MORE)
    assert first.values == second.values
    for found, wanted in ((one, expected), (plain, expected), (first, further)):
        assert [v.loss for v in found.values] == pytest.approx([v.loss for v in wanted.values], rel=1e-6)
        apart = max(float((found.weights[key] - wanted.weights[key]).abs().max()) for key in wanted.weights)
        assert apart <= 1e-6


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("numel", [1, 2, 6, 7, 20])
def test_shares_are_whole_and_in_order(numel: int, ranks: int) -> None:
    cuts = [share(numel, rank, ranks) for rank in range(ranks)]
    assert cuts[0][0] == 0
    assert cuts[-1][1] == numel
    assert all(one[1] == two[0] for one, two in pairwise(cuts))
    assert len({stop - start for start, stop in cuts if stop < numel}) <= 1


@pytest.mark.parametrize("wrong", ["twice", "missing", "unknown", "reshaped", "short of moments"])
def test_slices_that_are_not_what_is_wanted_are_refused(wrong: str, made: Lab) -> None:
    engine = open_local(made, student("llama"), World())
    slices = copied(engine)
    name, place = slices[3].name, 3
    half = len(slices[place].weight) // 2
    if wrong == "twice":
        slices.append(replace(slices[place], start=half, **{part: getattr(slices[place], part)[half:] for part in PARTS}))
    elif wrong == "missing":
        slices[place] = replace(slices[place], **{part: getattr(slices[place], part)[:half] for part in PARTS})
    elif wrong == "unknown":
        slices[place] = replace(slices[place], name="another")
    elif wrong == "reshaped":
        slices[place] = replace(slices[place], shape=(*slices[place].shape, 1))
    else:
        slices[place] = replace(slices[place], exp_avg=slices[place].exp_avg[:1])
    with pytest.raises(CorruptArtifactError, match="another" if wrong == "unknown" else name):
        engine.restore_slices(slices, optimizer_steps=3)


PARTS = ("weight", "exp_avg", "exp_avg_sq")
