"""The run file, section by section (see README, "The run file").

Torch-free on purpose: a bad file must be answered in a second. A key exists here only when the code behind it does; where one value
alone works so far, the schema admits that value and no other.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from distft.config.section import Section
from distft.objectives.catalog import Objective, Sft

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Dtype = Literal["float32", "bfloat16"]
Auto = Literal["auto"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{12,32}$")]


def _ranks(given: object) -> int | Auto | tuple[int, int]:
    """By hand, for one sentence instead of one about each of the ways to say it. A range of one number is that number."""
    if given == "auto":
        return "auto"
    few, most = given if isinstance(given, list | tuple) and len(given) == 2 else (given, given)
    if type(few) is not int or type(most) is not int or not 1 <= few <= most:
        shown = f"{list(given)}: " if isinstance(given, list | tuple) else ""
        wanted = "should be a number from 1, auto, or [min, max] with 1 <= min <= max"
        raise PydanticCustomError("ranks", "{told}", {"told": shown + wanted})
    return few if few == most else (few, most)


class Model(Section):
    """A model that is read from a folder of safetensors, or from the hub by name."""

    path: str
    """A local folder, or the name of a hub repository."""
    revision: str | None = None
    """A commit of the hub repository; null is its main branch. Only with a hub name."""
    dtype: Dtype = "bfloat16"
    """What the forward and backward passes run in; the optimizer's weights are float32 always."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Which attention of transformers is used; all give the same results to rounding."""


class Teacher(Section):
    """The frozen model whose distribution is cached; `path: null` is the model itself before training."""

    path: str | None = None
    revision: str | None = None
    dtype: Dtype | None = None
    """null: as `model.dtype`."""


class Source(Section):
    """Where documents come from and how a row becomes one."""

    path: str
    """A .jsonl, .json, .parquet or .arrow file, a folder or glob of them, or the name of a `datasets` data set."""
    format: Literal["chat", "prompt_completion", "text"] = "chat"
    """chat: a list of {role, content}; prompt_completion: two strings or two lists of messages; text: one string."""
    subset: str | None = None
    """The data set's configuration; only with a `datasets` name."""
    split: str | None = None
    """The data set's split, `train` when null; only with a `datasets` name."""
    revision: str | None = None
    """The data set's commit; only with a `datasets` name."""
    messages: str = "messages"
    """The column of a chat."""
    prompt: str = "prompt"
    completion: str = "completion"
    """The two columns of prompt_completion."""
    text: str = "text"
    """The column of text."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Take only the first so many rows; null takes all."""


class TrainSource(Source):
    """Documents to learn from."""

    anchors: str | None = None
    """A .jsonl file that marks the words to be learned, for objectives that hold the rest (README, "Anchors")."""


class Data(Section):
    """The documents that are trained on, and those that are only measured."""

    train: TrainSource
    heldout: Source | None = None
    """Never trained on: drift is measured here. null: no drift meter."""
    max_tokens: Annotated[int, Field(ge=2)] = 4096
    """Longer documents are cut; one that is left with no supervised token is dropped, counted and named."""
    exclude: tuple[Digest, ...] = Field(default=(), strict=False)
    """Documents that are left out, by the digest that messages and `score --json` name, or its first 12 digits and more. The corpus
    itself stays as it is. In quotes where there are only decimal digits."""
    workers: Annotated[int, Field(gt=0)] | Auto = "auto"
    """Processes that tokenise; auto: one per core."""


class TopK(Section):
    """The likeliest ids and log-probabilities, at most `k`, none below `min_prob`, and the mass of the rest."""

    kind: Literal["topk"] = "topk"
    k: Annotated[int, Field(ge=1, le=65_535)] = 128
    min_prob: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    """0: always exactly k, the classical fixed top-k."""


class Sample(Section):
    """Ids drawn from the teacher and how often: an unbiased estimate of KL(q||p), for a teacher that is another, larger model. One
    draw falls into each of `draws` equal parts of the probability, which keeps the noise low."""

    kind: Literal["sample"]
    draws: Annotated[int, Field(ge=1, le=4096)] = 50
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Hidden(Section):
    """The teacher's last hidden state of each token, in its own dtype, beside one copy of its output head: both KLs are then exact, at
    two bytes (bfloat16) for each unit of the teacher's width."""

    kind: Literal["hidden"]


class NoDistribution(Section):
    """Signals only (log q of the label, entropy, rank): enough for `stm`, a few bytes a token."""

    kind: Literal["none"]


