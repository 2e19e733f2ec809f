"""The settings of a job, and the method that they describe."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from stepcache import METHODS, Method, OptionError, StepMask
from stepcache import method as make_method
from stepcache.extend import PRESETS, flag, main_number, number, unknown

from ..k_diffusion import NEGATIVE_ONLY_SAMPLERS

SPEEDS = {"2x": 2, "3x": 3, "4x": 4}
"""The speeds that need no further choice, and Forecast's interval for each."""

CUSTOM = "custom"
"""The speed at which method and number act."""

AUTOMATIC, WHOLE_STEPS, NEGATIVE_ONLY = SKIPS = ("automatic", "whole steps", "negative prompt only")
"""What a skipped step leaves out."""


@dataclass(frozen=True)
class Options:
    """The settings that the panel, the API and the XYZ plot make. The API passes them by position, in this order.

    Attributes:
        enabled: False: the extension does nothing.
        speed: a key of `SPEEDS`, which is Forecast with that interval, or "custom". The panel adds a colon and words.
        method: a name in `stepcache.METHODS`. It acts if the speed is custom.
        number: the method's main number (`main_number`). Empty: its default. It acts if the speed is custom.
        skip: what a skipped step leaves out, one of `SKIPS`. "negative prompt only" is the method's `skip="uncond"`:
            the prompt is computed at every evaluation, and the other branches are predicted from it.
        window: `start-end` in per cent of the run (EasyCache: of the training timetable). Empty: the method's.
        warmup: how many steps are computed at the start of a run. Empty: the method's default.
        max_consecutive: how many evaluations may be skipped in a row. Empty: no limit.
        mask: a preset's name, or one digit per step: 1 computes, 0 may be skipped. Empty or "none": no mask.
        policy: on the zeros of the mask, "dynamic" asks the method and "static" skips.
        hires: the second pass of hires. fix is cached too.
        text: more options of the method, as `key=value,key=value`. They override the fields above.
        table: writes a row for each evaluation to the console.

    Example:
        >>> Options.of([True, "3x"]).as_method().name
        'forecast'
        >>> Options.of([True, "custom", "ucache", 0.5]).as_method().criterion.threshold
        0.5
    """

    enabled: bool = False
    speed: str = "2x"
    method: str = "forecast"
    number: str | float = ""
    skip: str = AUTOMATIC
    window: str = ""
    warmup: str | int = ""
    max_consecutive: str | int = ""
    mask: str = ""
    policy: str = "dynamic"
    hires: bool = True
    text: str = ""
    table: bool = False

    @classmethod
    def of(cls, arguments: Sequence[Any], **changes: Any) -> Options:
        """Options from a script's positional arguments. Missing arguments, and None, are the defaults.

        `changes` are those of the XYZ plot. A method or number among them means a custom speed, and a number alone is
        Forecast's if the panel's speed is another. Raises OptionError if there are too many arguments.
        """
        names = [field.name for field in fields(cls)]
        if len(arguments) > len(names):
            raise OptionError(f"{len(arguments)} arguments: accepted are {len(names)}: {', '.join(names)}")
        given = {name: value for name, value in zip(names, arguments, strict=False) if value is not None}
        options = cls(**given)
        if changes.keys() & {"method", "number"} and "speed" not in changes:
            before = options.method if options.chosen_speed == CUSTOM else "forecast"
            same = changes.get("method", before) == before and options.chosen_speed == CUSTOM
            options = replace(options, speed=CUSTOM, method=before, number=options.number if same else "")
        return replace(options, **changes)

    @property
    def chosen_speed(self) -> str:
        """A key of `SPEEDS`, or "custom". Raises OptionError for anything else."""
        speed = as_text(self.speed).partition(":")[0].strip().lower()
        if speed not in (*SPEEDS, CUSTOM):
            raise unknown("speed", speed, (*SPEEDS, CUSTOM))
        return speed

    @property
    def chosen_method(self) -> str:
        """The name of the method: Forecast, unless the speed is custom."""
        if self.chosen_speed != CUSTOM:
            return "forecast"
        name = as_text(self.method).lower()
        if name not in METHODS:
            raise unknown("method", name, METHODS)
        return name

    @property
    def masked(self) -> bool:
        """Whether a mask is set."""
        return as_text(self.mask).lower() not in ("", "none")

    def negative_only(self, sampler: str, guided: bool) -> bool:
        """Whether a skipped step leaves out the negative prompt only. See `as_method`."""
        skip = as_text(self.skip).lower()
        if skip not in SKIPS:
            raise unknown("skip", skip, SKIPS)
        if skip != AUTOMATIC:
            return skip == NEGATIVE_ONLY
        return guided and sampler in NEGATIVE_ONLY_SAMPLERS and self.chosen_method == "forecast"

    def as_method(self, sampler: str = "", guided: bool = True) -> Method:
        """The method with these options. Raises OptionError with the option, its value and what is accepted.

        Args:
            sampler: the name of the host's sampler function, by which "automatic" chooses what is skipped.
            guided: the CFG scale is not 1, so that there is a negative prompt to skip.
        """
        name = self.chosen_method
        for option in ("hires", "table"):
            flag(option, getattr(self, option))
        chosen = self._main_number(name)
        if as_text(self.window):
            chosen["start"], chosen["end"] = _as_window(as_text(self.window))
        if self.masked:
            chosen["mask"] = StepMask(as_text(self.mask), as_text(self.policy).lower())
        elif name == "static":
            raise OptionError(f"static needs a mask: one digit per step, or a preset ({', '.join(PRESETS)})")
        for option in ("warmup", "max_consecutive"):
            if given := as_text(getattr(self, option)):
                chosen[option] = _as_number(option, given, low=0, whole=True)
        if self.negative_only(sampler, guided):
            chosen["skip"] = "uncond"
        text = as_text(self.text)
        for key in (part.partition("=")[0].strip() for part in text.split(",")):
            chosen.pop(key, None)
        return make_method(name, text, **chosen)

    def _main_number(self, name: str) -> dict[str, Any]:
        if self.chosen_speed != CUSTOM:
            return {"interval": SPEEDS[self.chosen_speed]}
        if not as_text(self.number):
            return {}
        main = main_number(name)
        if main is None:
            raise OptionError(f"number={self.number!r}: {name} takes no number; leave it empty")
        return {main[0]: _as_number(main[0], self.number, whole=isinstance(main[1], int))}


