"""How long a step waits for its documents and what the teacher said of them, which are read while the step before it computes.

python -m pytest -m bench -s tests/bench/waiting.py

A whole `train` of plain torch from a store on the disk and from one on S3 (moto's server on this machine), with a cache of 64 entries
a token. Its parts are brought to the disk before the first step; that is told apart. The model is small, so that a step is short and
waiting shows: one of a larger model waits as long and computes longer.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.engine.world import World
from distft.store.location import Location
from distft.train.stage import train_run
from tests.helpers.peaks import drawn
from tests.helpers.quiet import no_memo, one_thread  # noqa: F401
from tests.helpers.stores import Lab, document, run_config, write_corpus

STEPS, TOKENS = 20, 512
SHAPE = {
    "hidden": 256, "layers": 6, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 32_000,
}  # fmt: skip
"""12 million parameters."""
ENTRIES: dict[str, Any] = {"distribution": {"kind": "topk", "k": 64, "min_prob": 0.0}}


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_how_long_a_step_waits(tmp_path: Path, store: Location) -> None:
    random, model = np.random.default_rng(0), drawn(tmp_path / "model", SHAPE)
    lengths = random.integers(64, 193, STEPS * TOKENS // 128 + 24)
    documents = [
        document(random.integers(0, SHAPE["vocab_size"], length).tolist(), list(range(round(0.4 * length), length)))
        for length in lengths
    ]
    train = {"tokens_per_step": TOKENS, "micro_batch_tokens": TOKENS // 2, "max_steps": STEPS}
    run = run_config(tmp_path, model, score=ENTRIES, train=train).model_copy(update={"store": store.url})
    made = Lab(folder=tmp_path, run=run, model=model, corpus=write_corpus(store, tmp_path / "staging", train=documents))
    made.score()
    began = time.perf_counter()
    staged = made.cache()
    staging = time.perf_counter() - began
    train_run(made.run, made.model, made.corpus, staged, made.store, World())
    lines = [json.loads(line) for line in made.run_folder.read("metrics.jsonl").splitlines()]
    assert len(lines) == STEPS
    shares = [line["data_seconds"] / line["seconds"] for line in lines]
    seconds = statistics.median(line["seconds"] for line in lines)
    whole = sum(line["data_seconds"] for line in lines) / sum(line["seconds"] for line in lines)
    where = "S3" if store.url.startswith("s3:") else "disk"
    print(
        f"\n{where}: {STEPS} steps of {seconds:.2f} s, load {os.getloadavg()[0]:.1f}; waiting {statistics.median(shares):.3%} of a "
        f"step, {max(shares[1:]):.3%} of the worst but the first, {shares[0]:.3%} of the first, {whole:.3%} of all; staged in "
        f"{staging:.1f} s"
    )
