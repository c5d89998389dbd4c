"""What of a run decides about a rank's memory, besides the model."""

from __future__ import annotations

from dataclasses import dataclass

from distft.config.schema import Run
from distft.plan.measured import Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What of a run decides about memory."""

    half: bool
    """Whether passes run in bfloat16."""
    zero3: bool
    ranks: int = 1
    tokens: int
    """Places of the fullest micro-batch; of rows that ranks share, this rank's."""
    row: int
    """Width of its rows: its longest document."""
    shared_rows: bool = False
    """Whether several documents lie in a row, which then needs a mask."""
    sharing: int = 1
    """How many ranks share each row, and with it these places."""
    several: bool = True
    """Whether a step has several micro-batches on a rank, so that gradients stand while the next one is computed."""
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    teacher_head: int = 0
    """The copy of a teacher's output head, which training reads where the cache keeps hidden states."""

    @property
    def item(self) -> int:
        """Bytes of a number in the passes."""
        return 2 if self.half else 4


def load_of(run: Run, *, lengths: Lengths | None, teacher_head: int = 0) -> Load:
    """What of the run decides about memory. A micro-batch is as full as a step can make it, whatever the run file allows; until there
    is a corpus, documents are taken to be as long as they may be, and to share rows."""
    train = run.train
    ranks = train.least_ranks
    offloads = train.zero3.offload_optimizer or train.zero3.offload_parameters
    places = min(train.micro_batch_tokens, train.tokens_per_step)
    if lengths is None:
        row = min(run.data.max_tokens, places)
    else:
        places = max(lengths.longest, min(places, lengths.tokens))
        row = lengths.longest
    return Load(
        half=run.model.dtype == "bfloat16",
        zero3=train.engine == "zero3" or (train.engine == "auto" and (ranks > 1 or offloads)),
        ranks=ranks,
        tokens=-(-places // train.sequence_parallel),
        row=row,
        shared_rows=lengths is None or lengths.share_rows,
        sharing=train.sequence_parallel,
        several=train.tokens_per_step * train.sequence_parallel > ranks * train.micro_batch_tokens,
        gradient_checkpointing=train.gradient_checkpointing,
        attention=run.model.attention,
        offload_optimizer=train.zero3.offload_optimizer,
        offload_parameters=train.zero3.offload_parameters,
        teacher_head=teacher_head if run.needs_teacher else 0,
    )
