"""What is known of a run when it begins, and what gates count in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .clock import Position, near
from .parametrization import Parametrization


@dataclass
class SkipCounts:
    """Evaluations so far in this run: of the reference branch, or of a branch that decides for itself."""

    computed: int = 0
    skipped: int = 0
    consecutive: int = 0


@dataclass
class RunInfo:
    """What is known of a run when it begins.

    Attributes:
        schedule: sigmas[0..n], or None if not known.
        training_sigma: share of the training timetable (0 = most noise) -> sigma; None if the model has no such table.
        stages: evaluations of a step; None if not known.
        second_only: whether the method leaves the first of two evaluations aside.
        coordinate: sigma -> the coordinate that predictors extrapolate in: log sigma, or t for flow models.
        parametrization: sigma -> what the network's input and output mean there; None if nothing is known.
        network: the model, if the host names it.
        slot: which of the runs of this model that are in progress it is; 0 if it was not begun by a handle.
        notes: sentences for the report.
        warnings: sentences about options that cannot act. They go into the report and are warned of, once an engine.

    Example:
        >>> from stepcache.extend import RunInfo
        >>> run = RunInfo(schedule=(8.0, 4.0, 2.0, 0.0), stages=1)
        >>> run.steps, run.evaluations
        (3, 3)
    """

    schedule: tuple[float, ...] | None = None
    training_sigma: Callable[[float], float] | None = None
    stages: int | None = None
    second_only: bool = False
    coordinate: Callable[[float], float] = math.log
    parametrization: Callable[[float], Parametrization] | None = None
    network: Any = None
    slot: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        return None if self.schedule is None else len(self.schedule) - 1

    def index(self, position: Position) -> float | None:
        """The place of an evaluation in the schedule: i at sigmas[i], and in between by log sigma (linear down to 0).

        Without a schedule it is minus log sigma, or minus `coordinate`; None if that is not a finite number.
        """
        sigma = position.sigma
        if position.step is not None and self.schedule is not None:
            high, low = self.schedule[position.step], self.schedule[position.step + 1]
            if near(sigma, high):
                return float(position.step)
            if near(sigma, low):
                return position.step + 1.0
            if sigma > 0 and high > low > 0:
                return position.step + math.log(high / sigma) / math.log(high / low)
            return position.step + (high - sigma) / (high - low) if high > low else None
        try:
            value = -float(self.coordinate(sigma))
        except (ValueError, ArithmeticError):
            return None
        return value if math.isfinite(value) and self.schedule is None else None

    @property
    def evaluations(self) -> int | None:
        """How many evaluations the method will see, if known: one a step, or two, and one in the last step."""
        if self.schedule is None or self.stages != 2 or self.second_only:
            return self.steps
        steps = len(self.schedule) - 1
        return 2 * steps - 1 if self.schedule[-1] == 0 else 2 * steps

    @property
    def asked(self) -> int | None:
        """How many evaluations the sampler asks for, as if its last step had as many as the others."""
        return None if self.steps is None else self.steps * (self.stages or 1)
