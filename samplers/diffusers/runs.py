"""Which run of a pipeline is in progress, and where in it a call is: read from its scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor

from .frames import Caller, Key, find_caller, is_running
from .schedule import Place, places

Begin = Callable[[list[float], int], None]


class PipelineRuns:
    """Follows a pipeline's runs by one of its schedulers, whose `set_timesteps` begins each of them.

    Args:
        pipe: the pipeline.
        scheduler_name: the pipeline's attribute with the scheduler.
        on_begin: called with the schedule and the evaluations of a step when a run begins.
        only: the frame of the one run that is followed, in the middle of which this begins. None: all runs are.
    """

    def __init__(self, pipe: Any, scheduler_name: str, on_begin: Begin, only: Key | None = None) -> None:
        self.pipe, self.only = pipe, only
        self._scheduler_name, self._on_begin = scheduler_name, on_begin
        self._frame: Key | None = only
        self._set: Tensor | None = None  # the scheduler's timesteps as this run has set them
        self._others: Tensor | None = None  # as a run inside this one has set them
        self._timesteps: list[float] = []
        self._places: list[Place] = []
        self._first = 0
        self._at: int | None = None
        self._joined = False  # the first evaluation is over, and was not seen
        self._shown = 0, 0

    @property
    def scheduler(self) -> Any:
        return getattr(self.pipe, self._scheduler_name)

    @property
    def first(self) -> Place:
        """The place of the run's first evaluation."""
        return self._places[self._first]

    @property
    def at_last(self) -> bool:
        """Whether the last call located was at the run's last evaluation."""
        return self._at == len(self._places) - 1

    def in_progress(self, frame: FrameType | None) -> bool:
        """Whether the run that was last seen is among the callers of a frame.

        A frame may have the id of one that has ended. A run that was joined, and may have been broken off, is therefore
        known by its timesteps, too: every run sets new ones.
        """
        if self._frame is None or not is_running(self._frame, frame):
            return False
        if self.only is None or (caller := find_caller(frame)) is None or caller.run != self.only:
            return True
        return any(self.scheduler.timesteps is known for known in (self._set, self._others))

    def serves(self, caller: Caller | None, frame: FrameType | None) -> bool:
        """Whether a call, made in `frame`, is one of a run that is followed.

        Calls of another pipeline with a scheduler of its own are not, nor those that a callback makes for itself or in
        a run inside this one; nor direct calls after a pipeline's run, unless the scheduler was set anew for them.
        """
        if caller is None:
            anew = self.scheduler.timesteps is not self._set
            return self.in_progress(frame) if self.only else self._frame is None or anew
        ours = caller.pipe is self.pipe or getattr(caller.pipe, "scheduler", None) is self.scheduler
        if caller.in_callback or not ours:
            return False
        if self._frame is not None and caller.run != self._frame and self.in_progress(frame):
            self._others = self.scheduler.timesteps
            return False
        return self.only in (None, caller.run)

    def show(self, caller: Caller | None, skipped: bool) -> None:
        """Counts an evaluation on the progress bar of the calling pipeline, if it has one."""
        self._shown = self._shown[0] + skipped, self._shown[1] + 1
        bar = caller.nearest.f_locals.get("progress_bar") if caller is not None else None
        if bar is not None and hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str("skipped {}/{}".format(*self._shown), refresh=False)

    def join(self, timestep: Tensor | float) -> None:
        """Follows the run in progress from its second evaluation on; the first was at this timestep."""
        self._take()
        begin_index = getattr(self.scheduler, "begin_index", None)
        self._announce(self._by_value(timestep, 0) or 0 if begin_index is None else begin_index)
        self._at, self._joined, self._shown = self._first, True, (0, 1)

    def forget(self) -> None:
        """The run is over: the next call begins another, even if the scheduler is not set anew."""
        self._set = self._others = self._at = None
        self._frame = self.only

    def locate(self, caller: Caller | None, timestep: Tensor | float | None, again: bool) -> Place | None:
        """The place of a call; None if the scheduler cannot say. `again`: this call was already made here."""
        timesteps = self.scheduler.timesteps
        if timesteps is not self._set and timesteps is not self._others:
            self._begin(timestep)
        self._frame = self.only or (None if caller is None else caller.run)
        index = self._index(timestep, again)
        if index is not None and self._at is not None and index < self._at:
            self._begin(timestep)  # the same timesteps once more, as a loop of the user's own may have them
            index = self._index(timestep, again=False)
        if index is None or index >= len(self._places):
            return None
        self._at, self._joined = index, False
        return self._places[index]

    def _begin(self, timestep: Tensor | float | None) -> None:
        """Another run, whose first evaluation is at this timestep."""
        self._take()
        self._announce(self._index(timestep, again=False) or 0)

    def _take(self) -> None:
        """Takes the scheduler's timesteps, as they have just been set."""
        timesteps = self.scheduler.timesteps
        self._set, self._others, self._timesteps = timesteps, None, timesteps.tolist()
        self._first, self._at, self._joined = 0, None, False

    def _announce(self, first: int) -> None:
        """Places the run that begins at `first` of the timesteps. Among equal ones (PRK) the pipeline counts."""
        timesteps = self._timesteps
        counted = len(timesteps) - (getattr(self.pipe, "num_timesteps", None) or len(timesteps))
        if counted > first and timesteps[counted] == timesteps[first]:
            first = counted
        self._places = places(self.scheduler, first)
        self._first, self._shown = first, (0, 0)
        ahead = self._places[first:]
        schedule = [*(sigma for sigma, _, stage in ahead if stage == 0), 0.0]
        if getattr(self.pipe, "denoising_end", None) is not None:  # SDXL's base model leaves the rest to the refiner
            calls = self.pipe.num_timesteps
            schedule = schedule[: sum(stage == 0 for *_, stage in ahead[:calls]) + 1]
        twice = 2 * sum(stage > 0 for *_, stage in ahead) >= len(ahead) - 1 > 0  # not in PNDM's first step alone
        self._on_begin(schedule, 2 if twice else 1)

    def _index(self, timestep: Tensor | float | None, again: bool) -> int | None:
        """The evaluation's number in the timesteps: by the scheduler's own count, or else by the timestep's value.

        A number below the last one says that the timesteps have begun once more.
        """
        scheduler = self.scheduler
        if not hasattr(scheduler, "step_index") or scheduler.timesteps is not self._set:
            cursor = self._first if self._at is None else self._at + (again or self._joined)
            return self._found(timestep, cursor)
        if scheduler.step_index is not None:
            return scheduler.step_index
        if self._at is None:
            return getattr(scheduler, "begin_index", None) or 0
        # The first step is not over, or the pipeline steps a copy of its scheduler and this one never counts.
        found = self._found(timestep, self._at + 1)
        return self._at if found is None or found > self._at + 1 else found

    def _found(self, timestep: Tensor | float | None, cursor: int) -> int | None:
        """The first such timestep from `cursor` on; else the one that was last, else the first of all."""
        starts = (cursor, self._at or 0, 0)
        return next((k for start in starts if (k := self._by_value(timestep, start)) is not None), None)

    def _by_value(self, timestep: Tensor | float | None, start: int) -> int | None:
        if timestep is None:
            return None
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        numbered = enumerate(self._timesteps[start:], start)
        return next((k for k, known in numbered if math.isclose(known, value, rel_tol=1e-5)), None)
