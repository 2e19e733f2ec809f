"""The last step is computed."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import ComputeReason
from ..run_info import RunInfo
from .base import UNKNOWN_SCHEDULE, Gate, GateCheck


@dataclass(frozen=True)
class LastStep(Gate):
    """Holds the last step of the run, which writes the finest detail and is never corrected by another.

    Example:
        >>> from stepcache.extend import LastStep, Position, RunInfo, SkipCounts
        >>> check = LastStep().begin(RunInfo(schedule=(4.0, 2.0, 1.0, 0.0)))
        >>> [check(Position(0, n, 1.0, n), SkipCounts()) is None for n in range(3)]
        [True, True, False]
    """

    def begin(self, run: RunInfo) -> GateCheck:
        if run.steps is None:
            run.warnings.append(f"the last step cannot be protected: {UNKNOWN_SCHEDULE}")
        last, reason = -1 if run.steps is None else run.steps - 1, ComputeReason("last step")
        return lambda position, counts: reason if position.step == last else None
