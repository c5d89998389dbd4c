"""Teams of ranks: only in numbers that fill them, and then for all who ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from distft.engine.world import World
from distft.errors import ConfigError
from distft.train.batches import share


@pytest.mark.parametrize(("ranks", "size"), [(1, 2), (4, 3), (2, 4)])
def test_ranks_that_do_not_fill_teams_are_refused(ranks: int, size: int) -> None:
    told = f"train.sequence_parallel={size} has each row shared by {size} ranks, and {ranks} ranks cannot be split"
    with pytest.raises(ConfigError, match=told) as caught:
        World(size=ranks).in_teams(size)
    assert f"a multiple of {size} ranks" in caught.value.help


def test_alone_a_rank_is_its_own_team() -> None:
    world = World(rank=3, size=8)
    assert world.in_teams(1) is world
    assert (world.team.rank, world.team.size, world.team.leads) == (0, 1, True)


def test_a_team_has_the_same_batches_and_teams_have_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []

    def new_group(ranks: list[int], **_: Any) -> list[int]:
        made.append(ranks)
        return ranks

    monkeypatch.setattr(dist, "new_group", new_group)
    worlds = [World(rank=rank, size=6).in_teams(2) for rank in range(6)]
    assert made == [[0, 1], [2, 3], [4, 5]] * 6
    assert [world.team.group for world in worlds] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert [world.team.rank for world in worlds] == [0, 1] * 3
    batches = [[number] for number in range(7)]
    dealt = [share(batches, world) for world in worlds]
    assert dealt[0::2] == dealt[1::2]
    assert {len(one) for one in dealt} == {3}
    assert sorted(number for one in dealt[0::2] for batch in one for number in batch) == list(range(7))
