"""Spectrum's timetable."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..clock import Position
from ..masks import LONGEST
from ..options import number
from ..plan import ComputeReason
from ..run_info import RunInfo, SkipCounts
from .base import UNKNOWN_SCHEDULE, Gate, GateCheck, share_of


@dataclass(frozen=True)
class SpectrumCadence(Gate):
    """Spectrum's timetable: the gap between computed evaluations grows.

    Computed are the first `warmup` evaluations, at least two, and those from the floor(stop N)-th on, with N the
    evaluations of the run. In between, after r skipped ones in a row, the next is computed if

        (r + 1) mod max(1, floor(W)) = 0,   W = window_size + flex_window * (computed evaluations since the warm-up)

    Source: stable-diffusion.cpp, commit 97d29908; defaults are its. It takes N = steps whatever the sampler, so that of
    Heun's run it stops after `stop / 2`; here N is 2 steps then. stop = 0 does not stop at all, which is published so.
    """

    window_size: float = 2
    flex_window: float = 0.5
    warmup: int = 4
    stop: float = 0.9

    def __post_init__(self) -> None:
        number("window_size", self.window_size, low=1, high=LONGEST)
        number("flex_window", self.flex_window, high=LONGEST)
        number("warmup", self.warmup, whole=True)
        number("stop", self.stop, high=1.0)

    @property
    def timetable(self) -> str:
        return "cadence"

    def begin(self, run: RunInfo) -> GateCheck:
        if run.asked is None and self.stop:
            run.warnings.append(f"stop={self.stop:g} cannot act: {UNKNOWN_SCHEDULE}")
        stop = 0 if run.asked is None else share_of(self.stop, run.asked)
        warming, stopped, due = ComputeReason("warm-up"), ComputeReason("after stop"), ComputeReason(self.timetable)

        def check(position: Position, counts: SkipCounts) -> ComputeReason | None:
            asked = counts.computed + counts.skipped
            if asked < self.warmup or counts.computed < 2:
                return warming
            if 0 < stop <= asked:
                return stopped
            window = math.floor(self.window_size + self.flex_window * (counts.computed - self.warmup))
            return None if (counts.consecutive + 1) % max(1, window) else due

        return check