Distribution = Annotated[TopK | Sample | Hidden | NoDistribution, Field(discriminator="kind")]


class Score(Section):
    """The teacher's one pass over the documents."""

    distribution: Distribution = TopK()
    positions: Literal["supervised", "all"] = "supervised"
    """Which tokens are kept; `all` adds the prompt's."""
    tokens_per_batch: Annotated[int, Field(gt=0)] = 16_384
    """Tokens in one forward pass of the teacher; changes speed and memory, never the cache."""
    workers: Annotated[int, Field(gt=0)] | Auto = "auto"
    """Scorers, each with the whole teacher and a GPU or, without any, a core of its own; more than one are Ray actors. auto: one per
    GPU, or one in this process. Changes speed, never the cache."""
    reuse_only: bool = False
    """Refuse to score anything: for runs that must not cost a teacher pass by surprise."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """A trial: score only the first so many training documents, and say what all would take. They are not scored again later."""
    retry_quarantined: bool = False
    """Read documents again that the teacher could not read before, as on a device with more memory."""
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Over how many GPUs of one machine each scorer's teacher is spread, when it does not fit on one (or over how many processes,
    without GPUs). Its attention heads are shared, so the number must divide theirs. Changes no score beyond rounding."""


class Checkpoint(Section):
    """When a training run can be taken up again."""

    every_steps: Annotated[int, Field(gt=0)] | None = 100
    """null: only at the end."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest stay."""
    keep_every: Annotated[int, Field(gt=0)] | None = None
    """Of older ones, those of every so many steps stay, too; null: none does."""


class Zero3(Section):
    """What the engine `zero3` moves to the CPU's memory, at the price of speed, when the GPUs' does not suffice. Changes no number
    beyond rounding; nothing is gained where there is no GPU."""

    offload_optimizer: bool = False
    """The float32 weights, their gradients and both moments, and the optimizer's work with them."""
    offload_parameters: bool = False
    """The weights of the passes, each gathered when it is needed."""


# A path; a file's address, in whose path an @ is a character like others; or any other address.
_ADDRESS = re.compile(r"[^:?#]+|(file|sqlite(\+\w+)?):(///|/(?!/))[^?#]*|[A-Za-z0-9+.-]+:[^@?#]*")


def _address(given: object) -> str:
    """By hand: what is refused may hold a password, and this error alone does not repeat what it is about."""
    if not isinstance(given, str) or not _ADDRESS.fullmatch(given):
        raise PydanticCustomError("secret", "should be an address without a user, a password, a query (?) or a fragment (#)")
    return given


class Wandb(Section):
    """Where Weights & Biases shows the run. The key comes from the environment (WANDB_API_KEY), and so does all else that its package
    reads there."""

    project: Annotated[str, Field(min_length=1)]
    name: str | None = None
    """null: the run's own."""
    entity: str | None = None
    """null: the account's default."""


class Mlflow(Section):
    """Where MLflow shows the run. Credentials come from the environment (MLFLOW_TRACKING_USERNAME and so on)."""

    experiment: Annotated[str, Field(min_length=1)]
    tracking_uri: Annotated[str, BeforeValidator(_address)]
    """A server, a database or a folder, as its package writes it: https://host, sqlite:///path. Without a password or a query, which
    would be kept in the store."""


class Log(Section):
    """Who gets to see a step's line of `metrics.jsonl`, besides that file. Changes no number."""

    tensorboard: bool = True
    """Event files in the run's folder, below `tensorboard/`."""
    wandb: Wandb | None = None
    """Needs the package `wandb`."""
    mlflow: Mlflow | None = None
    """Needs the package `mlflow-skinny`, or `mlflow`."""


