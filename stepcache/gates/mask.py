"""The step computation mask."""

from __future__ import annotations

from dataclasses import dataclass

from ..clock import Position
from ..masks import StepMask
from ..plan import ComputeReason
from ..run_info import RunInfo, SkipCounts
from .base import UNKNOWN_SCHEDULE, Gate, GateCheck


@dataclass(frozen=True)
class Mask(Gate):
    """Holds the ones of a `StepMask`. Without a known step it holds everything: never a mask on the wrong step."""

    mask: StepMask

    def begin(self, run: RunInfo) -> GateCheck:
        if run.steps is None:
            run.warnings.append(f"the mask cannot act: {UNKNOWN_SCHEDULE}")
            return lambda position, counts: ComputeReason("mask: no schedule")
        digits = self.mask.for_steps(run.steps)
        one, off = ComputeReason("mask"), ComputeReason("mask: off the schedule")

        def check(position: Position, counts: SkipCounts) -> ComputeReason | None:
            if position.step is None:
                return off
            return one if digits[min(position.step, len(digits) - 1)] else None

        return check
