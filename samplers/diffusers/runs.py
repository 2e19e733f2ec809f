"""Which run of a pipeline is in progress, and where in it a call is: read from its scheduler."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .schedule import Place, plan

Begin = Callable[[list[float], int], None]


class PipelineRuns:
    """Follows a pipeline's runs by its scheduler, whose `set_timesteps` begins each of them.

    Args:
        pipe: the pipeline.
        on_begin: called with the schedule and the evaluations of a step when a run begins.
        one_run: only the run that the scheduler has been set for now is followed.
    """

    def __init__(self, pipe: Any, on_begin: Begin, one_run: bool = False) -> None:
        self.pipe, self.one_run = pipe, one_run
        self._on_begin = on_begin
        self._timesteps = pipe.scheduler.timesteps if one_run else None
        self._plan: list[Place] = []
        self._first, self._at = 0, None
        self._shown = 0, 0

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    @property
    def over(self) -> bool:
        """Whether the one run this was for has ended unsaid (an exception, an interrupt) and another has begun."""
        return self.one_run and self.scheduler.timesteps is not self._timesteps

    @property
    def at_last(self) -> bool:
        """Whether the last call located was at the run's last evaluation."""
        return self._at == len(self._plan) - 1

    def caller(self) -> types.FrameType | None:
        """The frame of the pipeline that is calling, if there is one: the nearest whose `self` has a scheduler."""
        frame = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if not isinstance(owner, nn.Module) and hasattr(getattr(owner, "scheduler", None), "timesteps"):
                return frame
            frame = frame.f_back
        return None

    def serves(self, caller: types.FrameType | None) -> bool:
        """Whether a call is of this pipeline, and not of another one with a scheduler of its own."""
        return caller is None or caller.f_locals["self"].scheduler is self.scheduler

    def show(self, caller: types.FrameType | None, skipped: bool) -> None:
        """Counts an evaluation on the progress bar of the calling pipeline, if it has one."""
        self._shown = self._shown[0] + skipped, self._shown[1] + 1
        bar = caller.f_locals.get("progress_bar") if caller is not None else None
        if hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str("skipped {}/{}".format(*self._shown), refresh=False)

    def begin(self, first: int) -> None:
        """Another run: its plan, from the scheduler as it has just been set, beginning at `first` of its timesteps."""
        self._plan = plan(self.scheduler, first)
        self._first, self._at, self._shown = first, None, (0, 0)
        ahead = self._plan[first:]
        schedule = [*(sigma for sigma, _, stage in ahead if stage == 0), 0.0]
        if getattr(self.pipe, "denoising_end", None) is not None:  # SDXL's base model leaves the rest to the refiner
            calls = self.pipe.num_timesteps
            schedule = schedule[: sum(stage == 0 for *_, stage in ahead[:calls]) + 1]
        twice = 2 * sum(stage > 0 for *_, stage in ahead) >= len(ahead) - 1 > 0  # not PNDM, whose first step alone is
        self._on_begin(schedule, 2 if twice else 1)

    def locate(self, timestep: Tensor | float | None, again: bool) -> Place | None:
        """The place of a call; None if the scheduler cannot say. `again`: this call was already made here."""
        scheduler = self.scheduler
        if scheduler.timesteps is not self._timesteps:
            if self.one_run:
                return None
            self._timesteps, self._at = scheduler.timesteps, None
            self.begin(self.beginning(timestep))
        self._at = self._index(timestep, self._first if self._at is None else self._at + again)
        return self._plan[self._at] if self._at is not None and self._at < len(self._plan) else None

    def beginning(self, timestep: Tensor | float | None) -> int:
        """The index of a run's first timestep; among equal ones (PRK) the pipeline's own count decides."""
        first = self._index(timestep, 0) or 0
        timesteps = self.scheduler.timesteps
        counted = len(timesteps) - (getattr(self.pipe, "num_timesteps", None) or len(timesteps))
        return counted if counted > first and timesteps[counted] == timesteps[first] else first

    def _index(self, timestep: Tensor | float | None, cursor: int) -> int | None:
        """The evaluation's number in the scheduler's timesteps: by its own count, or else by the timestep's value."""
        scheduler = self.scheduler
        if not hasattr(scheduler, "step_index"):
            following = self._by_value(timestep, cursor)
            return self._by_value(timestep, self._at) if following is None and self._at is not None else following
        if scheduler.step_index is not None:
            return scheduler.step_index
        if self._at is None:
            return getattr(scheduler, "begin_index", None) or 0
        # The first step is not over, or the pipeline steps a copy of its scheduler and this one never counts.
        following = self._by_value(timestep, self._at + 1)
        return following if following == self._at + 1 else self._at

    def _by_value(self, timestep: Tensor | float | None, cursor: int) -> int | None:
        if timestep is None:
            return None
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        timesteps = self.scheduler.timesteps.tolist()
        return next((k for k in range(cursor, len(timesteps)) if math.isclose(timesteps[k], value, rel_tol=1e-5)), None)
