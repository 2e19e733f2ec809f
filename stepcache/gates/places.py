"""The places of a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..clock import Position
from ..plan import ComputeReason
from ..profile import Profile
from ..run_info import RunInfo, SkipCounts
from .base import UNKNOWN_SCHEDULE, Gate, GateCheck

SCALED = "is scaled to {}: what was measured for it does not hold here, and learned weights are not used"


@dataclass(frozen=True)
class Places(Gate):
    """Computes what a profile computes. The report says if the run is not the one that the profile was made for."""

    profile: Profile
    beside_static: ClassVar[bool] = False

    @property
    def timetable(self) -> str:
        return "profile"

    def begin(self, run: RunInfo) -> GateCheck:
        if run.evaluations is None:
            run.warnings.append(f"the profile cannot act: {UNKNOWN_SCHEDULE}")
            return lambda position, counts: ComputeReason("profile: no schedule")
        self.profile.compare(run, SCALED.format(run.evaluations))
        digits = self.profile.scaled(run.evaluations).computed
        one, off = ComputeReason(self.timetable), ComputeReason("profile: off the schedule")

        def answer(position: Position, counts: SkipCounts) -> ComputeReason | None:
            if position.step is None or position.evaluation >= len(digits):
                return off
            return one if digits[position.evaluation] else None

        return answer
