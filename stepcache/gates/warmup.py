"""The warm-up: the first steps are computed."""

from __future__ import annotations

from dataclasses import dataclass

from ..clock import Position
from ..options import number
from ..plan import ComputeReason
from ..run_info import RunInfo, SkipCounts
from .base import Gate, GateCheck


@dataclass(frozen=True)
class Warmup(Gate):
    """Holds the first `steps` steps; if steps are not known, the first `steps` evaluations.

    Example:
        >>> from stepcache.extend import Position, RunInfo, SkipCounts, Warmup
        >>> check = Warmup(2).begin(RunInfo(schedule=(8.0, 4.0, 2.0, 1.0, 0.0)))
        >>> [check(Position(0, n, 1.0, n), SkipCounts()) is None for n in range(4)]
        [False, False, True, True]
    """

    steps: int

    def __post_init__(self) -> None:
        number("warmup", self.steps, whole=True)

    def begin(self, run: RunInfo) -> GateCheck:
        reason = ComputeReason("warm-up")

        def check(position: Position, counts: SkipCounts) -> ComputeReason | None:
            return reason if (position.evaluation if position.step is None else position.step) < self.steps else None

        return check
