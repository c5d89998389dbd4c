"""The drift budget: how strongly the objective holds, controlled so that drift on held-out text stays within what the user allows.

The weights on divergences are multiplied by a factor. After each measurement the factor moves, in logarithms, by how far drift is
expected to lie from the budget some measurements later, and never by more than a step. Expecting matters: a model goes on moving for
a while after it is held, so a factor that waits until the budget is spent comes too late. What is measured has noise: the slope is
taken over several measurements, and an error within BAND is answered by nothing. While drift still speeds up, a slope over several
would lag behind, so at first the steeper one counts. The factor slips more slowly than it grips, and never below the user's own
weights divided by RELEASE.

Pure arithmetic on measured numbers: a run that is taken up again goes on as if it had not stopped.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

AHEAD = 4
"""How many measurements ahead drift is expected to go on as it did over the last few."""
SEEN = 4
"""How many measurements are kept, and the slope is taken over."""
EARLY = 6
"""For so many measurements the slope is that since the last one, if it is steeper."""
BAND = 0.1
"""Expected errors, in logarithms, that are left alone."""
GAIN = 0.5
"""How much of the expected error is answered at once."""
GRIP, SLIP = math.log(2.5), math.log(1.15)
"""The most that the factor's logarithm moves up and down at one measurement."""
RELEASE = 8.0
MOST = 256.0
"""The factor's bounds: 1/RELEASE of the user's weights, and MOST times them."""
OVER = 1.2
"""A budget counts as kept while drift is at most this much of it."""


@dataclass(slots=True)
class DriftBudget:
    """What the controller knows. `factor` multiplies every weight on a divergence from the next step on."""

    budget: float
    """Nats per token."""
    factor: float = 1.0
    seen: list[float] = field(default_factory=lambda: [0.0])
    """Drift as last measured, the newest last; a student that has not moved has none."""
    measured: int = 0
    """How many times."""
    over: int = 0
    """Consecutive measurements above the budget with the factor at its upper bound."""

    @classmethod
    def resumed(cls, budget: float, facts: dict[str, Any]) -> DriftBudget:
        """As it was when `facts` were kept."""
        return cls(**{**facts, "budget": budget})

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def result(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"nats": self.budget, "drift": self.last, "kept": self.kept}

    def observe(self, drift: float) -> None:
        """Takes a measurement, and sets the factor for the steps until the next."""
        since_last, self.measured = drift - self.last, self.measured + 1
        self.seen = [*self.seen, drift][-SEEN:]
        slope = (drift - self.seen[0]) / (len(self.seen) - 1)
        if self.measured <= EARLY:
            slope = max(slope, since_last)
        expected = max(drift + AHEAD * slope, drift / 2, 1e-3 * self.budget)
        error = math.log(expected / self.budget)
        if abs(error) > BAND:
            wanted = math.log(self.factor) + max(-SLIP, min(GRIP, GAIN * error))
            self.factor = max(1 / RELEASE, min(MOST, math.exp(wanted)))
        self.over = self.over + 1 if drift > OVER * self.budget and self.factor >= MOST else 0

    @property
    def last(self) -> float:
        """Drift as last measured."""
        return self.seen[-1]

    @property
    def kept(self) -> bool:
        """Whether drift, as last measured, is within the budget and its tolerance."""
        return self.last <= OVER * self.budget

    @property
    def hopeless(self) -> bool:
        """Whether holding as strongly as allowed has not helped for a while."""
        return self.over == 3
