"""Training on several ranks that Ray starts: one call that returns what the leading rank returned, or raises what ended the run.

The driver does no training. It replays what the leading rank says, passes its own signals on, and tells why a group failed: of all
that its ranks report, the first that is no echo of another's end. What a new start cannot cure ends the run at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from distft import progress, stopping
from distft.cluster.desk import Advanced, Closed, Desk, Ended, Failed, Finished, Group, Idle, Opened, Rank, Resized, Said, Stopped
from distft.cluster.pool import QUIET_SECONDS, short
from distft.cluster.session import ray_session
from distft.errors import DistftError, LostRankError
from distft.progress import say
from distft.stopping import Interrupted

HEAR_SECONDS = 0.5
CALLS_OF_EACH = 16
"""How many calls of a rank the desk takes at a time: two that wait as long as it lives, and what it has to tell."""
LOOK_SECONDS = 30.0
"""Between two looks at whether there is room for more ranks."""
CARRIED = (
    "AWS_", "DISTFT_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "PYTORCH_", "NCCL_", "GLOO_", "DS_",
    "DEEPSPEED_", "WANDB_", "MLFLOW_", "SSL_CERT_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
"""What of the environment changes what ranks do. A cluster's own processes have an environment of their own."""


def train_on_ranks(
    work: Callable[[], dict[str, Any]], *, address: str, ranks: int | tuple[int, int] | None, gpus: int, restarts: int
) -> dict[str, Any]:
    """Calls `work`, which is picklable, on so many ranks of an embedded Ray with `gpus` GPUs (`local`) or of the cluster at an
    address, and returns what it returns on the leading one. `ranks` None is one per GPU of that cluster, or this process where it
    has none; two numbers are how few and how many, and there are as many as there is room for.

    Each finds its place in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and opens the process group itself. When one
    dies or fails, all are started again, `restarts` times: `work` must go on from what it has committed. So they are when there is
    room for more, once `work` has raised Interrupted because `stopping.requested()`; that is no failure."""
    with ray_session(address, cpus=ranks[1] if isinstance(ranks, tuple) else ranks or 1, gpus=gpus) as ray:
        found = int(ray.cluster_resources().get("GPU", 0))
        if not found and address != "local":
            say("the cluster has no GPU: " + ("its CPUs train" if ranks else "this process trains, alone"))
        if ranks or found:
            return _Run(ray, ranks or found, gpus=found, restarts=restarts).to_the_end(work)
    return work()


