"""Learn and hold at once: cross-entropy plus a divergence from the teacher on every supervised token."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distft.objectives.treatment import ObjectiveRule, Signals, Treatment, treatment


class SftKl(ObjectiveRule):
    kind: Literal["sft_kl"]
    kl: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the divergence against the cross-entropy's 1."""
    direction: Literal["teacher_to_student", "student_to_teacher"] = "teacher_to_student"
    """teacher_to_student is the forward KL(q||p), which covers all that the teacher would say; student_to_teacher is KL(p||q)."""

    @property
    def holds(self) -> bool:
        return True

    @property
    def needs_tail(self) -> bool:
        return self.direction == "student_to_teacher"

    def treat(self, signals: Signals) -> Treatment:
        if self.direction == "teacher_to_student":
            return treatment(len(signals), ce=1.0, kl=self.kl)
        return treatment(len(signals), ce=1.0, rkl=self.kl)
