"""The places of a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..clock import Position
from ..fingerprint import Fingerprint
from ..plan import ComputeReason
from ..profile import Profile
from ..run_info import RunInfo, SkipCounts
from .base import UNKNOWN_SCHEDULE, Gate, GateCheck


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
        self._compare(run)
        digits = self.profile.scaled(run.evaluations).computed
        one, off = ComputeReason(self.timetable), ComputeReason("profile: off the schedule")

        def answer(position: Position, counts: SkipCounts) -> ComputeReason | None:
            if position.step is None or position.evaluation >= len(digits):
                return off
            return one if digits[position.evaluation] else None

        return answer

    def _compare(self, run: RunInfo) -> None:
        profile, evaluations = self.profile, run.evaluations
        if evaluations != profile.evaluations:
            run.notes.append(
                f"the profile was made for {profile.evaluations} evaluations and is scaled to {evaluations}: what was "
                "measured for it does not hold here, and learned weights are not used"
            )
        elif run.schedule is not None and profile.other_schedule(run.schedule):
            run.notes.append("the profile was made for another schedule of as many steps: it was not measured here")
        if profile.model is not None and run.network is not None:
            difference = profile.model.difference(Fingerprint.of(run.network))
            if difference:
                run.warnings.append(
                    f"the profile was made for {difference}: what it promises was not measured here. Calibrate again "
                    "with stepcache tune"
                )
