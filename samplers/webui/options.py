"""The settings of a job, and the method that they describe."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from stepcache import METHODS, Method, OptionError, StepMask
from stepcache import method as make_method
from stepcache.extend import PRESETS, flag, main_number, number, unknown


@dataclass(frozen=True)
class Options:
    """The settings that the panel, the API and the XYZ plot make. The API passes them by position, in this order.

    Attributes:
        enabled: False: the extension does nothing.
        method: a name in `stepcache.METHODS`.
        number: the method's main number (`main_number`). Empty: its default.
        window: `start-end`, shares of the run from 0 to 1 (EasyCache: of the training timetable). Empty: the method's.
        mask: a preset's name, or one digit per step: 1 computes, 0 may be skipped. Empty: no mask.
        policy: on the zeros of the mask, "dynamic" asks the method and "static" skips.
        hires: the second pass of hires. fix is cached too.
        warmup: how many steps are computed at the start of a run. 0: the method's default.
        max_consecutive: how many evaluations may be skipped in a row. -1: no limit.
        text: more options of the method, as `key=value,key=value`. They override the fields above.
        table: writes a row for each evaluation to the console.
        negative_only: the method's `skip="uncond"`, for samplers that add noise. The prompt is computed at every
            evaluation. Skipped evaluations predict the other branches from it: the negative prompt, and the second
            and later prompts of AND.

    Example:
        >>> Options.of([True, "ucache", 0.5]).as_method().criterion.threshold
        0.5
    """

    enabled: bool = False
    method: str = "forecast"
    number: str | float = ""
    window: str = ""
    mask: str = ""
    policy: str = "dynamic"
    hires: bool = True
    warmup: int = 0
    max_consecutive: int = -1
    text: str = ""
    table: bool = False
    negative_only: bool = False

    @classmethod
    def of(cls, arguments: Sequence[Any], **changes: Any) -> Options:
        """Options from a script's positional arguments. Missing arguments, and None, are the defaults.

        Raises OptionError if there are too many arguments.
        """
        names = [field.name for field in fields(cls)]
        if len(arguments) > len(names):
            raise OptionError(f"{len(arguments)} arguments: accepted are {len(names)}: {', '.join(names)}")
        given = {name: value for name, value in zip(names, arguments, strict=False) if value is not None}
        return cls(**{**given, **changes})

    def as_method(self) -> Method:
        """The method with these options. Raises OptionError with the option, its value and what is accepted."""
        name = as_text(self.method).lower()
        if name not in METHODS:
            raise unknown("method", name, METHODS)
        for option in ("hires", "table"):
            flag(option, getattr(self, option))
        chosen: dict[str, Any] = {}
        if as_text(self.number):
            main = main_number(name)
            if main is None:
                raise OptionError(f"number={self.number!r}: {name} takes no number; leave it empty")
            chosen[main[0]] = _as_number(main[0], self.number, whole=isinstance(main[1], int))
        if as_text(self.window):
            chosen["start"], chosen["end"] = _as_window(as_text(self.window))
        if self.masked:
            chosen["mask"] = StepMask(as_text(self.mask), as_text(self.policy).lower())
        elif name == "static":
            raise OptionError(f"static needs a mask: one digit per step, or a preset ({', '.join(PRESETS)})")
        if warmup := number("warmup", self.warmup, whole=True):
            chosen["warmup"] = warmup
        if (most := number("max_consecutive", self.max_consecutive, low=-1, whole=True)) >= 0:
            chosen["max_consecutive"] = most
        if flag("negative_only", self.negative_only):
            chosen["skip"] = "uncond"
        text = as_text(self.text)
        for key in (part.partition("=")[0].strip() for part in text.split(",")):
            chosen.pop(key, None)
        return make_method(name, text, **chosen)

    @property
    def masked(self) -> bool:
        """Whether a mask is set."""
        return as_text(self.mask).lower() not in ("", "none")


def default_window(name: str) -> str:
    """A method's default window, as it is written in the panel.

    Example:
        >>> default_window("ucache")
        '0.15-0.95'
    """
    parameters = inspect.signature(METHODS[name]).parameters
    start, end = (
        f"{parameters[key].default:g}" if key in parameters else share for key, share in (("start", "0"), ("end", "1"))
    )
    return f"{start}-{end}"


def as_text(value: Any) -> str:
    """A setting as text: whole floats without a point, no space around.

    Example:
        >>> as_text(2.0), as_text(" fast ")
        ('2', 'fast')
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _as_number(name: str, given: Any, whole: bool) -> float:
    try:
        return number(name, float(as_text(given)), low=-math.inf, whole=whole)
    except (OptionError, ValueError):
        raise OptionError(f"{name}={as_text(given)!r}: accepted is a {'whole ' if whole else ''}number") from None


def _as_window(text: str) -> tuple[float, float]:
    found = re.fullmatch(r"(\d*\.?\d+)\s*[-:]\s*(\d*\.?\d+)", text)
    if found is None:
        raise OptionError(f"window={text!r}: accepted are two shares from 0 to 1, like 0.15-0.95")
    return float(found[1]), float(found[2])
