"""Options as users write them: `threshold=1.5,reset=0`. Errors name the option, the value and what is accepted."""

from __future__ import annotations

import difflib
import math
import reprlib
import sys
from collections.abc import Iterable
from numbers import Integral, Rational, Real
from typing import Any, Literal, overload


class OptionError(ValueError):
    """An option that cannot be accepted, with the sentence that says why and what is.

    Example:
        >>> from stepcache import OptionError, UCache
        >>> try:
        ...     UCache(threshold=-1)
        ... except OptionError as error:
        ...     print(error)
        threshold=-1: accepted is a number of at least 0
    """


LARGEST = sys.float_info.max
"""Whole numbers above it are no floats."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist = 3, 200, 200, 40


def shown(value: Any) -> str:
    """A value for an error message; shortened if it is long, nested deeply or has no text."""
    try:
        return _SHORT.repr(value)
    except Exception:
        return f"an object of {type(value).__name__}"


def unknown(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """The error for a name that nothing has, with the nearest one that exists.

    Example:
        >>> from stepcache.extend import unknown
        >>> print(unknown("sampler", "eular", ("euler", "heun")))
        unknown sampler 'eular'. Did you mean 'euler'? Accepted: euler, heun.
    """
    known = list(known)
    near = difflib.get_close_matches(name[:100].lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return OptionError(f"unknown {kind} {shown(name)}.{hint} Accepted: {', '.join(known) or 'none'}.")


@overload
def number(name: str, value: Any, *, low: float = ..., high: float = ..., whole: Literal[True]) -> int: ...


@overload
def number(name: str, value: Any, *, low: float = ..., high: float = ..., whole: bool = ...) -> float: ...


def number(name: str, value: Any, *, low: float = 0.0, high: float = math.inf, whole: bool = False) -> float:
    """`value` as a number within [low, high]; OptionError naming the option otherwise.

    Example:
        >>> from stepcache.extend import number
        >>> number("warmup", 4, whole=True)
        4
    """
    accepted = f"a {'whole ' if whole else ''}number"
    accepted += f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}"
    kind = type(value)
    fraction = issubclass(kind, Rational) and not issubclass(kind, Integral)  # torch does not take it
    fits = issubclass(kind, Real) and not issubclass(kind, bool) and not fraction
    fits = fits and low <= value <= high  # False for NaN
    if fits and LARGEST < abs(value) < math.inf:
        raise OptionError(f"{name}={shown(value)}: accepted is {accepted}, and at most {LARGEST:g}")
    fits = fits and (not whole or (math.isfinite(value) and value == int(value)))
    if not fits:
        raise OptionError(f"{name}={shown(value)}: accepted is {accepted}")
    return int(value) if whole else float(value)


def make_whole(owner: Any, name: str, *, low: float = 0.0, high: float = math.inf) -> None:
    """Makes an attribute a whole number, as 2 if it was given as 2.0; OptionError naming it if it is none."""
    object.__setattr__(owner, name, number(name, getattr(owner, name), low=low, high=high, whole=True))


def flag(name: str, value: Any) -> bool:
    """`value` as a boolean; OptionError naming the option if it is neither a boolean nor 0 or 1.

    Example:
        >>> from stepcache.extend import flag
        >>> flag("reset", 0)
        False
    """
    try:
        fits = bool(value in (0, 1))
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor
        fits = False
    if not fits:
        raise OptionError(f"{name}={shown(value)}: accepted is 0 or 1")
    return bool(value)


def window(start: float, end: float) -> tuple[float, float]:
    """A window as shares of the run, 0 <= start < end <= 1."""
    start, end = number("start", start, high=1.0), number("end", end, high=1.0)
    if start >= end:
        raise OptionError(f"start={start:g}, end={end:g}: the window is empty; accepted is start < end, from 0 to 1")
    return start, end


def parse(text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """`key=value,key=value` as a dictionary, typed by the defaults.

    Whitespace around keys and values and one trailing comma are allowed. Booleans are 0/1 (also true/false). Raises
    OptionError for a missing `=`, an unknown key, a key given twice, or text that is not of the default's type.
    """
    if not isinstance(text, str):
        raise OptionError(f"options {shown(text)}: accepted is text, key=value,key=value")
    chosen: dict[str, Any] = {}
    parts = text.split(",")
    if parts and not parts[-1].strip():
        parts.pop()
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and "mask" in chosen:
            raise OptionError(
                f"option {part!r}: in an option text a mask is digits without commas, mask=110, or a preset"
            )
        if not equals:
            raise OptionError(f"option {part!r} has no '='. Write options as key=value, separated by commas.")
        if key not in defaults:
            raise unknown("option", key, defaults)
        if key in chosen:
            raise OptionError(f"{key}={value!r}: the option is given twice")
        chosen[key] = _typed(key, value, defaults[key])
    return chosen


def _typed(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() in ("1", "true"):
            return True
        if text.lower() in ("0", "false"):
            return False
        raise OptionError(f"{key}={text!r}: accepted is 0 or 1")
    if isinstance(default, str):
        return text
    try:
        if "_" in text:
            raise ValueError
        return type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise OptionError(f"{key}={text!r}: accepted is {kind}") from None
