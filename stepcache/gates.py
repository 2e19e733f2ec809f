"""Gates: which evaluations may be skipped. They know places and counts, never tensors.

A gate is a frozen description; `gate.begin(run)` gives the function that answers for one run. The answer is a `ComputeReason`
(compute, for this reason) or None (it lets the evaluation through). One hold is enough.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .clock import Position, near
from .masks import StepMask
from .options import OptionError, number, unknown, window
from .parametrization import Parametrization

WindowUnit = Literal["steps", "training"]
UNKNOWN_SCHEDULE = "this run's schedule is not known (pass sigmas=, or use sample())"


@dataclass(frozen=True)
class ComputeReason:
    """Why an evaluation must be computed.

    `observe`: the criterion may learn from it. `record`: the predictor's memory takes it in.
    """

    reason: str
    observe: bool = True
    record: bool = True


@dataclass
class SkipCounts:
    """What has happened so far in this run to the reference, or to a branch that decides for itself, in evaluations."""

    computed: int = 0
    skipped: int = 0
    consecutive: int = 0


@dataclass
class RunInfo:
    """What is known of a run when it begins.

    `schedule` is sigmas[0..n] or None; `training_sigma(share)` is the sigma at a share of the training timetable
    (0 = most noise) or None where the model has no such table; `stages` the evaluations of a step, None if not known;
    `second_only` whether the method leaves the first of two aside; `coordinate(sigma)` the coordinate that predictors
    extrapolate in: log sigma, or t for flow models. Sentences in `notes` go into the report; those in `warnings`, about
    options that cannot act, are also said aloud, once a engine.

    `parametrization(sigma)` says what the network's input and output mean there; None if nothing is known of the
    network.
    """

    schedule: tuple[float, ...] | None = None
    training_sigma: Callable[[float], float] | None = None
    stages: int | None = None
    second_only: bool = False
    coordinate: Callable[[float], float] = math.log
    parametrization: Callable[[float], Parametrization] | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        return None if self.schedule is None else len(self.schedule) - 1

    def index(self, position: Position) -> float | None:
        """The place of an evaluation in the schedule: step i at sigmas[i], in log sigma between (linear down to 0).

        Without a schedule it is minus log sigma, or `coordinate`; None if neither is a finite number.
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
        """How many evaluations the method will see, as far as is known: one a step, or two, and one in the last."""
        if self.steps is None or self.stages != 2 or self.second_only:
            return self.steps
        return 2 * self.steps - 1 if self.schedule[-1] == 0 else 2 * self.steps

    @property
    def asked(self) -> int | None:
        """How many evaluations the sampler asks for, as if its last step had as many as the others."""
        return None if self.steps is None else self.steps * (self.stages or 1)


Answer = Callable[[Position, SkipCounts], ComputeReason | None]


class Gate(ABC):
    """One reason to compute, whatever the criterion would say."""

    @abstractmethod
    def begin(self, run: RunInfo) -> Answer:
        """The answer for one run: a function of the place and the tally."""


def as_gates(given: Any) -> tuple[Gate, ...]:
    """Gates given as an option. OptionError where that is not a tuple or a list of them."""
    if not isinstance(given, (tuple, list)) or not all(isinstance(gate, Gate) for gate in given):
        raise OptionError(f"gates={given!r}: accepted are objects of classes made from Gate, in a tuple or a list")
    return tuple(given)


