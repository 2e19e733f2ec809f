"""The last step is computed."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import ComputeReason
from ..run_info import RunInfo
from .base import UNKNOWN_SCHEDULE, Gate, GateCheck


@dataclass(frozen=True)
class LastStep(Gate):
    """Holds the last step of the run, which writes the finest detail and is never corrected by another."""

    def begin(self, run: RunInfo) -> GateCheck:
        if run.steps is None:
            run.warnings.append(f"the last step cannot be protected: {UNKNOWN_SCHEDULE}")
        last, reason = -1 if run.steps is None else run.steps - 1, ComputeReason("last step")
        return lambda position, counts: reason if position.step == last else None
