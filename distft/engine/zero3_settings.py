"""What DeepSpeed is told, and what it must then say that it does. Torch and numbers alone: nothing here loads DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distft.config.schema import Train
from distft.errors import TrainingError

BUCKET = 50_000_000
"""Most elements of gradients that are reduced at a time; a buffer of as many float32 is kept."""
PREFETCH = 50_000_000
"""Most elements of parameters that are gathered ahead of their use."""
LIVE = 1_000_000_000
"""Most elements of parameters that stay gathered since they are needed again soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a model that need not be in memory."""

    numel: int
    widest_vector: int
    """Elements of its largest norm or bias."""

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        parameters = list(model.parameters())
        vectors = [p.numel() for p in parameters if p.dim() < 2]
        return cls(numel=sum(p.numel() for p in parameters), widest_vector=max(vectors, default=0))


def settings(train: Train, *, dtype: str, sizes: Sizes, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    What decides about numbers is not left to it: it is to clip nothing and to scale nothing, since `Stepper` does, and to reduce and
    add up gradients in float32 whatever the passes run in."""
    elsewhere = {"device": "cpu", "pin_memory": cuda}
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": cuda,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # DeepSpeed's own figures are for large models: of a small one each rank would come to hold all
        "reduce_bucket_size": min(sizes.numel // 8, BUCKET),
        "stage3_prefetch_bucket_size": min(sizes.numel // 8, PREFETCH),
        "stage3_max_live_parameters": min(sizes.numel // 4, LIVE),
        "stage3_max_reuse_distance": min(sizes.numel // 4, LIVE),
        # norms and biases stay on every rank once they are there: fetching each would cost more than it frees
        "stage3_param_persistence_threshold": sizes.widest_vector,
        **({"offload_optimizer": elsewhere} if train.zero3.offload_optimizer else {}),
        **({"offload_param": elsewhere} if train.zero3.offload_parameters else {}),
    }
    return {
        # A step has as many micro-batches as its documents fill; where it ends is said each time.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        **({"bf16": {"enabled": True}} if dtype == "bfloat16" else {}),
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW, offloaded or not: DeepSpeed's would be compiled first
        "steps_per_print": 2**31,
    }


def effective(engine: Any) -> dict[str, Any]:
    """What a DeepSpeed engine says that it does with numbers, read from where it looks itself."""
    optimizer, zero = engine.optimizer, engine.zero_optimization_stage()
    passes, sums = engine.get_data_types()
    groups = [(group["betas"], group["eps"], group["weight_decay"]) for group in optimizer.param_groups]
    return {
        "stage": int(zero),
        "ranks": engine.dp_world_size,
        "dtype of passes": passes,
        "dtype of weights": {flat.dtype for flat in optimizer.fp32_partitioned_groups_flat},
        "dtype of gradient sums": {sums, optimizer.gradient_accumulation_dtype},
        "dtype of reduction": optimizer.communication_data_type,
        "accumulation steps": engine.gradient_accumulation_steps(),
        "clipping": {engine.gradient_clipping(), float(optimizer.clip_grad)},
        "loss scale": float(optimizer.loss_scale),
        "predivide factor": engine.gradient_predivide_factor(),
        "gradients are averaged": engine.gradient_average,
        "quantised weights": engine.zero_quantized_weights() or engine.zero_quantized_gradients(),
        "secondary partition": engine.zero_hpz_partition_size(),
        "optimizer on the CPU": bool(optimizer.offload_optimizer),
        "parameters on the CPU": bool(optimizer.offload_param),
        "optimizer": type(optimizer.optimizer),
        "betas, eps, weight decay": groups,
    }


def wanted(train: Train, *, dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    """What `effective` must come to."""
    return {
        "stage": 3,
        "ranks": ranks,
        "dtype of passes": dtype,
        "dtype of weights": {torch.float32},
        "dtype of gradient sums": {torch.float32},
        "dtype of reduction": torch.float32,
        "accumulation steps": 1,
        "clipping": {0.0},
        "loss scale": 1.0,
        "predivide factor": 1.0,
        "gradients are averaged": True,
        "quantised weights": False,
        "secondary partition": 1,
        "optimizer on the CPU": train.zero3.offload_optimizer,
        "parameters on the CPU": train.zero3.offload_parameters,
        "optimizer": torch.optim.AdamW,
        "betas, eps, weight decay": [(train.betas, train.eps, train.weight_decay), (train.betas, train.eps, 0.0)],
    }


def compare(found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuses a DeepSpeed that does not do what it was told."""
    wrong = [f"{name} is {found[name]}, and {value} was asked for" for name, value in asked.items() if found[name] != value]
    if wrong:
        raise TrainingError(
            f"DeepSpeed does not do what it was told: {'; '.join(wrong)}.", where="train.engine=zero3",
            help="Install the DeepSpeed that this version was tested with, or set train.engine=local.",
        )  # fmt: skip