class _Run:
    def __init__(self, ray: Any, ranks: int | tuple[int, int], *, gpus: int, restarts: int) -> None:
        self.ray, self.gpus, self.restarts = ray, gpus, restarts
        self.least, self.most = (ranks, ranks) if isinstance(ranks, int) else ranks
        self.ranks: dict[int, Rank] = {}
        self.runs = False
        """Whether ranks have started that are not known to have ended."""
        self.causes: list[Failed] = []
        """What ranks of this start have raised."""
        self.deaths: dict[int, str] = {}
        self.starts_over = 0
        self.meters: dict[int, tuple[AbstractContextManager[Any], progress.Meter]] = {}
        self.result: dict[str, Any] | None = None
        self.stopped: str | None = None

    def to_the_end(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        # As a session's folder is named, so that the next one takes it away when this process is killed.
        scratch = tempfile.mkdtemp(prefix=f"distft-ray-{os.getpid()}-", dir="/tmp")
        here = self.ray.get_runtime_context().get_node_id()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        beside = NodeAffinitySchedulingStrategy(here, soft=False)
        calls = CALLS_OF_EACH * (2 * self.most + 1)  # of this process too, and of ranks whose places are being taken
        made = self.ray.remote(num_cpus=0, max_restarts=0, max_concurrency=calls)(Desk)
        desk = made.options(scheduling_strategy=beside).remote()
        group = Group(
            work=work, least=self.least, most=self.most, looks=LOOK_SECONDS, gpu=self.gpus > 0, threads=self._threads(),
            restarts=self.restarts, folder=os.getcwd(),
            environment={key: value for key, value in os.environ.items() if key.startswith(CARRIED)}, scratch=scratch,
            loopback=self.ray.util.get_node_ip_address() == "127.0.0.1",
        )  # fmt: skip
        try:
            with stopping.gracefully():
                return self._follow(desk, desk.run.remote(group, desk))
        except self.ray.exceptions.RayTaskError:
            raise  # a bug, with the traceback of the other side
        except self.ray.exceptions.RayError as error:
            raise DistftError(
                f"Ray ended while its ranks trained: {_how(str(error))}", where="this machine's part of Ray",
                help="See that its memory and /tmp suffice. The same command goes on from the last checkpoint.",
            ) from error  # fmt: skip
        finally:
            self._hush()
            self.ray.kill(desk)  # and with it, by Ray's rules of ownership, whatever of the group is left
            shutil.rmtree(scratch, ignore_errors=True)

    def _threads(self) -> int:
        """Of each rank: a core where cores do the work; where GPUs do, their share of the machine's cores."""
        if not self.gpus:
            return 1
        given = os.environ.get("OMP_NUM_THREADS", "")
        if given.isdecimal():
            return int(given)
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
        if len(self.ray.nodes()) == 1:  # maybe one of our own, which is told of as many cores as it needs
            return max(1, (os.cpu_count() or 1) // self.gpus)
        return max(1, int(min((one.get("CPU", 1) // one["GPU"] for one in machines), default=1)))

    def _follow(self, desk: Any, running: Any) -> dict[str, Any]:
        asked, quiet = False, 0.0
        while True:
            done, _ = self.ray.wait([running], timeout=0)
            heard = self.ray.get(desk.hear.remote(0.0 if done else HEAR_SECONDS))
            for event in heard:
                self._take(event)
            if done:
                return self._end(self.ray.get(running))
            if stopping.requested():
                if not asked:
                    asked = True
                    self.ray.get(desk.stop.remote())
                if not self.runs:
                    raise self._stopped_between()
            quiet = 0.0 if self.runs else quiet + (0.0 if heard else HEAR_SECONDS)
            if not self.runs and quiet >= QUIET_SECONDS:
                quiet = float("-inf")
                self._say_what_is_awaited()

    def _take(self, event: Any) -> None:
        match event:
            case Said(text):
                say(text)
            case Opened(number, label, total, unit, done):
                shown = progress.track(label, total, unit, done=done)
                self.meters[number] = shown, shown.__enter__()
            case Advanced(number, amount, note, figures) if number in self.meters:
                self.meters[number][1].advance(amount, note, figures)
            case Closed(number) if number in self.meters:
                self.meters.pop(number)[0].__exit__(None, None, None)
            case Rank():
                if event.rank in self.ranks and self.ranks[event.rank] != event and event.rank == 0:
                    self._hush()
                self.ranks[event.rank] = event
                self.runs = True
            case Failed():
                self.causes.append(event)
            case Ended(deaths):
                self._lose(deaths)
            case Resized():
                self._hush()
                self.causes, self.runs = [], False
            case Idle() if stopping.requested():  # else for another number of ranks: it stops at its first step
                raise self._stopped_between()
            case Stopped(text):
                self.stopped = text
            case Finished(result):
                self.result = result

    def _lose(self, deaths: dict[int, str]) -> None:
        """A group has failed. Says why, and what follows, while what follows is another start."""
        self._hush()
        if self._final() is not None:
            return
        self.deaths = deaths
        self.starts_over += 1
        if self.starts_over <= self.restarts:
            say(f"{self._why()}. All ranks start again and go on from the last checkpoint (restart {self.starts_over} of "
                f"{self.restarts}).")  # fmt: skip
            self.causes, self.deaths, self.runs = [], {}, False

    def _stopped_between(self) -> Interrupted:
        """While no rank trains, there is nothing to keep."""
        return Interrupted("Stopped while the ranks were to start again." if self.ranks else "Stopped before training began.")

    def _end(self, given_up: str) -> dict[str, Any]:
        final = self._final()
        if final is not None:
            raise final
        if self.stopped is not None:
            raise Interrupted(self.stopped)
        if not given_up and self.result is not None:
            return self.result
        first = self._first()
        if first is not None and not self.deaths:
            if isinstance(first.error, str):
                raise RuntimeError(f"{first.rank}: {first.error}") from _Remote(first.trace)
            if not isinstance(first.error, LostRankError):
                raise first.error
        often = {0: "", 1: " again after a new start"}.get(self.restarts, f" again after {self.restarts} new starts")
        why = self._why() if self.causes or self.deaths else f"Ray gave the ranks up: {short(given_up)}"
        raise DistftError(
            f"Training failed{often}. {why}.", where=f"train.restarts={self.restarts}",
            help="Most often memory runs out: lower train.micro_batch_tokens, or take fewer ranks per machine (train.workers). The "
            "same command goes on from the last checkpoint.",
        )  # fmt: skip

    def _final(self) -> DistftError | None:
        return next((told.error for told in self.causes if told.final and isinstance(told.error, DistftError)), None)

    def _first(self) -> Failed | None:
        """The first failure that is not about another rank's."""
        told = sorted(self.causes, key=lambda failed: isinstance(failed.error, LostRankError))
        return told[0] if told else None

    def _why(self) -> str:
        """The first cause: a death before what a rank raised, since ranks that live raise when one dies."""
        if self.deaths:
            rank = min(self.deaths)
            others = f", and {len(self.deaths) - 1} more" if len(self.deaths) > 1 else ""
            return f"{self.ranks.get(rank, f'rank {rank}')} died{others}: {_how(self.deaths[rank])}".rstrip(".")
        first = self._first()
        if first is None:
            return "A rank failed and did not say why"
        told = first.error.problem if isinstance(first.error, DistftError) else first.error
        return f"{first.rank} failed: {told}".rstrip(".")

    def _hush(self) -> None:
        """Takes down what a group that is gone was showing."""
        for shown, _ in reversed(self.meters.values()):
            with suppress(_Gone):
                shown.__exit__(_Gone, _Gone(), None)
        self.meters.clear()

    def _say_what_is_awaited(self) -> None:
        free = {key: value for key, value in self.ray.available_resources().items() if key in ("CPU", "GPU")}
        each = "a CPU" + (" and a GPU" if self.gpus else "")
        wanted = f"{self.most}" if self.least == self.most else f"{self.least} to {self.most}"
        say(f"waiting for the cluster to start {wanted} ranks with {each} each; free are {free.get('CPU', 0):g} CPUs and "
            f"{free.get('GPU', 0):g} GPUs")  # fmt: skip


def _how(cause: str) -> str:
    """How a process ended, of what Ray says of it."""
    told = short(cause)
    _, found, detail = told.partition("Worker exit detail: ")
    return f"its process was killed, or crashed ({detail.strip().rstrip('.')})" if found else told


class _Gone(Exception):  # noqa: N818  (ends a meter that is not finished)
    pass


class _Remote(Exception):  # noqa: N818  (a traceback of another process, to be printed as a cause)
    def __init__(self, trace: str) -> None:
        super().__init__(f'\n"""\n{trace}"""')
