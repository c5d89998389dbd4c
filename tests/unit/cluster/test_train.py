"""What a driver makes of what its ranks tell, without any."""

from __future__ import annotations

from typing import Any

import pytest

from distft.cluster import train
from distft.cluster.desk import Advanced, Closed, Ended, Failed, Finished, Idle, Opened, Rank, Resized, Said, Stopped
from distft.cluster.train import _Run
from distft.errors import ConfigError, DistftError, LostRankError
from distft.stopping import Interrupted

ONE, TWO = Rank(0, "here", 10), Rank(1, "there", 11)
ECHO = Failed(ONE, LostRankError("Another rank is gone: Connection closed by peer", where="rank 0"))
DEATH = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: End of file. "
    "Some common causes include: (1)"
)


def after(*events: Any, restarts: int = 0) -> _Run:
    run = _Run(None, 2, gpus=0, restarts=restarts)
    for event in events:
        run._take(event)
    return run


def test_a_death_is_the_cause_and_its_echo_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    lost = (ONE, TWO, ECHO, Ended({1: DEATH}))
    run = after(*lost, *lost, restarts=1)
    why = "rank 1 on there died: its process was killed, or crashed (End of file)"
    assert capsys.readouterr().err == f"{why}. All ranks start again and go on from the last checkpoint (restart 1 of 1).\n"
    with pytest.raises(DistftError) as caught:
        run._end("Training failed due to worker errors")
    assert caught.value.problem == f"Training failed again after a new start. {why}."
    assert caught.value.where == "train.restarts=1"
    assert "The same command goes on from the last checkpoint." in caught.value.help


def test_an_echo_alone_is_better_than_nothing() -> None:
    with pytest.raises(DistftError, match=r"^Training failed\. rank 0 on here failed: Another rank is gone: Connection closed"):
        after(ONE, TWO, ECHO, Ended({}))._end("given up")
    with pytest.raises(DistftError, match=r"^Training failed\. Ray gave the ranks up: no room\."):
        after()._end("no room")


def test_what_a_rank_met_comes_out_as_it_is() -> None:
    memory, bad = DistftError("Out of memory: 4 GiB", where="cpu"), ConfigError("no")
    with pytest.raises(DistftError) as caught:
        after(ONE, TWO, ECHO, Failed(TWO, memory), Ended({}))._end("given up")
    assert caught.value is memory
    with pytest.raises(ConfigError) as caught:
        after(ONE, TWO, Failed(TWO, bad, final=True), Ended({0: DEATH}), restarts=3)._end("given up")
    assert caught.value is bad
    with pytest.raises(RuntimeError, match="rank 1 on there: KeyError: 1") as bug:
        after(ONE, TWO, ECHO, Failed(TWO, "KeyError: 1", trace="in a file"), Ended({}))._end("given up")
    assert "in a file" in str(bug.value.__cause__)


def test_a_death_of_an_earlier_start_is_no_cause_of_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (ONE, TWO, Ended({1: DEATH})), (ONE, TWO, Failed(ONE, "ValueError: x", trace="t"), Ended({}))
    with pytest.raises(RuntimeError, match="ValueError: x"):
        after(*first, *second, restarts=1)._end("given up")


def test_results_and_stops() -> None:
    assert after(ONE, TWO, Finished({"steps": 3}))._end("") == {"steps": 3}
    with pytest.raises(Interrupted, match="after step 3"):
        after(ONE, TWO, Stopped("Stopped after step 3."), Stopped("Stopped after step 3."))._end("")


def test_another_number_of_ranks_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Opened(0, "train", 4.0, "steps", 0.0)
    run = after(ONE, bar, Failed(ONE, DistftError("of those that went")), Resized())
    assert (run.meters, run.runs, run.starts_over) == ({}, False, 0)
    assert str(run._stopped_between()) == "Stopped while the ranks were to start again."
    for event in (Rank(0, "here", 12), TWO, Finished({"steps": 4})):
        run._take(event)
    assert run.runs
    assert run._end("") == {"steps": 4}
    assert str(after()._stopped_between()) == "Stopped before training began."
    assert capsys.readouterr().err == ""


def test_a_rank_that_still_loads_when_all_are_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another number of ranks the run goes on; where the driver wants the end there is nothing to wait for."""
    run = after(ONE, Idle(), Resized(), TWO, Idle(), Finished({"steps": 4}))
    assert run._end("") == {"steps": 4}
    monkeypatch.setattr(train.stopping, "requested", lambda: True)
    with pytest.raises(Interrupted, match="Stopped while the ranks were to start again"):
        run._take(Idle())


def test_voices_and_bars_are_replayed_and_taken_down(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Opened(0, "train", 4.0, "steps", 0.0)
    after(ONE, Said("hello"), bar, Advanced(0, 3.0, ""), Advanced(0, 1.0, "loss 1"), Closed(0))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "hello"
    assert said[1].startswith("train: 4 of 4 steps")
    assert said[1].endswith("loss 1")
    lost = after(ONE, bar, Advanced(0, 3.0, ""), Ended({0: DEATH}), Advanced(0, 1.0, ""), Closed(0))
    assert lost.meters == {}
    assert capsys.readouterr().err == "", "a bar that did not end says nothing"
