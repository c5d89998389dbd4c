"""What two ranks trained, each with its own file of the checkpoint, comes out as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distft.engine.world import World
from distft.export.stage import export_run
from tests.helpers.ranks import run_ranks
from tests.helpers.stores import Lab, lab, random_documents, shared_model


def train(world: World, made: Lab) -> dict[str, Any]:
    return made.train(world)


def test_the_exported_models_logits_are_those_of_the_engine_that_two_ranks_left(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = lab(
        tmp_path, documents=random_documents(12, seed=14), model=shared_model("llama_untied_padded"), objective={"kind": "sft"},
        train={"max_steps": 3, "lr": 1e-2, "engine": "local"},
    )  # fmt: skip
    run_ranks(train, 2, made)
    newest = made.checkpoints().newest()
    assert newest is not None
    assert len(newest[1].files) == 2
    export_run(made.run, made.model, made.run_identity(), made.store)
    path = made.run_folder.child("model").local("config.json")
    assert path is not None
    reloaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, local_files_only=True)
    whole = made.restored().model.whole
    for one in made.corpus.documents("train"):
        tokens = torch.from_numpy(one.tokens.astype("int64"))[None]
        with torch.no_grad():
            theirs, ours = (m.eval()(input_ids=tokens, use_cache=False).logits for m in (reloaded, whole))
        assert torch.equal(theirs, ours)
