"""With how many ranks a group starts, and when it is asked to stop for more, without any."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from distft.cluster.desk import Desk, Resized, Said
from distft.cluster.session import _close_doors

if TYPE_CHECKING:
    from distft.cluster.elastic import AsManyAsFit

EACH = {"CPU": 1.0, "GPU": 1.0}
LOOKS = 30.0


@dataclass
class Bureau:
    """A desk that is called as an actor is, and a cluster whose clock stands still."""

    told: list[Any] = field(default_factory=list)
    left_count: int = 0
    free: dict[str, dict[str, float]] = field(default_factory=dict)
    now: float = 1000.0

    def __getattr__(self, name: str) -> Any:
        assert hasattr(Desk, name), name

        def remote(*given: Any) -> Any:
            self.told += given or ([] if name == "left" else [name])
            return self.left_count

        return SimpleNamespace(remote=remote)


@pytest.fixture
def bureau(monkeypatch: pytest.MonkeyPatch) -> Bureau:
    _close_doors()  # ray reads its environment when it is imported: not at the top of a test file, and not before this
    from distft.cluster import elastic

    found = Bureau()
    clock = SimpleNamespace(monotonic=lambda: found.now, sleep=lambda seconds: setattr(found, "now", found.now + seconds))
    monkeypatch.setattr(elastic, "time", clock)
    monkeypatch.setattr(elastic, "ray", SimpleNamespace(get=lambda answer: answer))
    monkeypatch.setattr(elastic, "available_resources_per_node", lambda: found.free)
    monkeypatch.setattr(elastic.AsManyAsFit, "_maybe_send_resource_request", lambda self: None)
    return found


def policy(bureau: Bureau, least: int = 1, most: int = 4) -> AsManyAsFit:
    from ray.train import ScalingConfig

    from distft.cluster.elastic import AsManyAsFit

    settings = ScalingConfig(
        num_workers=(least, most), use_gpu=True, resources_per_worker=EACH, elastic_resize_monitor_interval_s=LOOKS
    )
    return AsManyAsFit(settings, bureau, EACH)


def started(made: AsManyAsFit) -> int:
    """With how many it starts, however long that takes."""
    while True:
        ranks = asked(made.make_decision_for_non_running_worker_group())
        if ranks is not None:
            return ranks


def asked(decision: Any) -> int | None:
    """With how many ranks a decision has a group start, if it does."""
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

    assert isinstance(decision, ResizeDecision | NoopDecision)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


def looked_at(made: AsManyAsFit, bureau: Bureau, *machines: str) -> int | None:
    """What is decided for a group on these machines."""
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=name)) for name in machines]
    state: Any = SimpleNamespace(num_workers=len(workers), workers=workers, start_time=0.0)
    return asked(made.make_decision_for_running_worker_group(state, None))


def said(bureau: Bureau) -> list[str]:
    return [event.text for event in bureau.told if isinstance(event, Said)]


def test_room_is_counted_by_machine(bureau: Bureau) -> None:
    """A GPU here and a CPU there are no room."""
    bureau.free = {"a": {"CPU": 8.0, "GPU": 2.0}, "b": {"CPU": 3.0}, "c": {"GPU": 4.0, "CPU": 1.0}}
    assert policy(bureau).room([]) == 3
    assert policy(bureau).room(["a", "a", "gone"]) == 5


def test_all_start_at_once_and_fewer_when_no_more_come(bureau: Bureau) -> None:
    from distft.cluster.elastic import SETTLE_SECONDS

    bureau.free = {"a": {"CPU": 8.0, "GPU": 8.0}}
    made, begun = policy(bureau), bureau.now
    assert started(made) == 4
    assert bureau.now == begun
    bureau.free = {"a": {"CPU": 3.0, "GPU": 8.0}}
    assert started(policy(bureau)) == 3
    assert bureau.now == begun + SETTLE_SECONDS
    assert said(bureau) == ["train: starting with 4 ranks (of 1 to 4)", "train: starting with 3 ranks (of 1 to 4)"]


def test_the_fewest_are_waited_for(bureau: Bureau) -> None:
    bureau.free = {"a": {"CPU": 1.0, "GPU": 1.0}}
    made = policy(bureau, least=2)
    for _ in range(100):
        assert asked(made.make_decision_for_non_running_worker_group()) is None
    assert said(bureau) == []
    bureau.free["b"] = dict(EACH)
    assert started(made) == 2


def test_a_group_that_failed_still_has_its_places(bureau: Bureau) -> None:
    bureau.free = {"a": dict(EACH), "b": dict(EACH)}
    made = policy(bureau, most=2)
    assert started(made) == 2
    bureau.free = {"a": {}, "b": {}}
    assert looked_at(made, bureau, "a", "b") is None
    assert started(made) == 2, "a rank died, and its machine lives"
    assert said(bureau) == ["train: starting with 2 ranks (of 1 to 2)"]
    looked_at(made, bureau, "a", "b")
    del bureau.free["b"]
    assert started(made) == 1
    assert said(bureau)[1:] == ["train: going on with 1 rank (of 1 to 2)"]


def test_a_group_that_failed_before_it_was_seen(bureau: Bureau) -> None:
    """Nobody knows what it has: as many are tried again, and if there is no room for them, what is free counts."""
    from ray.train.v2._internal.execution.controller.state import ReschedulingState

    bureau.free = {"a": dict(EACH), "b": dict(EACH)}
    made = policy(bureau, most=2)
    assert started(made) == 2
    bureau.free = {"a": {}}
    assert started(made) == 2
    bureau.free = {"a": dict(EACH)}
    made.after_controller_state_update(None, ReschedulingState(training_failed_error=None))  # pyright: ignore[reportArgumentType]
    assert started(made) == 1


def test_room_for_more_is_seen_twice_and_all_stop_first(bureau: Bureau) -> None:
    bureau.free = {"a": dict(EACH)}
    made = policy(bureau)
    assert started(made) == 1
    bureau.free = {"a": {}}
    assert looked_at(made, bureau, "a") is None
    for machines in ("b", "bc"):  # they come one after another
        bureau.now += LOOKS
        bureau.free |= {name: dict(EACH) for name in machines}
        looked_at(made, bureau, "a")
        assert "pause" not in bureau.told
    bureau.now += LOOKS - 1
    looked_at(made, bureau, "a")
    assert "pause" not in bureau.told, "it is too soon to look again"
    bureau.now += 1
    looked_at(made, bureau, "a")
    assert bureau.told[-1] == "pause"
    assert said(bureau)[-1] == "train: 2 ranks more can be had: keeping the last step and starting again with 3"
    bureau.now += 10 * LOOKS
    assert looked_at(made, bureau, "a") is None, "the rank is still at work"
    del bureau.free["c"]
    bureau.left_count = 1
    assert looked_at(made, bureau, "a") == 2, "what there is room for is counted again"
    assert bureau.told[-2:] == [Resized(), Said("train: going on with 2 ranks (of 1 to 4)")]


def test_a_healthy_group_never_shrinks(bureau: Bureau) -> None:
    bureau.free = {"a": {"CPU": 2.0, "GPU": 2.0}}
    made = policy(bureau, most=2)
    assert started(made) == 2
    bureau.free = {}
    for _ in range(5):
        bureau.now += LOOKS
        assert looked_at(made, bureau, "a", "a") is None
    assert "pause" not in bureau.told
