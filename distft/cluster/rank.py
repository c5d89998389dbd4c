"""What runs in the processes of a training group: Ray Train's driver beside the desk, and each of its ranks.

Ray Train starts the ranks, watches them, and starts all of them again when one fails. It neither opens the process group (`join_world`
does, as under torchrun: the same backends, the same patience, one error where a rank is lost, and closed when training ends) nor keeps
checkpoints (ours are committed by manifest, and every start goes on from the last).
"""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from distft import progress, stopping
from distft.cluster.desk import Failed, Finished, Group, Idle, Line, Rank, Stopped
from distft.errors import DistftError, LostRankError, TrainingError

if TYPE_CHECKING:
    from distft.cluster.elastic import AsManyAsFit

ECHO_SECONDS = 8.0
"""A rank that lost another waits so long before it fails, too: Ray finds the one that died meanwhile, and blames that one."""
HANDOVER_SECONDS = 60.0
"""How long a rank waits for the process whose place it takes, or for its own end once others have started; Ray has killed the one or
the other by then."""


def fit(group: Group, desk: Any) -> str:
    """Runs the group to its end: "", or why Ray gave it up."""
    resources = {"CPU": 1.0, **({"GPU": 1.0} if group.gpu else {})}
    elastic = group.least < group.most
    trainer = _Trainer(
        run_rank,
        train_loop_config={"group": group, "desk": desk},
        torch_config=OwnGroup(desk=desk),
        scaling_config=ScalingConfig(
            num_workers=(group.least, group.most) if elastic else group.most, use_gpu=group.gpu, resources_per_worker=resources,
            placement_strategy="PACK", elastic_resize_monitor_interval_s=group.looks,
        ),
        run_config=RunConfig(
            name="group", storage_path=group.scratch, failure_config=FailureConfig(max_failures=group.restarts),
            callbacks=[Witness(desk)], worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(group.threads)}},
        ),
    )  # fmt: skip
    if elastic:
        # Here, since it stands on what Ray keeps to itself: ranks, and groups whose size is fixed, do without.
        from distft.cluster.elastic import AsManyAsFit

        trainer.policy = AsManyAsFit(trainer.scaling_config, desk, resources)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        return str(error)
    return ""


class _Trainer(TorchTrainer):
    """Without helpers that have nothing to do here, each a process of its own: one hands out data sets; one outlives the group to
    give back its places, for which it needs Ray's dashboard, and else never ends. And with our own judgement of how many ranks there
    are, where that may change."""

    policy: AsManyAsFit | None = None

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        # The one place to give it another policy: the trainer makes Ray's own from the settings, and takes none.
        if self.policy is not None:
            given["scaling_policy"] = self.policy
        return super()._initialize_and_run_controller(**given)

    def _create_default_callbacks(self) -> list[Any]:
        idle = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in idle]


class Meeting(Backend):
    """Tells ranks where to meet, and opens nothing. Called when all of a group's processes are there and none has begun, it also
    tells the desk that the group before is gone."""

    share_cuda_visible_devices = True  # LOCAL_RANK numbers the machine's GPUs

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        ray.get(backend_config.desk.start_over.remote())
        address, port = worker_group.execute_single(0, _free_place)
        worker_group.execute(_meet_at, address, port)


@dataclass
class OwnGroup(TorchConfig):
    """Ray's settings for torch, without the process group that comes with them."""

    desk: Any = None

    @property
    def backend_cls(self) -> Any:
        return Meeting


def _free_place() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as bound:
        bound.bind((address, 0))
        return address, bound.getsockname()[1]


def _meet_at(address: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


class Witness(UserCallback):
    """Tells of deaths from where Ray sees them. What a rank raises it tells itself, better. And ends the whole where another start
    would end as this one did: what is raised here, Ray Train takes for a failure of its own, and tries no more."""

    def __init__(self, desk: Any) -> None:
        self.desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        deaths = {rank: str(error) for rank, error in worker_exceptions.items() if not isinstance(error, RankFailure)}
        if ray.get(self.desk.ended.remote(deaths)):
            raise RuntimeError("A rank met what no other start can cure.")


class RankFailure(Exception):  # noqa: N818  (it is no error of its own: the desk has the error)
    """What Ray gets to see of anything that a rank raises."""


def run_rank(config: dict[str, Any]) -> None:
    """One rank, from its start to its end."""
    group, context = config["group"], ray.train.get_context()
    os.environ |= group.environment
    os.environ |= {
        "RANK": str(context.get_world_rank()), "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }  # fmt: skip
    if group.loopback:  # nobody else need reach them
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    line = Line(ray, config["desk"])
    me = Rank(context.get_world_rank(), socket.gethostname(), os.getpid())
    predecessor: Rank | None = line.ask(line.desk.hello, me)
    if predecessor is not None and predecessor.host == me.host:
        _await_end(predecessor.process)
    progress.speak_through(line)
    threading.Thread(target=_obey, args=(line,), daemon=True).start()
    try:
        os.chdir(group.folder)
        result = group.work()
    except LostRankError as error:
        line.tell_surely(Failed(me, error))
        time.sleep(ECHO_SECONDS)
        raise RankFailure(str(error)) from None
    except DistftError as error:
        line.tell_surely(Failed(me, error, final=error.exit_status != 1 or isinstance(error, TrainingError)))
        raise RankFailure(str(error)) from None
    except KeyboardInterrupt as error:
        line.ask(line.desk.leave, me)
        # Where it was another number of ranks that was wanted, Ray ends this one while it waits.
        if not line.ask(line.desk.stop_asked):
            time.sleep(HANDOVER_SECONDS)  # it is about to: neither did this rank stop for the driver, nor is training over
            raise RankFailure("Others have started.") from None
        line.tell_surely(Stopped(str(error)))
    except Exception as error:
        line.tell_surely(Failed(me, f"{type(error).__name__}: {error}", trace=traceback.format_exc()))
        if _lost(error):
            time.sleep(ECHO_SECONDS)
        raise RankFailure(f"{type(error).__name__}: {error}") from None
    else:
        if me.rank == 0:
            line.tell_surely(Finished(result))
        line.ask(line.desk.leave, me)


def _obey(line: Line) -> None:
    """Hands on the driver's wish to stop. Without a desk there is no driver, and nothing to work for."""
    try:
        if not line.ask(line.desk.halt_asked):
            return
    except RayError:
        os._exit(1)
    stopping.tell()
    if not stopping.begun():
        line.tell(Idle())


def _await_end(process: int) -> None:
    until = time.monotonic() + HANDOVER_SECONDS
    while Path(f"/proc/{process}").exists() and process != os.getpid() and time.monotonic() < until:
        time.sleep(0.05)


def _lost(error: Exception) -> bool:
    """Whether torch says that another rank could not be reached, while the group was being formed."""
    return any(kind.__name__ == "DistError" for kind in type(error).__mro__)
