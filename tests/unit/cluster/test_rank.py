"""What a rank makes of what the desk answers, and what its group's start tells the desk. Without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from distft.cluster.desk import Desk, Idle, Stopped
from distft.cluster.session import _close_doors
from distft.stopping import Interrupted


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `rank` has of Ray and of its process is replaced; this is what arrives at the desk that it calls."""
    _close_doors()
    from distft.cluster import rank

    context = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0, get_local_world_size=lambda: 1
    )
    found: list[Any] = []
    monkeypatch.setattr(rank.ray, "get", lambda answer: answer)
    monkeypatch.setattr(rank.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(rank.os, "environ", dict(rank.os.environ))
    monkeypatch.setattr(rank.progress, "speak_through", lambda line: None)
    monkeypatch.setattr(rank.time, "sleep", lambda seconds: found.append("slept"))
    monkeypatch.setattr(rank.stopping, "tell", lambda: found.append("to stop"))
    monkeypatch.setattr(rank.stopping, "begun", lambda: False)
    return found


def desk(told: list[Any], **answers: Any) -> Any:
    """A desk that is called as an actor is, and answers None where nothing else is given."""

    def method(name: str) -> Any:
        assert hasattr(Desk, name), name

        def remote(*given: Any) -> Any:
            told.extend(given[2:] if name == "tell_in_order" else [name])
            return answers.get(name)

        return SimpleNamespace(remote=remote)

    return SimpleNamespace(**{name: method(name) for name in (*answers, "hello", "leave", "tell_in_order", "start_over")})


def interrupted() -> dict[str, Any]:
    raise Interrupted("Stopped after step 3.")


def rank_that_stops(told: list[Any], monkeypatch: pytest.MonkeyPatch, *, for_the_driver: bool) -> Callable[[], None]:
    from distft.cluster import rank

    monkeypatch.setattr(rank, "_obey", lambda line: None)
    group = SimpleNamespace(environment={}, loopback=False, folder=".", work=interrupted)
    return lambda: rank.run_rank({"group": group, "desk": desk(told, stop_asked=for_the_driver)})


def test_a_rank_that_others_replace_says_nothing(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that the driver had it stop, which would end the run, nor, by returning, that training is over."""
    rank_that_stops(told, monkeypatch, for_the_driver=True)()
    assert told == ["hello", "leave", "stop_asked", Stopped("Stopped after step 3.")]
    told.clear()
    with pytest.raises(Exception, match="Others have started"):
        rank_that_stops(told, monkeypatch, for_the_driver=False)()
    assert told == ["hello", "leave", "stop_asked", "slept"]


def test_the_answer_to_a_call_of_an_earlier_start_is_no_wish_to_stop(told: list[Any]) -> None:
    from distft.cluster import rank
    from distft.cluster.desk import Line

    for halt in (False, True):
        rank._obey(Line(rank.ray, desk(told, halt_asked=halt)))
    assert told == ["halt_asked", "halt_asked", "to stop", Idle()]


def test_a_group_that_starts_is_told_to_the_desk(told: list[Any]) -> None:
    """Of any size, fixed ones as well: that is where what the last one was asked is forgotten."""
    from distft.cluster import rank

    settings = rank.OwnGroup(desk=desk(told))
    processes = SimpleNamespace(execute_single=lambda *_: ("here", 1), execute=lambda *_: told.append("all know where"))
    settings.backend_cls().on_start(processes, settings)
    assert told == ["start_over", "all know where"]


def test_a_witness_passes_on_deaths_alone(told: list[Any]) -> None:
    from distft.cluster import rank

    real = Desk()
    line = SimpleNamespace(ended=SimpleNamespace(remote=lambda deaths: asyncio.run(real.ended(deaths))))
    for _ in range(2):
        rank.Witness(line).after_exception(None, {0: rank.RankFailure("echo"), 1: OSError("killed")})
    (event,) = real.told
    assert event.deaths == {1: "killed"}
