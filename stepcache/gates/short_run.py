"""A run of few evaluations is computed throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..clock import Position
from ..options import number
from ..plan import ComputeReason
from ..run_info import RunInfo, SkipCounts
from .base import Gate, GateCheck


@dataclass(frozen=True)
class ShortRun(Gate):
    """A run of fewer than `least` evaluations is computed throughout, and the report says so. 0: no run is short.

    Neighbouring evaluations of such a run are so far apart that a prediction from the ones before it is too far off.
    If the schedule is not known, the length is not either, and nothing is held.
    """

    least: int
    beside_static: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("min_evaluations", self.least, whole=True)

    def begin(self, run: RunInfo) -> GateCheck:
        reason = None
        if run.evaluations is not None and run.evaluations < self.least:
            reason = ComputeReason("short run")
            count = "1 evaluation" if run.evaluations == 1 else f"{run.evaluations} evaluations"
            run.notes.append(
                f"the run has only {count}: all are computed, as always below min_evaluations={self.least}"
            )

        def check(position: Position, counts: SkipCounts) -> ComputeReason | None:
            return reason

        return check
