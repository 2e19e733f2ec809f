"""The runs of one wrapper that are in progress at the same time, and which of them a call belongs to."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Generic, TypeVar

from stepcache.extend import Caller, caller

R = TypeVar("R")

AMBIGUOUS = (
    "{} runs of this wrapper are in progress in one thread, and it is not known which of them this call belongs to: "
    "call what run() gives, `with model.run(sigmas) as run: run(x, sigma)`"
)
OUTSIDE = (
    "a run of this wrapper is in progress, but it was begun in another thread, asyncio task or generator, and this "
    "call is not part of it. If it should be, call what run() gives: `with model.run(sigmas) as run: run(x, sigma)`"
)

GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True, eq=False)
class OpenRun(Generic[R]):
    """A run in progress: whose it is, and the function that began it.

    Attributes:
        run: the run.
        slot: which of the runs in progress it is, from 1; the lowest that is free.
        caller: the thread or task that began it.
        frame: identifies the frame of the function that began it, without keeping it alive.
        code: that function's code.
        in_generator: whether that function is a generator.
    """

    run: R
    slot: int
    caller: Caller
    frame: int
    code: CodeType
    in_generator: bool


class OpenRuns(Generic[R]):
    """The runs of one wrapper that have begun and not ended. A copy has none.

    A call belongs to the run that was begun in the same thread or asyncio task. Generators share their thread: there,
    and if one run is begun inside another, it belongs to the run whose function is being executed.
    """

    def __init__(self) -> None:
        self._open: list[OpenRun[R]] = []
        self._lock = threading.Lock()

    def begin(self, run: R, *own: str) -> OpenRun[R]:
        """Adds a run. `own` are the modules whose frames are not those of the user's function."""
        frame = _beginning(sys._getframe(1), own)
        in_generator = bool(frame.f_code.co_flags & GENERATOR)
        with self._lock:
            slot = min({*range(1, len(self._open) + 2)} - {one.slot for one in self._open})
            opened = OpenRun(run, slot, caller(), id(frame), frame.f_code, in_generator)
            self._open = [*self._open, opened]
        return opened

    def end(self, opened: OpenRun[R]) -> None:
        with self._lock:
            self._open = [one for one in self._open if one is not opened]

    def __bool__(self) -> bool:
        return bool(self._open)

    def here(self) -> R | None:
        """The run that the calling code is part of; None if there is none.

        Raises:
            RuntimeError: there are several that it may be part of.
        """
        if not self._open:
            return None
        who = caller()
        mine = [one for one in self._open if one.caller is who]
        if len(mine) == 1 and not mine[0].in_generator:
            return mine[0].run
        if not mine:
            return None
        running = {(id(frame), frame.f_code) for frame in _stack(sys._getframe(1))}
        inside = [one for one in mine if (one.frame, one.code) in running]
        # A function that began a run and has returned: the run goes on. A generator that is not running: it waits.
        returned = [one for one in mine if one not in inside and not one.in_generator]
        if returned and len(returned) + len(inside) > 1:
            raise RuntimeError(AMBIGUOUS.format(len(returned) + len(inside)))
        return (inside or returned)[-1].run if inside or returned else None

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]


def _beginning(frame: FrameType, own: tuple[str, ...]) -> FrameType:
    """The user's function that began a run: behind the wrapper's own frames, and those of `contextlib`."""
    for current in _stack(frame):
        called_by = current.f_back
        in_context_manager = (
            current.f_code.co_flags & GENERATOR and called_by is not None and _module(called_by) == "contextlib"
        )
        if _module(current) not in (*own, "contextlib") and not in_context_manager:
            return current
    return frame


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
