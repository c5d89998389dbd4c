"""DeepSpeed's ZeRO as anyone would use it: a model of transformers, cross-entropy, and nothing of ours but the documents."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distft.config.schema import Train
from distft.corpus.reader import Corpus
from distft.engine.world import World
from distft.store.model_folder import ModelFolder
from distft.train.order import StepPlan
from distft.train.schedule import learning_rate


class Plain:
    """An engine that takes the steps of a run with the objective `sft`, document by document."""

    def __init__(
        self, model: ModelFolder, train: Train, corpus: Corpus, world: World, *, universal: bool = False, stage: int = 3
    ) -> None:
        from transformers import AutoModelForCausalLM

        from distft.engine.zero3 import _deepspeed

        warnings.simplefilter("ignore")
        self.train, self.corpus, self.world = train, corpus, world
        self.plan = StepPlan(corpus.lengths("train"), train)
        deepspeed = _deepspeed()
        whole: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
        matrices = [p for p in whole.parameters() if p.dim() >= 2]
        vectors = [p for p in whole.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=train.betas, eps=train.eps)
        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "steps_per_print": 2**31,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, "overlap_comm": False},
            "checkpoint": {"load_universal": universal},
        }  # fmt: skip
        self.engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=config, dist_init_required=False)

    def step(self, step: int) -> float:
        """Takes a step of the run; returns its loss."""
        rows = self.plan.documents(step).tolist()
        documents = [self.corpus.document("train", row) for row in rows]
        normaliser = sum(int(d.supervised.sum()) for d in documents)
        mine = documents[self.world.rank :: self.world.size]
        passes = -(-len(documents) // self.world.size)
        loss = 0.0
        for number in range(passes):
            self.engine.set_gradient_accumulation_boundary(number == passes - 1)
            # As many passes on each rank; one with nothing left counts a document for nothing.
            weight, document = (1.0, mine[number]) if number < len(mine) else (0.0, documents[0])
            tokens = torch.from_numpy(document.tokens.astype("int64"))
            nll = cross_entropy(self.engine(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
            summed = weight * nll[torch.from_numpy(document.supervised[1:])].sum() / normaliser
            self.engine.backward(summed * self.world.size, scale_wrt_gas=False)  # gradients are averaged over ranks
            loss += float(summed.detach())
        for group in self.engine.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, step, self.plan.total_steps)
        self.engine.step()
        [total] = self.world.total(loss)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, gathered: as `Engine.tensors` gives them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for name, parameter in self.engine.module.named_parameters():
            parts = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in ("exp_avg", "exp_avg_sq")}
            for part, tensor in {"weight": safe_get_full_fp32_param(parameter), **parts}.items():
                assert tensor is not None
                found[f"{part}/{name}"] = tensor.clone()
        return found

    def load(self, folder: str) -> dict[str, Any]:
        """Loads the newest checkpoint; returns its client state."""
        path, state = self.engine.load_checkpoint(folder)
        assert path is not None
        return state

    def count_apart(self, step: int) -> None:
        """torch's AdamW wants a tensor of each group's own, where DeepSpeed's own Adam takes the number."""
        for flat in self.engine.optimizer.fp32_partitioned_groups_flat:
            self.engine.optimizer.optimizer.state[flat]["step"] = torch.tensor(float(step))