@dataclass(frozen=True)
class Window(Gate):
    """Skipping is open while sigma(start) >= sigma > sigma(end).

    unit="steps", UCache's meaning: with n steps, sigma(p) = sigmas[min(floor(p n), n - 1)], the product in float32.
    With end = 1 the last step is therefore outside.
    unit="training", EasyCache's meaning: sigma(p) is the training timetable's at (1 - p) (T - 1) with T timesteps;
    p = 0 means from the start and p = 1 to the end.

    Where the unit's own source is missing (no schedule, or a model without a table), the other is used; with neither,
    the window is open throughout. The report says which.
    """

    start: float = 0.0
    end: float = 1.0
    unit: WindowUnit = "steps"

    def __post_init__(self) -> None:
        window(self.start, self.end)
        if self.unit not in ("steps", "training"):
            raise unknown("window unit", str(self.unit), ("steps", "training"))

    def begin(self, run: RunInfo) -> Answer:
        high, low, source = self.place(run)
        run.notes.append(
            f"window {self.start:g} to {self.end:g} {source}"
            + ("" if source.startswith("open") else f": {high:g} >= sigma > {low:g}")
        )

        def answer(position: Position, counts: SkipCounts) -> ComputeReason | None:
            if position.sigma > high:
                return ComputeReason("before window", observe=False)
            if not position.sigma > low:
                return ComputeReason("after window", observe=False)
            return None

        return answer

    def place(self, run: RunInfo) -> tuple[float, float, str]:
        """(sigma at the start, sigma at the end, which meaning held)."""
        units = {"steps": run.schedule, "training": run.training_sigma}
        unit = self.unit if units[self.unit] is not None else next((u for u in units if units[u] is not None), None)
        if unit is None:
            return float("inf"), -1.0, "open throughout: neither a schedule nor a sigma table is known"
        why = "" if unit == self.unit else {"steps": " (no sigma table)", "training": " (no schedule)"}[unit]
        if unit == "steps":
            high, low = sorted((self._step_sigma(run, self.start), self._step_sigma(run, self.end)), reverse=True)
            return high, low, f"as shares of this run's {run.steps} steps{why}"
        high = float("inf") if self.start <= 0 else run.training_sigma(self.start)
        low = 0.0 if self.end >= 1 else run.training_sigma(self.end)
        return high, low, f"as shares of the training timetable{why}"

    def _step_sigma(self, run: RunInfo, share: float) -> float:
        return run.schedule[min(_share(share, run.steps), run.steps - 1)]


def _share(share: float, count: int) -> int:
    """floor(share count), the product in float32 as published."""
    return int(torch.tensor(share, dtype=torch.float32) * count)


@dataclass(frozen=True)
class Mask(Gate):
    """Holds the ones of a `StepMask`. Without a known step it holds everything: never a mask on the wrong step."""

    mask: StepMask

    def begin(self, run: RunInfo) -> Answer:
        if run.steps is None:
            run.warnings.append(f"the mask cannot act: {UNKNOWN_SCHEDULE}")
            return lambda position, counts: ComputeReason("mask: no schedule")
        digits = self.mask.for_steps(run.steps)
        one, off = ComputeReason("mask"), ComputeReason("mask: off the schedule")

        def answer(position: Position, counts: SkipCounts) -> ComputeReason | None:
            if position.step is None:
                return off
            return one if digits[min(position.step, len(digits) - 1)] else None

        return answer


@dataclass(frozen=True)
class Warmup(Gate):
    """Holds the first `steps` steps; where steps are not known, the first `steps` evaluations."""

    steps: int

    def __post_init__(self) -> None:
        number("warmup", self.steps, whole=True)

    def begin(self, run: RunInfo) -> Answer:
        hold = ComputeReason("warm-up")

        def answer(position: Position, counts: SkipCounts) -> ComputeReason | None:
            return hold if (position.evaluation if position.step is None else position.step) < self.steps else None

        return answer


@dataclass(frozen=True)
class LastStep(Gate):
    """Holds the last step of the run, which writes the finest detail and is never corrected by another."""

    def begin(self, run: RunInfo) -> Answer:
        if run.steps is None:
            run.warnings.append(f"the last step cannot be protected: {UNKNOWN_SCHEDULE}")
        last, hold = -1 if run.steps is None else run.steps - 1, ComputeReason("last step")
        return lambda position, counts: hold if position.step == last else None


@dataclass(frozen=True)
class MaxCached(Gate):
    """At most `limit` skipped evaluations in a run; -1 is no limit, 0 never skips."""

    limit: int

    def __post_init__(self) -> None:
        number("max_cached", self.limit, low=-1, whole=True)

    def begin(self, run: RunInfo) -> Answer:
        hold = ComputeReason("max_cached")
        return lambda position, counts: hold if 0 <= self.limit <= counts.skipped else None


