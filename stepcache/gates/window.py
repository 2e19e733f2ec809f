"""The window: skipping is open between two shares of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..clock import Position
from ..options import unknown, window
from ..plan import ComputeReason
from ..run_info import RunInfo, SkipCounts
from .base import Gate, GateCheck, share_of

WindowUnit = Literal["steps", "training"]


@dataclass(frozen=True)
class Window(Gate):
    """Skipping is open while sigma(start) >= sigma > sigma(end).

    unit="steps", UCache's meaning: with n steps, sigma(p) = sigmas[min(floor(p n), n - 1)], the product in float32.
    With end = 1 the last step is therefore outside.
    unit="training", EasyCache's meaning: sigma(p) is the training timetable's at (1 - p) (T - 1) with T timesteps;
    p = 0 means from the start and p = 1 to the end.

    If the unit's own source is missing (no schedule, or a model without a table), the other is used; with neither,
    the window is open throughout. The report says which.

    Example:
        >>> from stepcache.extend import Position, RunInfo, SkipCounts, Window
        >>> check = Window(0.5, 1.0).begin(RunInfo(schedule=(8.0, 4.0, 2.0, 1.0, 0.0)))
        >>> [check(Position(0, n, sigma, n), SkipCounts()) is None for n, sigma in enumerate((8.0, 4.0, 2.0, 1.0))]
        [False, False, True, False]
    """

    start: float = 0.0
    end: float = 1.0
    unit: WindowUnit = "steps"

    def __post_init__(self) -> None:
        window(self.start, self.end)
        if self.unit not in ("steps", "training"):
            raise unknown("window unit", str(self.unit), ("steps", "training"))

    def begin(self, run: RunInfo) -> GateCheck:
        high, low, source = self.place(run)
        run.notes.append(
            f"window {self.start:g} to {self.end:g} {source}"
            + ("" if source.startswith("open") else f": {high:g} >= sigma > {low:g}")
        )

        def check(position: Position, counts: SkipCounts) -> ComputeReason | None:
            if position.sigma > high:
                return ComputeReason("before window", observe=False)
            if not position.sigma > low:
                return ComputeReason("after window", observe=False)
            return None

        return check

    def place(self, run: RunInfo) -> tuple[float, float, str]:
        """(sigma at the start, sigma at the end, which meaning held)."""
        schedule, training_sigma = run.schedule, run.training_sigma
        if schedule is not None and (self.unit == "steps" or training_sigma is None):
            steps = len(schedule) - 1
            ends = (schedule[min(share_of(share, steps), steps - 1)] for share in (self.start, self.end))
            high, low = sorted(ends, reverse=True)
            why = "" if self.unit == "steps" else " (no sigma table)"
            return high, low, f"as shares of this run's {steps} steps{why}"
        if training_sigma is not None:
            high = float("inf") if self.start <= 0 else training_sigma(self.start)
            low = 0.0 if self.end >= 1 else training_sigma(self.end)
            why = "" if self.unit == "training" else " (no schedule)"
            return high, low, f"as shares of the training timetable{why}"
        return float("inf"), -1.0, "open throughout: neither a schedule nor a sigma table is known"
