"""Which pipeline is calling a denoiser: read from the call stack, because nothing else knows it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import nn

Key = tuple[int, CodeType]
"""Says which frame is meant without keeping it, and the tensors in it, alive."""


@dataclass(frozen=True)
class Caller:
    """The pipeline that a call comes from.

    Attributes:
        pipe: the pipeline.
        nearest: its innermost frame, which may have the progress bar.
        run: the frame of its run: of its `__call__`, or of its outermost function.
        in_callback: the run has called the user's callback, which calls the denoiser for purposes of its own.
    """

    pipe: Any
    nearest: FrameType
    run: Key
    in_callback: bool


def find_caller(frame: FrameType | None) -> Caller | None:
    """The innermost pipeline among the callers of a frame; None without one.

    A pipeline's frame is that of a function whose first argument, whatever its name, has a scheduler.
    """
    nearest = run = called = pipe = None
    below = frame
    for current in stack(frame):
        owner = _pipeline(current)
        if owner is not None:
            nearest = nearest or current
            pipe, run, called = owner, current, below
            if current.f_code.co_name == "__call__":
                break
        below = current
    if run is None or nearest is None or called is None:
        return None
    return Caller(pipe, nearest, key(run), _is_callback(run, called))


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers, from the inside out."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def key(frame: FrameType) -> Key:
    return id(frame), frame.f_code


def is_running(run: Key, frame: FrameType | None) -> bool:
    """Whether a run's frame is among the callers of a frame."""
    return any(key(current) == run for current in stack(frame))


def _pipeline(frame: FrameType) -> Any | None:
    """The pipeline that a frame is a function of, if it is one."""
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(owner, nn.Module) or not hasattr(getattr(owner, "scheduler", None), "timesteps"):
        return None
    return owner


def _is_callback(run: FrameType, called: FrameType) -> bool:
    """Whether what a run has called is the callback that it was given."""
    given = (run.f_locals.get(name) for name in ("callback_on_step_end", "callback"))
    return any(_code(callback) is called.f_code for callback in given if callback is not None)


def _code(callback: Any) -> CodeType | None:
    """The code that runs first if this is called."""
    while isinstance(callback, functools.partial):
        callback = callback.func
    code = getattr(callback, "__code__", None)
    return code if code is not None else getattr(type(callback).__call__, "__code__", None)
