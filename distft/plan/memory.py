"""How much memory a rank takes while it trains, by what for: on the device, and of the host. Torch-free.

Memory is fullest at one of four moments: in the loss, where all activations stand and the head's gradient is made; on the way back,
where blocks are gone through again; at the end of it, where all gradients are there; and in the update. What stands throughout is
added to the fullest of these. `tests/bench/memory_plan.py` measures it; where a block differs from Llama's, it is a guess.

Widths are those of `Shape`; all figures are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from distft.plan.load import Load
from distft.plan.shape import Shape

HEAD_BUFFER_BYTES = 1 << 29
"""All [chunk, vocabulary] buffers: `objectives.loss.BUFFER_BYTES`, repeated here so that a plan needs no torch; a test compares."""
CHUNK_TOKENS = (16, 1024)
"""Bounds of a chunk: `objectives.loss.LEAST_TOKENS` and `MOST_TOKENS`, likewise."""
BUCKET, PREFETCH, LIVE = 50_000_000, 50_000_000, 1_000_000_000
"""Elements: `engine.zero3_settings`, likewise."""
UPDATED_AT_ONCE = 1_000_000_000
"""Most elements that DeepSpeed updates at a time, and whose gradients it copies end to end for that: its `sub_group_size`."""
PROCESS_BYTES = 550_000_000
"""Python, torch, transformers, DeepSpeed and pyarrow, loaded: 490 to 550 MB on a CPU. CUDA's own part is not measured here."""

