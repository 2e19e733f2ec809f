"""One of so many evaluations is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..clock import Position
from ..options import number
from ..plan import ComputeReason
from ..run_info import RunInfo, SkipCounts
from .base import Gate, GateCheck


@dataclass(frozen=True)
class Interval(Gate):
    """Of `n` evaluations one is computed, after the first `start`, which all are.

    If a step has two (Heun, DPM2, DPM++ SDE), only second ones are computed: at Heun's first one the sigma is that
    of the second one before, so that a skip there costs next to nothing. n = 1 computes all.
    A static mask takes its place.

    Example:
        >>> from stepcache import Method
        >>> from stepcache.extend import Interval
        >>> [gate.n for gate in Method(gates=(Interval(3),)).gates]
        [3]
    """

    n: int = 2
    start: int = 1
    beside_static: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("interval", self.n, low=1, whole=True)
        number("start", self.start, low=1, whole=True)

    @property
    def timetable(self) -> str:
        return f"interval of {self.n}"

    def begin(self, run: RunInfo) -> GateCheck:
        reason, second = ComputeReason(self.timetable), run.stages == 2 and self.n > 1

        def check(position: Position, counts: SkipCounts) -> ComputeReason | None:
            due = counts.consecutive >= self.n - 1 or counts.computed < self.start
            if second and position.stage == 1:
                due = due or counts.computed < 2
            elif second:
                due = counts.consecutive >= self.n  # steps with one evaluation among them
            return reason if due else None

        return check
