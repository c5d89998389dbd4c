"""Plain supervised fine-tuning: cross-entropy on every supervised token."""

from __future__ import annotations

from typing import Literal

from distft.objectives.treatment import ObjectiveRule, Signals, Treatment, treatment


class Sft(ObjectiveRule):
    kind: Literal["sft"] = "sft"

    def treat(self, signals: Signals) -> Treatment:
        return treatment(len(signals), ce=1.0)