class Train(Section):
    """The optimisation. What a step consumes follows from (seed, epoch) alone, never from the hardware."""

    epochs: Annotated[int, Field(ge=1)] = 1
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many steps; null: when the epochs are over. The schedule ends where the run ends."""
    tokens_per_step: Annotated[int, Field(ge=2)] = 65_536
    """Documents are added to a step while their tokens fit; a document longer than this has a step of its own."""
    micro_batch_tokens: Annotated[int, Field(ge=2)] = 8_192
    """Tokens in one forward and backward pass, of which each rank has its part where `sequence_parallel` ranks share it; changes speed
    and memory, not the step."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    min_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What cosine and linear leave of `lr` at the end."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On matrices only; norms and biases never decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), strict=False
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradient norm limit; null: none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    drift_every_steps: Annotated[int, Field(gt=0)] | None = None
    """Measure drift on the held-out documents so often; null: only after the last step."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in the backward pass."""
    engine: Literal["local", "zero3"] | Auto = "auto"
    """local: plain torch, every rank holds the whole model. zero3: DeepSpeed, each rank holds its share of weights, gradients and
    optimizer. auto: zero3 where there are several ranks or a GPU. Changes no number beyond rounding."""
    zero3: Zero3 = Zero3()
    workers: Annotated[int | Auto | tuple[int, int], BeforeValidator(_ranks)] = "auto"
    """Ranks, each with a GPU or, without any, a core of its own; more than one are started by Ray. auto: one per GPU of this machine
    or of the cluster at `cluster.address`, or one in this process. [min, max]: as many as there is room for, and fewer or more when
    machines go or come. Under torchrun, which starts them itself: auto, or as many, or a range that they are in."""
    sequence_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    """So many ranks share every row of tokens, each with its run of columns, and exchange heads for columns around attention: for
    documents whose activations do not fit on one. Must divide the number of ranks and the model's attention heads. Changes no number
    beyond rounding."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often ranks that Ray started are started again when one of them dies; training goes on from the last checkpoint."""
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def least_ranks(self) -> int:
        """With how few ranks it may train, each of which then holds the most; 1 where `workers` is auto."""
        return 1 if self.workers == "auto" else self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_ranks(self) -> int | None:
        """With how many; None where `workers` is auto, which names no number."""
        return None if self.workers == "auto" else self.workers[1] if isinstance(self.workers, tuple) else self.workers


class ExactJudge(Section):
    """Right when the answer, trimmed of space and of `strip` characters, equals the reference."""

    kind: Literal["exact"] = "exact"
    ignore_case: bool = False
    strip: str = ""


class NumberJudge(Section):
    """Right when the answer's last number equals the reference's last number."""

    kind: Literal["number"]
    tolerance: Annotated[float, Field(ge=0)] = 1e-9
    """Relative above 1, absolute below."""


Judge = Annotated[ExactJudge | NumberJudge, Field(discriminator="kind")]


class GenerateTask(Section):
    """Greedy answers to prompts, judged against references."""

    kind: Literal["generate"] = "generate"
    name: Name
    path: str
    """JSONL with `prompt` (a string or a list of messages) and `answer`."""
    judge: Judge = ExactJudge()
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    limit: Annotated[int, Field(gt=0)] | None = None


class NllTask(Section):
    """Mean negative log-likelihood of the supervised tokens of some documents."""

    kind: Literal["nll"]
    name: Name
    source: Source


Task = Annotated[GenerateTask | NllTask, Field(discriminator="kind")]


class Evaluate(Section):
    """What is measured on the model before and after."""

    tasks: tuple[Task, ...] = Field(default=(), strict=False)
    tokens_per_batch: Annotated[int, Field(gt=0)] = 8_192


class Export(Section):
    """How the trained weights are written."""

    dtype: Dtype | None = None
    """null: as `model.dtype`."""
    shard_bytes: Annotated[int, Field(ge=1 << 20)] = 4 << 30


class Cluster(Section):
    """Where scoring and training run; all else runs in this process."""

    address: Annotated[str, Field(pattern=r"^(local|auto|[A-Za-z0-9._-]+:[0-9]{1,5})$")] = "local"
    """local: this machine. auto: the Ray cluster that this machine belongs to; host:port: one elsewhere. Its machines need distft, the
    store and the model under the same paths; its token comes from the environment (RAY_AUTH_TOKEN)."""


class Run(Section):
    """A whole run file."""

    name: Name
    """Names the run's folder in the store."""
    store: str = "./store"
    """A folder, or s3://bucket/prefix; credentials come from the environment alone."""
    model: Model
    data: Data
    teacher: Teacher = Teacher()
    score: Score = Score()
    objective: Annotated[Objective, Field(discriminator="kind")] = Sft()
    train: Train = Train()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()

    @property
    def teacher_model(self) -> Model:
        """The teacher as a model: itself where `teacher.path` is null."""
        own = self.teacher.path is None
        return Model(
            path=self.model.path if self.teacher.path is None else self.teacher.path,
            revision=self.model.revision if own else self.teacher.revision,
            dtype=self.teacher.dtype or self.model.dtype,
            attention=self.model.attention,
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher cache is read: by the objective, or by the drift meter."""
        return self.objective.needs_signals or self.objective.needs_distribution or self.data.heldout is not None
