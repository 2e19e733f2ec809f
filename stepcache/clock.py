"""The place of an evaluation: which run, which step of the schedule, which evaluation of that step.

Known from three sources, the surest first: the host's announcement (which schedule this run follows, how many
evaluations a step has), the sampler's callback (which names the step just begun), and the sigmas themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import OptionError, shown

CHURN = 2**0.5
"""k-diffusion's `s_churn` raises sigma by at most this factor (gamma <= sqrt(2) - 1)."""

RISE = 1.5
"""Without a schedule, sigma rising by more than this factor begins a new run: more than churn can do.

A Restart interval may do it too; that costs the evaluations that refill the cache. A missed run costs the image."""

SAME = 1e-5
"""Sigmas that differ by less than this share are one; by more where their dtype is coarser."""


@dataclass
class Position:
    """The place of one evaluation. Counts start at 0.

    `step` is None if it is not known: no schedule was given, or this sigma does not fit it. `stage` counts the
    evaluations of one step (Heun, DPM2 and DPM++ 2S have two). `sigma` is the schedule's value if it matches one.
    `mixed`: the rows of the batch have different sigmas, so that there is no one place; `sigma` is the highest.
    """

    run: int
    evaluation: int
    sigma: float
    step: int | None = None
    stage: int = 0
    mixed: bool = False


def as_schedule(sigmas: Tensor | Iterable[float] | None) -> tuple[float, ...] | None:
    """A schedule as floats: sigmas[0] to sigmas[n], n steps. Raises OptionError if it cannot be one."""
    if sigmas is None:
        return None
    try:
        given = sigmas.detach().float().flatten().tolist() if isinstance(sigmas, Tensor) else [float(s) for s in sigmas]
        values = tuple(torch.tensor(given, dtype=torch.float32).tolist())
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        values = ()
    if len(values) < 2 or any(not s >= 0 or s == float("inf") for s in values):
        raise OptionError(
            f"sigmas must be two or more finite numbers >= 0, highest first, as samplers take them; got {shown(sigmas)}"
        )
    return values