def method_default(name: str, option: str) -> float:
    """A method's default for a common option: its own, or 0; 1 for `end`.

    Example:
        >>> method_default("ucache", "start"), method_default("hicache", "warmup"), method_default("forecast", "end")
        (0.15, 2, 1.0)
    """
    parameter = inspect.signature(METHODS[name]).parameters.get(option)
    return float(option == "end") if parameter is None else parameter.default


def default_window(name: str) -> str:
    """A method's default window, as it is written in the panel: per cent of the run.

    Example:
        >>> default_window("ucache")
        '15-95'
    """
    return "-".join(f"{100 * method_default(name, option):g}" for option in ("start", "end"))


def as_text(value: Any) -> str:
    """A setting as text: whole floats without a point, no space around.

    Example:
        >>> as_text(2.0), as_text(" fast ")
        ('2', 'fast')
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _as_number(name: str, given: Any, whole: bool, low: float = -math.inf) -> float:
    try:
        return number(name, float(as_text(given)), low=low, whole=whole)
    except (OptionError, ValueError):
        least = f" of at least {low:g}" if math.isfinite(low) else ""
        kind = "whole number" if whole else "number"
        raise OptionError(f"{name}={as_text(given)!r}: accepted is a {kind}{least}") from None


def _as_window(text: str) -> tuple[float, float]:
    found = re.fullmatch(r"(\d*\.?\d+)\s*%?\s*[-:]\s*(\d*\.?\d+)\s*%?", text)
    if found is None:
        raise OptionError(f"window={text!r}: accepted are two numbers in per cent of the run, like 15-95")
    start, end = float(found[1]), float(found[2])
    if end <= 1:
        raise OptionError(f"window={text!r}: it is in per cent; did you mean {100 * start:g}-{100 * end:g}?")
    if end > 100 or start >= end:
        raise OptionError(f"window={text!r}: accepted is a start before the end, from 0 to 100 per cent")
    return start / 100, end / 100
