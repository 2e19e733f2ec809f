"""A method from a node's fields."""

from __future__ import annotations

from typing import Any

from stepcache import Forecast, Method, Off, OptionError, StepMask
from stepcache import method as make_method
from stepcache.extend import PRESETS, main_number

INTERVALS = {"2x: every second step": 2, "3x: every third step": 3, "4x: every fourth step": 4}

SPEEDS: dict[str, Method] = {
    **{speed: Forecast(interval) for speed, interval in INTERVALS.items()},
    "1.3x: the negative prompt only": Forecast(skip="uncond"),
    "off": Off(),
}
"""The choices of the node StepCache."""

NOISY_SPEEDS: dict[str, Method] = {speed: Forecast(interval, skip="uncond") for speed, interval in INTERVALS.items()}
"""What they are with the samplers of `NEGATIVE_ONLY_SAMPLERS`."""

AUTOMATIC = "automatic"
"""Of the field `skip`: the negative prompt only with the samplers of `NEGATIVE_ONLY_SAMPLERS`, else every prompt."""

DEFAULT = "default"
"""In a node's text fields: the method's own default."""


def chosen_method(
    method: str,
    number: str = DEFAULT,
    options: str = "",
    *,
    start: str = DEFAULT,
    end: str = DEFAULT,
    mask: str = "none",
    policy: str = "dynamic",
    skip: str = AUTOMATIC,
) -> Method:
    """The method that the fields of the node StepCache (advanced) ask for. A key in `options` wins over its field.

    If `method` is "none", the other fields are not read, so that one field turns the node off.

    Raises `OptionError` naming the field, the option, the value and what is accepted.

    Example:
        >>> from stepcache.samplers.comfyui import chosen_method
        >>> chosen_method("ucache", "0.5", mask="fast", policy="static").criterion.threshold
        0.5
    """
    if method == "none":
        return make_method(method)
    text = _in_one_line(options)
    keys = _keys(text)
    fields: dict[str, Any] = {} if skip in (AUTOMATIC, "all") else {"skip": skip}
    for key, share in (("start", start), ("end", end)):
        if _plain(share) != DEFAULT:
            fields[key] = _number(key, share, "a share of the run from 0 to 1")
    if mask != "none":
        fields["mask"] = StepMask(mask, policy)
    elif method == "static" and "mask" not in keys:
        raise OptionError(f"static needs a mask: a preset ({', '.join(PRESETS)}), or mask=110... in the options")
    fields = {key: value for key, value in fields.items() if key not in keys}
    main = {key: value for key, value in _main_number(method, number).items() if key not in keys}
    try:
        return make_method(method, text, **fields, **main)
    except OptionError as error:
        if not main:
            raise
        make_method(method, text, **fields)  # what is wrong without the number too is named by itself
        raise OptionError(f"threshold_or_interval={number} sets {method}'s {next(iter(main))}: {error}") from None


def noisy_method(method: str, number: str, options: str, decide: str, skip: str, **fields: str) -> Method | None:
    """The method with the samplers of `NEGATIVE_ONLY_SAMPLERS`, if `skip` is automatic; None if it is no other one.

    It is another one for Forecast alone: with the methods of others, a skip means what they publish.
    """
    if skip != AUTOMATIC or method != "forecast" or decide != "batch" or "skip" in _keys(_in_one_line(options)):
        return None
    return chosen_method(method, number, options, skip="uncond", **fields)


def _in_one_line(options: str) -> str:
    return ",".join(line.strip().strip(",") for line in options.splitlines() if line.strip())


def _keys(text: str) -> set[str]:
    return {part.partition("=")[0].strip() for part in text.split(",")}


def _main_number(method: str, text: str) -> dict[str, int | float]:
    """The option that the field `threshold_or_interval` sets."""
    if _plain(text) == DEFAULT:
        return {}
    main = main_number(method)
    if main is None:
        raise OptionError(f"threshold_or_interval={text}: {method} has no number; set it to {DEFAULT!r}")
    key, default = main
    value = _number("threshold_or_interval", text, f"{method}'s {key}, {default:g} by default")
    if isinstance(default, int) and not value.is_integer():
        raise OptionError(f"threshold_or_interval={text}: {method}'s {key} is a whole number")
    return {key: int(value) if isinstance(default, int) else value}


def _number(field: str, text: str, meaning: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"{field}={text!r}: accepted is {DEFAULT!r} or a number: {meaning}") from None


def _plain(text: str) -> str:
    """A text field without what is easily left around its value; an emptied field is at its default."""
    return str(text).strip().lower() or DEFAULT
