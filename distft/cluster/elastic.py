"""With how many ranks a group trains where the run file gives a range: as many as there is room for whenever it starts. When there is
room for more, all ranks keep what they have, and more of them start.

Ray Train's own policy would count what the cluster has, whoever uses it, every 20 seconds, and end ranks in the middle of their steps.
Ray asks a policy what to do after every look at its ranks, so this one is asked while they still work: it has the desk tell them to
stop, and answers when they have. They wait then rather than end, which Ray would take for the end of training.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision

from distft.cluster.desk import Resized, Said

PAUSE_SECONDS = 0.5
"""Between two looks while no rank runs."""
SETTLE_SECONDS = 5.0
"""What has just ended may still be counted as in use: so long is waited for room for all before fewer start."""


class AsManyAsFit(ElasticScalingPolicy):
    """Ray's autoscaler, where there is one, is asked for the most ranks all the time, as Ray's own policy does."""

    def __init__(self, scaling_config: ScalingConfig, desk: Any, each: dict[str, float]) -> None:
        super().__init__(scaling_config)
        self.desk = desk
        self.least, self.most = scaling_config.min_workers, scaling_config.max_workers
        self.each = each
        self.count: int | None = None
        """With how many ranks the last group was started."""
        self.places: list[str] | None = []
        """The machine of each of its ranks; None until it was seen to run. They stay taken until the next group is about to start."""
        self.since: float | None = None
        """When it was first seen that no group runs."""
        self.looked, self.seen = float("-inf"), 0
        """When was last looked for room, and for how many there was."""
        self.pausing = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ReschedulingState):
            self.places = []  # the group did not come to be, and has given back what it had

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        now = time.monotonic()
        if self.since is None:
            self.since, self.pausing = now, False
        if self.places is None and self.count is not None:
            return self._start(self.count)  # it failed before it was looked at, so that nobody knows what it has
        room = min(self.most, self.room(self.places or []))
        if room < self.least or (room < self.most and now - self.since < SETTLE_SECONDS):
            time.sleep(PAUSE_SECONDS)  # Ray asks again at once
            return NoopDecision()
        return self._start(room)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        self._maybe_send_resource_request()
        now, running = time.monotonic(), worker_group_state.num_workers
        self.places = [worker.metadata.node_id for worker in worker_group_state.workers]
        if self.pausing:
            if ray.get(self.desk.left.remote()) < running:
                return NoopDecision()
            ray.get(self.desk.tell.remote(Resized()))
            return self._start(max(self.least, min(self.most, self.room(self.places))))
        if now - max(self.looked, worker_group_state.start_time) < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        room, before = min(self.most, self.room(self.places)), self.seen
        self.looked, self.seen = now, room
        # Twice the same: machines that come one after another cost one new start.
        if running < room == before:
            self.pausing = True
            self._say(f"{_ranks(room - running)} more can be had: keeping the last step and starting again with {room}")
            ray.get(self.desk.pause.remote())
        return NoopDecision()

    def room(self, places: list[str]) -> int:
        """For how many ranks there is room, those places included that are taken on machines that live."""
        free = available_resources_per_node()
        fits = [min(has.get(kind, 0.0) // amount for kind, amount in self.each.items()) for has in free.values()]
        return int(sum(fits)) + sum(place in free for place in places)

    def _start(self, ranks: int) -> ScalingDecision:
        if ranks != self.count:
            self._say(f"{'starting' if self.count is None else 'going on'} with {_ranks(ranks)} (of {self.least} to {self.most})")
        self.count, self.places, self.since, self.pausing, self.seen = ranks, None, None, False, 0
        return self._get_resize_decision(ranks)

    def _say(self, text: str) -> None:
        ray.get(self.desk.tell.remote(Said(f"train: {text}")))


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"
