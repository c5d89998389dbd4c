"""What the desk keeps of one start of the group, and what of it the next start hears. Without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from distft.cluster.desk import Desk, Ended, Failed, Rank
from distft.errors import DistftError

OLD = [Rank(rank, "here", 10 + rank) for rank in range(3)]
NEW = [Rank(rank, "here", 20 + rank) for rank in range(2)]


def at_a_desk(scene: Callable[[Desk], Awaitable[None]]) -> None:
    async def play() -> None:
        await asyncio.wait_for(scene(Desk()), 10)

    asyncio.run(play())


async def waiting(*calls: Any) -> list[asyncio.Task[bool]]:
    """Calls that have come as far as they can without anybody else."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


def test_no_call_of_an_earlier_start_waits_on() -> None:
    """None of its ranks takes that for a wish to stop, and no new rank hears what the old ones were asked."""

    async def scene(desk: Desk) -> None:
        old = await waiting(desk.halt_asked(), desk.stop_asked(), desk.halt_asked())
        await desk.start_over()
        assert await asyncio.gather(*old) == [False, False, False]
        new = await waiting(desk.halt_asked(), desk.stop_asked())
        await desk.pause()
        assert await new[0] is True
        assert not new[1].done()
        await desk.start_over()
        assert await new[1] is False
        await waiting(desk.halt_asked())

    at_a_desk(scene)


@pytest.mark.parametrize("first", ["stop", "start_over"])
def test_the_drivers_wish_is_for_all_starts(first: str) -> None:
    async def scene(desk: Desk) -> None:
        if first == "stop":
            await desk.stop()
            await desk.start_over()
        else:
            await desk.start_over()
            await desk.stop()
        assert await desk.halt_asked()
        assert await desk.stop_asked()

    at_a_desk(scene)


def test_the_end_of_a_group_is_told_once() -> None:
    """Ray says it at every look while others still work. The next group may fail as well."""

    async def scene(desk: Desk) -> None:
        for _ in range(3):
            assert await desk.ended({1: "killed"}) is False
        await desk.start_over()
        await desk.tell(Failed(NEW[0], DistftError("bad", where="here"), final=True))
        for _ in range(3):
            assert await desk.ended({}) is True
        assert [event for event in await desk.hear(0) if isinstance(event, Ended)] == [Ended({1: "killed"}), Ended({})]

    at_a_desk(scene)


def test_a_late_leave_of_an_earlier_start_does_not_count() -> None:
    async def scene(desk: Desk) -> None:
        for rank in OLD:
            assert await desk.hello(rank) is None
        await desk.leave(OLD[0])
        assert await desk.left() == 1
        await desk.start_over()
        assert [await desk.hello(rank) for rank in NEW] == OLD[:2], "each hears whose place it takes"
        for rank in (*OLD, NEW[1]):
            await desk.leave(rank)
        assert await desk.left() == 1

    at_a_desk(scene)


def test_a_line_is_heard_in_the_order_in_which_it_told() -> None:
    """Whatever the order in which its calls are run; lines do not wait for one another."""

    async def scene(desk: Desk) -> None:
        await desk.tell_in_order("a", 2, "third")
        await desk.tell_in_order("b", 0, "of another line")
        await desk.tell_in_order("a", 0, "first", "still first")
        assert await desk.hear(0.0) == ["of another line", "first", "still first"]
        await desk.tell_in_order("a", 1, "second")
        assert await desk.hear(0.0) == ["second", "third"]

    at_a_desk(scene)