@dataclass(frozen=True)
class MaxConsecutive(Gate):
    """At most `limit` skipped evaluations in a row, then one is computed; -1 is no limit, 0 never skips."""

    limit: int

    def __post_init__(self) -> None:
        number("max_consecutive", self.limit, low=-1, whole=True)

    def begin(self, run: RunInfo) -> Answer:
        hold = ComputeReason("max_consecutive")
        return lambda position, counts: hold if 0 <= self.limit <= counts.consecutive else None


@dataclass(frozen=True)
class SecondOfTwo(Gate):
    """Holds, unrecorded, the first evaluation of every two-evaluation step: Heun, DPM2, DPM++ 2S, DPM++ SDE.

    The published rule of stable-diffusion.cpp: only the second evaluation of such a step reads or writes the cache, and
    the single evaluation of the last one does neither. It needs `stages` to be known (`sample()` knows it); without, it
    lets everything through and the report says so.
    """

    def begin(self, run: RunInfo) -> Answer:
        if run.stages is None:
            run.warnings.append(
                "evaluations='second' cannot act: how many evaluations a step has is not known (use sample(), or pass "
                "stages=)"
            )
        hold = ComputeReason("first of two", observe=False, record=False)
        return lambda position, counts: hold if run.stages == 2 and position.stage == 0 else None


@dataclass(frozen=True)
class Interval(Gate):
    """Of `n` evaluations one is computed, after the first `start`, which all are.

    Where a step has two (Heun, DPM2, DPM++ SDE), only second ones are computed: at Heun's first one the sigma is that
    of the second one before, so that a skip there costs next to nothing. n = 1 computes all.
    """

    n: int = 2
    start: int = 1

    def __post_init__(self) -> None:
        number("n", self.n, low=1, whole=True)
        number("start", self.start, low=1, whole=True)

    def begin(self, run: RunInfo) -> Answer:
        hold, second = ComputeReason(f"every {self.n}"), run.stages == 2 and self.n > 1

        def answer(position: Position, counts: SkipCounts) -> ComputeReason | None:
            due = counts.consecutive >= self.n - 1 or counts.computed < self.start
            if second and position.stage == 1:
                due = due or counts.computed < 2
            elif second:
                due = counts.consecutive >= self.n  # steps with one evaluation among them
            return hold if due else None

        return answer


@dataclass(frozen=True)
class SpectrumCadence(Gate):
    """Spectrum's timetable: the gap between computed evaluations grows.

    Computed are the first `warmup` evaluations, at least two, and those from the floor(stop N)-th on, with N the
    evaluations of the run. In between, after r skipped ones in a row, the next is computed where

        (r + 1) mod max(1, floor(W)) = 0,   W = window_size + flex_window * (computed evaluations since the warm-up)

    Source: stable-diffusion.cpp, commit 97d29908; defaults are its. It takes N = steps whatever the sampler, so that of
    Heun's run it stops after `stop / 2`; here N is 2 steps then. stop = 0 does not stop at all, which is published so.
    """

    window_size: float = 2
    flex_window: float = 0.5
    warmup: int = 4
    stop: float = 0.9

    def __post_init__(self) -> None:
        number("window_size", self.window_size, low=1)
        number("flex_window", self.flex_window)
        number("warmup", self.warmup, whole=True)
        number("stop", self.stop, high=1.0)

    def begin(self, run: RunInfo) -> Answer:
        if run.asked is None and self.stop:
            run.warnings.append(f"stop={self.stop:g} cannot act: {UNKNOWN_SCHEDULE}")
        stop = 0 if run.asked is None else _share(self.stop, run.asked)
        warming, stopped, due = ComputeReason("warm-up"), ComputeReason("after stop"), ComputeReason("cadence")

        def answer(position: Position, counts: SkipCounts) -> ComputeReason | None:
            asked = counts.computed + counts.skipped
            if asked < self.warmup or counts.computed < 2:
                return warming
            if 0 < stop <= asked:
                return stopped
            window = math.floor(self.window_size + self.flex_window * (counts.computed - self.warmup))
            return None if (counts.consecutive + 1) % max(1, window) else due

        return answer
