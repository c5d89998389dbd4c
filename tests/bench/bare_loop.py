"""What a step of ours costs beside the loop that one would write oneself: transformers and DeepSpeed, cross-entropy and nothing else.

python -m pytest -m bench -s tests/bench/bare_loop.py

A is that loop: the same weights, AdamW and ZeRO-3 settings, the model's own logits of every place, torch's cross-entropy. B is ours,
with all that `train` does between a document and its metrics: the feed makes micro-batches, of what it reads from a teacher's cache
too where the objective asks for it. A is given the packed rows for nothing. Both train: their losses must be the same.

One process, a world of one, on the CPU in float32. The model has SmolLM2-135M's shape; DISTFT_BENCH_MODEL names a folder with another.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from distft.config.schema import Train
from distft.engine import zero3_settings
from distft.engine.base import MicroBatch
from distft.engine.sharded import blank_model
from distft.engine.step import adamw
from distft.engine.world import World
from distft.store.model_folder import ModelFolder, resolve_model
from tests.bench.ratios import HEADER, Ratio, compare
from tests.helpers.peaks import drawn
from tests.helpers.quiet import no_memo, one_thread  # noqa: F401
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import feed
from tests.helpers.stores import Lab, document, lab
from tests.helpers.zero3 import open_zero3

SMOLLM2 = {
    "hidden": 576, "layers": 30, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": 49_152,
}  # fmt: skip
LENGTHS = (176, 112, 96, 80, 64, 32)
"""Two micro-batches; in the second, two documents share a row."""
ROUNDS, LR = 5, 1e-5
ENTRIES: dict[str, Any] = {"distribution": {"kind": "topk", "k": 64, "min_prob": 0.0}}

CASES: dict[str, tuple[dict[str, Any], float]] = {
    "sft, answers of 60 %": ({"kind": "sft"}, 0.6),
    "sft, all supervised": ({"kind": "sft"}, 1.0),
    "sft_kl of 64 entries, answers of 60 %": ({"kind": "sft_kl"}, 0.6),
}
"""Objective, and how much of each document is answer."""


class BareLoop:
    """Reads the folder for itself."""

    def __init__(self, folder: ModelFolder, train: Train) -> None:
        import deepspeed
        from transformers import AutoModelForCausalLM
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        sizes = zero3_settings.Sizes.of(blank_model(folder, dtype="float32"))
        settings = zero3_settings.settings(train, dtype="float32", sizes=sizes, cuda=False)
        settings["gradient_clipping"] = train.clip
        told = HfDeepSpeedConfig(settings)  # transformers looks for it as long as it lives
        model: Any = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32, attn_implementation="sdpa")
        unset_hf_deepspeed_config()
        del told
        optimizer = adamw([(p, p) for p in model.parameters()], train)
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        self.engine.train()

    def step(self, rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], count: float, *, lr: float) -> float:
        """Rows are tokens, positions and, where a token is trained towards, its id at the place before it, else -100."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for number, (tokens, positions, labels) in enumerate(rows, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(rows))
            logits = self.engine(input_ids=tokens, position_ids=positions, use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
            self.engine.backward(loss)
            self.engine.step()
            total += loss.item()
        return total


def labelled(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same rows as one would make them oneself."""
    labels = torch.full_like(batch.packed.tokens_RL, -100)
    labels.view(-1)[batch.predictor_N] = batch.targets.labels_N
    return batch.packed.tokens_RL, batch.packed.positions_RL, labels


def prepared(folder: Path, answers: float, model: ModelFolder) -> Lab:
    random, rows = np.random.default_rng(0), model.vocabulary_rows()
    documents = [
        document(random.integers(0, rows, length).tolist(), list(range(max(1, round(length * (1 - answers))), length)))
        for length in LENGTHS
    ]
    train = {"tokens_per_step": sum(LENGTHS), "micro_batch_tokens": 2 * LENGTHS[0] + 32, "engine": "zero3", "lr": LR}
    return lab(folder, documents=documents, model=model, train=train, score=ENTRIES)


@dataclass(frozen=True)
class Found:
    ratio: Ratio
    supervised: int
    micro_batches: int
    bare: list[float]
    ours: list[float]
    """Losses of each step, those that warm up too."""


def measured(world: World, made: Lab) -> Found:
    warnings.simplefilter("ignore")
    ours, source, documents = open_zero3(made, str(made.model.path), world), feed(made), np.arange(len(LENGTHS))
    bare = BareLoop(made.model, made.run.train)
    plain = feed(made.changed(objective={"kind": "sft"})).step(documents)
    rows, count = [labelled(batch) for batch in plain.micro_batches], float(sum(plain.counts))
    losses: tuple[list[float], list[float]] = [], []

    def one() -> None:
        losses[0].append(bare.step(rows, count, lr=LR))

    def two() -> None:
        mine = source.step(documents)
        micro_batches, normaliser = mine.normalised(mine.counts)
        losses[1].append(ours.train_step(micro_batches, normaliser=normaliser, lr=LR).loss)

    return Found(compare(one, two, rounds=ROUNDS), int(count), len(rows), *losses)


@pytest.mark.bench
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_a_step_beside_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    given = os.environ.get("DISTFT_BENCH_MODEL")
    model = resolve_model(given, None) if given else drawn(tmp_path / "model", SMOLLM2)
    objective, answers = CASES[name]
    made = prepared(tmp_path, answers, model).changed(objective=objective)
    if made.run.needs_teacher:
        made.score()
    [found] = run_ranks(measured, 1, made, timeout=3000)
    print(
        f"\na step: {sum(LENGTHS)} tokens, {found.supervised} supervised, {found.micro_batches} micro-batches, "
        f"{model.parameter_count():,} parameters, ZeRO-3 on one rank, float32, one thread; {ROUNDS} rounds, "
        f"load {os.getloadavg()[0]:.1f}\n{HEADER}"
    )
    print(found.ratio.row(f"A bare, B {name}"))
    if objective["kind"] == "sft":
        apart = max(abs(a / b - 1) for a, b in zip(found.bare, found.ours, strict=True))
        print(f"losses {found.bare[0]:.4f} to {found.bare[-1]:.4f}, at most {apart:.1g} apart")
        assert apart < 1e-5
