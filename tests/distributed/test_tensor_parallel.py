"""A teacher that two ranks hold together says what it says alone, and no rank ever has the logits of the whole vocabulary."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distft.cluster.pool import map_units
from distft.config.schema import Distribution, Hidden, NoDistribution, Sample, TopK
from distft.corpus.render import token_rows
from distft.engine.load import LanguageModel, load_model
from distft.engine.world import World
from distft.errors import ModelError
from distft.store.model_folder import resolve_model
from distft.teacher.build import build_teacher
from distft.teacher.forward import score_documents
from distft.teacher.scores import Scores
from tests.helpers.cluster import Cluster
from tests.helpers.models import tiny_model_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.stores import lab, random_documents

POLICIES: dict[str, Distribution] = {
    "default": TopK(),
    "crowded": TopK(k=5, min_prob=1e-4),
    "fixed": TopK(k=16, min_prob=0.0),
    "all": TopK(k=512, min_prob=0.0),
    "sample": Sample(kind="sample", draws=40, seed=3),
    "hidden": Hidden(kind="hidden"),
    "none": NoDistribution(kind="none"),
}
MODELS: dict[str, dict[str, Any]] = {
    "untied, padded to an odd number": {"tied": False, "padded_rows": 7},
    "tied": {"tied": True},
    "soft-capped": {"family": "gemma3_text", "final_logit_softcapping": 3.0, "padded_rows": 3},
}
LENGTHS = (40, 3, 17, 2, 29)


def documents() -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(0)
    tokens = [random.integers(5, 300, length).astype(np.uint32) for length in LENGTHS]
    return tokens, [np.arange(1, length, dtype=np.uint32) for length in LENGTHS]


def teacher(folder: str, world: World) -> LanguageModel:
    model = resolve_model(folder, None)
    device = torch.device("cpu")
    return load_model(model, dtype="float32", attention="sdpa", head_rows=token_rows(model), device=device, group=world)


def sharpened(model: LanguageModel) -> LanguageModel:
    """Random models find all tokens alike; real ones do not."""
    with torch.no_grad():
        model.whole.base_model.norm.weight.mul_(4.0)
    return model


def read_all(world: World, folders: dict[str, str]) -> dict[str, dict[str, list[Scores]]]:
    found = {}
    for name, folder in folders.items():
        model = sharpened(teacher(folder, world))
        assert len(model.weight) < model.whole.config.vocab_size / world.size + 1
        found[name] = {policy: score_documents(model, *documents(), kind, world) for policy, kind in POLICIES.items()}
    return found


def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    folders = {name: str(tiny_model_folder(tmp_path / name, **settings)) for name, settings in MODELS.items()}
    alone = read_all(World(), folders)
    for together in run_ranks(read_all, 2, folders):
        for model, policies in alone.items():
            for policy, expected in policies.items():
                for one, other in zip(expected, together[model][policy], strict=True):
                    agree(one, other, f"{model}, {policy}")


def agree(one: Scores, other: Scores, where: str) -> None:
    for name in ("positions", "rank", "counts", "ids"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), f"{where}: {name}"
    for name in ("label_logprob", "entropy"):
        assert np.abs(getattr(one, name) - getattr(other, name)).max() <= 1e-4, f"{where}: {name}"
    assert np.abs(one.tail - other.tail).max() <= 1e-6, where
    # The two may be on different sides of a float16 rounding.
    assert np.allclose(one.logprobs.astype(float), other.logprobs.astype(float), rtol=2**-10, atol=1e-4), where
    assert np.allclose(one.hidden.view(np.float32), other.hidden.view(np.float32), atol=1e-4), where


def cut_unevenly(world: World, folder: str) -> str:
    try:
        teacher(folder, world)
    except ModelError as error:
        return error.problem
    return "loaded"


def test_heads_that_do_not_divide_are_refused_with_numbers(tmp_path: Path) -> None:
    folder = str(tiny_model_folder(tmp_path, num_key_value_heads=1))
    told = run_ranks(cut_unevenly, 2, folder)
    assert (
        told == ["The model's attention heads cannot be shared evenly among 2 ranks: it has 4, with 1 for keys and values."] * 2
    )
    one, other = (score_documents(teacher(folder, World()), *documents(), TopK(k=k))[0] for k in (3, 4))
    with pytest.raises(AssertionError):
        agree(one, other, "other policies")


@pytest.mark.parametrize("policy", [{"kind": "topk"}, {"kind": "hidden"}], ids=["topk", "hidden"])
def test_groups_of_actors_make_the_cache_that_one_process_makes(cluster: Cluster, tmp_path: Path, policy: dict[str, Any]) -> None:
    """Two groups of two at once; the second run finds all there."""
    read = random_documents(30, seed=70)
    alone = lab(tmp_path / "alone", documents=read, score={"distribution": policy})
    together = lab(tmp_path / "together", documents=read, score={"distribution": policy, "tensor_parallel": 2, "workers": 2})
    alone.score()
    map_two = partial(map_units, address=cluster.address, workers=2, group=2)
    scored = build_teacher(together.run, together.corpus, together.model, together.store, map_two)
    assert scored.documents_scored == len(read)
    one, other = alone.cache(), together.cache()
    assert alone.identity() == together.identity()
    for document in read:
        agree(one.scores(document), other.scores(document), document.digest)
    if one.head is not None and other.head is not None:
        assert torch.equal(one.head.weight_VT, other.head.weight_VT)
    again = build_teacher(together.run, together.corpus, together.model, together.store, map_two)
    assert again.documents_scored == 0


def test_a_rank_that_is_killed_takes_its_group_along_and_another_finishes(cluster: Cluster, tmp_path: Path) -> None:
    read = random_documents(30, seed=71)
    alone, made = (lab(tmp_path / name, documents=read) for name in ("alone", "killed"))
    alone.score()
    died = tmp_path / "died"
    make = partial(KilledFollower, died)
    map_one = partial(map_units, address=cluster.address, workers=1, group=2)

    def map_dying(plan: Any, units: Any, report: Any) -> Any:
        return map_one(partial(make, plan), units, report)

    build_teacher(made.run, made.corpus, made.model, made.store, map_dying)
    assert died.exists()
    one, other = alone.cache(), made.cache()
    for document in read:
        agree(one.scores(document), other.scores(document), document.digest)


class KilledFollower:
    """A scorer whose second rank is killed once, in the middle of its second unit."""

    def __init__(self, died: Path, plan: Any) -> None:
        self.died, self.scorer, self.units = died, plan(), 0

    def __call__(self, unit: Any) -> Any:
        self.units += 1
        if os.environ["RANK"] == "1" and self.units == 2 and not self.died.exists():
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from self.scorer(unit))