Moment = Literal["loss", "backward pass", "end of backward pass", "update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one rank, by name, at the fullest moment. The process itself is not in it."""

    device: dict[str, int]
    host: dict[str, int]
    """Beside a GPU; where there is none it is the same memory."""
    moment: Moment
    of: str
    """Which rank: by which engine, and how many there are."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    def facts(self) -> dict[str, Any]:
        return {"device": self.device, "host": self.host, "fullest": self.moment, "of": self.of, "process": PROCESS_BYTES}


def memory(shape: Shape, load: Load) -> Memory:
    """Of a rank that has taken a step and is in the next."""
    device, host = _standing(shape, load)
    moments = _moments(shape, load)
    fullest = max(moments, key=lambda moment: sum(moments[moment].values()))
    device |= {name: amount for name, amount in moments[fullest].items() if amount}
    of = f"{'zero3' if load.zero3 else 'local'} on {load.ranks} rank{'s' * (load.ranks != 1)}"
    return Memory(device=device, host=host, moment=fullest, of=of)


def _standing(shape: Shape, load: Load) -> tuple[dict[str, int], dict[str, int]]:
    """What is there all the time, on the device and of the host. The optimizer's are float32 whatever the passes run in."""
    mine = -(-shape.parameters // load.ranks) if load.zero3 else shape.parameters
    device, host = {}, {}
    of_optimizer, of_weights = (host if load.offload_optimizer else device), (host if load.offload_parameters else device)
    of_weights["weights"] = load.item * mine
    if load.half or load.zero3:  # DeepSpeed keeps them apart from the weights in float32, too
        of_optimizer["float32 weights"] = 4 * mine
    of_optimizer["moments"] = 8 * mine
    if load.zero3:
        # where they are offloaded, once as they are added up and once as the optimizer reads them
        of_optimizer["gradient sums"] = (8 if load.offload_optimizer else 4) * mine
        device["reduction buffer"] = 4 * _bucket(shape)
    elif load.several:
        device["gradient sums"] = 4 * mine
    if load.teacher_head:
        device["teacher's output head"] = load.teacher_head
    host["copy for a checkpoint"] = 12 * mine
    return device, host


def _moments(shape: Shape, load: Load) -> dict[Moment, dict[str, int]]:
    """What comes on top, moment by moment."""
    made, head = load.tokens * _activations(shape, load), load.item * shape.head
    block = load.tokens * _block(shape, load)
    # of the head's gradient the float32 sum with a chunk's buffers, and then what it is rounded to
    loss = 4 * shape.head + max(_buffers(shape, load), 2 * shape.head if load.half else 0)
    # Beside what a block has saved, the gradients of the MLP's three inner tensors while two of those are still there.
    way_back = 2 * load.item * load.tokens * (shape.inner + shape.width) + load.item * shape.width * shape.inner
    gathered = _gathered(shape, load)
    gradients = 0
    if not load.zero3:
        gradients = (load.item * shape.parameters if load.half else 0) + (0 if load.several else 4 * shape.parameters)
    return {
        "loss": {"activations": made, "loss": loss, "gathered weights": gathered},
        "backward pass": {
            "activations": made + (block if load.gradient_checkpointing else 0), "the block gone through": way_back,
            "gradient of the head": head, "gathered weights": gathered, "gradients being reduced": _reduced(shape, load),
        },
        "end of backward pass": {
            "gradients of head and embedding": (2 if shape.tied else 1) * head, "gradients of the passes": gradients,
            "gathered weights": gathered, "gradients being reduced": _reduced(shape, load),
        },
        "update": {"gradients end to end": _updated(shape, load)},
    }  # fmt: skip


def _activations(shape: Shape, load: Load) -> int:
    """Bytes a token from the first layer to the head."""
    saved = load.item * shape.width if load.gradient_checkpointing else _block(shape, load)
    # the last norm; then the states that predict a token, and their gradient
    return shape.layers * saved + _norm(shape.width, load) + 3 * load.item * shape.width


def _block(shape: Shape, load: Load) -> int:
    """Bytes a token that a block saves for the way back: as `transformers` writes a Llama block, counted with torch's hooks on saved
    tensors."""
    attention = 2 * shape.queries + 2 * shape.keys  # queries, output; keys, values
    shared = load.shared_rows and load.attention == "sdpa"
    if shared or load.attention == "eager":  # with a mask keys and values are repeated for each head
        attention = 4 * shape.queries
    saved = 2 * _norm(shape.width, load) + load.item * (attention + 4 * shape.inner)  # gate, its activation, up, their product
    if shared:
        saved += load.item * load.row * load.sharing  # the mask of whole rows, as numbers, for each layer
    if load.attention == "eager":  # the softmax in float32, and what it is rounded to
        saved += shape.heads * load.row * (6 if load.half else 4)
    if shape.norms_heads:
        saved += _norm(shape.queries + shape.keys, load) - load.item * (shape.queries + shape.keys)
    return saved


def _norm(width: int, load: Load) -> int:
    """Bytes a token of a norm: what comes in (in float32, a copy where passes are not), normalised, and scaled."""
    return width * (8 if load.half else 12)


def _buffers(shape: Shape, load: Load) -> int:
    """Bytes of one chunk's [chunk, vocabulary] buffers: `objectives.loss.loss_chunk` and `buffers`."""
    if not shape.vocabulary:
        return 0
    count = 1 + bool(load.teacher_head) + 0.5 * load.half
    least, most = CHUNK_TOKENS
    chunk = max(least, min(most, int(HEAD_BUFFER_BYTES / (4 * (count + 6 / 16) * shape.vocabulary)), load.tokens))
    return round(4 * count * min(chunk, load.tokens) * shape.vocabulary)


def _bucket(shape: Shape) -> int:
    return min(shape.parameters // 8, BUCKET)


def _gathered(shape: Shape, load: Load) -> int:
    """What ZeRO-3 holds whole: the head, as long as a pass lasts, and what it keeps or fetches ahead. A rank alone has all of it, and
    copies nothing unless it is of the host."""
    if not load.zero3 or (load.ranks == 1 and not load.offload_parameters):
        return 0
    ahead = min(shape.parameters // 4, LIVE) + min(shape.parameters // 8, PREFETCH)
    return load.item * min(shape.parameters, ahead + shape.head)


def _reduced(shape: Shape, load: Load) -> int:
    """What DeepSpeed lays end to end of a bucket before it is shared out among ranks."""
    return 4 * max(_bucket(shape), shape.head) if load.zero3 else 0


def _updated(shape: Shape, load: Load) -> int:
    if not load.zero3 or load.offload_optimizer:
        return 0
    return 4 * min(-(-shape.parameters // load.ranks), UPDATED_AT_ONCE)