class Clock:
    """Follows the evaluations of one model and finds the place of each.

    `sigmas` is the schedule of runs that the host does not announce; None means unknown. `lowest` is the
    lowest sigma that a run reaches, 0 if that is not known: a run without a schedule is complete there.

    Example:
        >>> import torch
        >>> from stepcache.extend import Clock
        >>> clock = Clock([4.0, 2.0, 1.0, 0.0])
        >>> [clock.locate(torch.tensor(sigma)).step for sigma in (4.0, 2.0, 1.0)]
        [0, 1, 2]
    """

    def __init__(self, sigmas: Tensor | Iterable[float] | None = None, lowest: float = 0.0) -> None:
        self._default = as_schedule(sigmas)
        self.lowest = lowest * (1 + 1e-4)
        self.schedule = self._default
        self.stages: int | None = None
        self.announced = False
        self._loops = True
        self._run = -1
        self._last: Position | None = None
        self._first_sigma = 0.0
        self._corrector = False
        self._pairs = True
        self._follows_schedule = False
        self._on_schedule = False
        self._single = False
        self._noted_at: int | None = None

    def fork(self) -> Clock:
        """A clock for a run at the same time. It has the number that the next run here would have had."""
        other = copy(self)
        other.end()
        self._run += 1
        return other

    @property
    def steps(self) -> int | None:
        return None if self.schedule is None else len(self.schedule) - 1

    def announce(
        self,
        sigmas: Tensor | Iterable[float] | None = None,
        stages: int | None = None,
        on_schedule: bool | None = None,
        loops: bool = True,
    ) -> None:
        """The host announces a run, which then lasts until `end`.

        `stages` is the number of evaluations a step has (1 or 2; the last step, which ends at sigma 0, has one).
        `on_schedule`: every evaluation is at a sigma of the schedule, the second of two at the step's end as Heun's
        is; None means so if `stages` is 1. Evaluations on an accelerator are then counted instead of
        read: no wait for the device. `loops` says that the sampler may loop over the schedule again before `end`, which
        begins another run: after the last step, or at the first sigma if a loop was broken off. Without `loops`,
        whatever comes until `end` belongs to this run. Sigmas that are counted instead of read do not show that a loop
        was broken off: announce each of them then.
        """
        if stages not in (None, 1, 2):
            raise OptionError(f"stages={shown(stages)}: accepted are 1, 2 and None (not known)")
        self.restart()
        self.schedule = as_schedule(sigmas) if sigmas is not None else self._default
        self.stages, self.announced, self._follows_schedule, self._loops = stages, True, True, loops
        self._on_schedule = stages == 1 if on_schedule is None else on_schedule

    def end(self) -> None:
        """The announced run is over."""
        self.restart()
        self.schedule, self.stages, self.announced = self._default, None, False

    def restart(self) -> None:
        """Whatever comes next begins a run; its place in the schedule must be read from its sigma."""
        self._last, self._corrector, self._follows_schedule = None, False, False
        self._noted_at, self._single = None, False

    def locate(self, sigma: Tensor) -> Position:
        """The place of the evaluation that the sampler asks for at `sigma` (any shape)."""
        due, mixed, schedule = self._due(), False, self.schedule
        place: tuple[int | None, int]
        if schedule is not None and due is not None and self._on_schedule and sigma.device.type != "cpu":
            value, place = schedule[sum(due)], due
        else:
            value, tolerance, mixed = _read(sigma)
            if self._last is not None and self._is_new_loop(self._last, value, tolerance):
                self.restart()
                self._follows_schedule = self.announced  # it begins with the first evaluation
                due = self._due()
            value, place = (value, (None, 0)) if mixed else self._place(value, tolerance, due)

        return self._next(value, place, mixed)

    def advance(self, sigma: float, step: int, stage: int = 0) -> Position:
        """The place of the next evaluation if the host keeps count itself; nothing is read."""
        return self._next(sigma, (step, stage))

    def _next(self, sigma: float, place: tuple[int | None, int], mixed: bool = False) -> Position:
        if self._last is None:
            self._run, self._first_sigma, self._pairs, evaluation = self._run + 1, sigma, True, 0
        else:
            evaluation = self._last.evaluation + 1
            self._pairs = self._pairs and (evaluation % 2 == 1 or sigma >= self._last.sigma * (1 - SAME))
        self._last = Position(self._run, evaluation, sigma, *place, mixed)
        return self._last

    def set_step(self, step: int) -> None:
        """The sampler's callback names the step whose first evaluation came last."""
        if self._last is not None and 0 <= step < (step + 1 if self.steps is None else self.steps):
            # Two steps begun by two evaluations in a row: this sampler has one a step.
            self._single = self._single or self._noted_at == self._last.evaluation - 1
            self._last.step, self._last.stage, self._noted_at = step, 0, self._last.evaluation

    def is_last(self, position: Position) -> bool:
        """Whether this is the run's final step, as far as is known."""
        return self.steps is not None and position.step == self.steps - 1

    def one_evaluation(self, position: Position) -> bool:
        """Whether an announced run has no second evaluation at this sigma, nor another run its first one."""
        if not self.announced or self.stages != 1 or self.schedule is None or position.step is None:
            return False
        return not self.is_last(position) and not near(self.schedule[position.step + 1], position.sigma)

    def _is_new_loop(self, last: Position, value: float, tolerance: float) -> bool:
        """Whether another sampling loop has begun: in an announced run, only on its schedule.

        There it begins after the last step, or at the first sigma if the loop before was broken off.
        """
        if self.announced:
            schedule = self.schedule
            if not self._loops or schedule is None:
                return False
            if not self.is_last(last):
                return self._is_back_at_start(last, schedule, value, tolerance)
            if schedule[-1] > 0 or not any(near(value, sigma, tolerance) for sigma in schedule):
                return False
        return self._is_new_run(last, value, tolerance)

    def _is_back_at_start(self, last: Position, schedule: tuple[float, ...], value: float, tolerance: float) -> bool:
        """Whether the schedule's first sigma comes again, though another one is due."""
        if last.step is None or not near(value, schedule[0], tolerance):
            return False
        return not any(near(value, sigma, tolerance) for sigma in (schedule[last.step + 1], last.sigma))

    def _due(self) -> tuple[int, int] | None:
        if not self._follows_schedule or self.stages is None or self.schedule is None:
            return None
        if self._last is None:
            return 0, 0
        step, stage = self._last.step, self._last.stage
        if step is None:
            return None
        if stage + 1 < self.stages and self.schedule[step + 1] > 0:
            return step, stage + 1
        return (step + 1, 0) if step + 2 < len(self.schedule) else None

    def _is_new_run(self, last: Position, value: float, tolerance: float) -> bool:
        schedule = self.schedule
        has_fallen = last.sigma < self._first_sigma or last.evaluation == 0
        again = has_fallen and value >= self._first_sigma * (1 - tolerance)
        if schedule is None or last.step is None:
            return (
                again
                or value > last.sigma * RISE
                or (schedule is None and self._breaks_the_fall(last, value, tolerance))
            )
        following = schedule[last.step + 1]
        if near(value, following, tolerance):
            return False
        if near(value, last.sigma, tolerance) and last.step > 0 and last.stage == 0:
            return not self._may_correct(last)
        if self.is_last(last) and schedule[-1] == 0:
            return True  # nothing follows the last step
        if value < following:
            return True  # a step was left out: this is another schedule, or the loop was broken off
        off = not any(near(value, sigma, tolerance) for sigma in schedule)
        starts_again = again or near(value, schedule[0], tolerance) or value > schedule[0] * CHURN
        return starts_again or (off and value > last.sigma * RISE) or (self.is_last(last) and value > last.sigma)

    def _may_correct(self, last: Position) -> bool:
        """Whether an evaluation that was taken for a step's first may have been Heun's first corrector.

        That is the second evaluation of its run; the later ones are known by it.
        """
        return not self._corrector and last.evaluation == 1

    def _breaks_the_fall(self, last: Position, value: float, tolerance: float) -> bool:
        """Without a schedule, whether sigma does not fall though it would in this run, or its lowest was reached.

        Within a run sigma stays, or rises by churn, between Heun's corrector and the next step: always at every second
        evaluation. A change of churn within the run looks like a new one and costs the evaluations that refill the
        cache.
        """
        rises = value >= last.sigma * (1 - tolerance)
        corrected = last.evaluation % 2 == 1 and self._pairs
        return (rises or last.sigma <= self.lowest) and not (rises and corrected)

    def _place(
        self, value: float, tolerance: float, due: tuple[int, int] | None
    ) -> tuple[float, tuple[int | None, int]]:
        """The sigma, snapped to the schedule, with its step and stage."""
        schedule, last = self.schedule, self._last
        if schedule is None:
            if last is not None and self._noted_at is not None:
                return value, (last.step, last.stage + 1)
            return value, (None, 0)
        if due is not None:
            step, stage = due
            low, high = (schedule[step], schedule[step]) if stage == 0 else sorted(schedule[step : step + 2])
            if low * (1 - tolerance) <= value <= high * CHURN * (1 + tolerance):
                return _snapped(schedule, value, step, tolerance), due
        if last is None or last.step is None:
            return self._entry(schedule, value, tolerance)

        step, stage = last.step, last.stage
        following = schedule[step + 1]
        if near(value, following, tolerance):
            corrector = step + 1 == self.steps or (self._corrector and stage == 0)
            return following, ((step, 1) if corrector else (step + 1, 0))
        if near(value, last.sigma, tolerance) and stage == 0 and step > 0:
            # The same sigma twice in a row: the evaluation before this was Heun's corrector, of the step before.
            last.step, last.stage, self._corrector = step - 1, 1, True
            return last.sigma, (step, 0)
        if stage == 0 and following < value < schedule[step]:
            return value, ((step + 1, 0) if self._single else (step, 1))
        return self._entry(schedule, value, tolerance)

    def _entry(
        self, schedule: tuple[float, ...], value: float, tolerance: float
    ) -> tuple[float, tuple[int | None, int]]:
        """A place found from sigma alone: only an exact match with the schedule counts, or churn on its first sigma."""
        found = [(abs(value - s), k) for k, s in enumerate(schedule[:-1]) if near(value, s, tolerance)]
        if found:
            after = -1 if self._last is None or self._last.step is None else self._last.step
            step = min(found, key=lambda one: (one[1] <= after, one))[1]
            return schedule[step], (step, 0)
        if self._last is None and schedule[0] < value <= schedule[0] * CHURN * (1 + tolerance):
            return value, (0, 0)
        return value, (None, 0)


def same_sigma(a: Tensor, b: Tensor) -> bool:
    """Whether two calls have the same sigma; the very same tensor needs no look at its values."""
    if a is b:
        return True
    if a.shape != b.shape or a.device != b.device:
        return float(a.flatten()[0]) == float(b.flatten()[0])
    return torch.equal(a, b)


def near(a: float, b: float, tolerance: float = SAME) -> bool:
    """Whether two sigmas above 0 are one, up to the relative tolerance."""
    return abs(a - b) <= tolerance * max(a, b) and b > 0


def _snapped(schedule: tuple[float, ...], value: float, step: int, tolerance: float) -> float:
    """The step's own sigma, or the next one's, if the value is near one of them; else the value."""
    return next((sigma for sigma in schedule[step : step + 2] if near(value, sigma, tolerance)), value)


def _read(sigma: Tensor) -> tuple[float, float, bool]:
    """The highest sigma as a float32 number, the relative tolerance its dtype asks for, and whether they differ."""
    values = sigma.detach().flatten()
    low, high = torch.stack(values.aminmax()).tolist() if values.numel() > 1 else [values.item()] * 2
    digits = torch.finfo(sigma.dtype).eps if sigma.dtype.is_floating_point else 0.0
    return high, max(digits, SAME), low != high
