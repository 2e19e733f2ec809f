"""A method from a node's fields."""

from __future__ import annotations

from typing import Any

from stepcache import Method, OptionError, StepMask
from stepcache import method as make_method
from stepcache.extend import PRESETS, main_number

SPEEDS = {"2x: every second step": 2, "3x: every third step": 3, "4x: every fourth step": 4}
"""The choices of `speed` that set Forecast's interval."""

OFF, CUSTOM = "off", "custom"
"""The other choices of `speed`: no cache, and the fields `method` and `threshold_or_interval`."""

DEFAULT = "default"
"""In a node's text fields: the method's own default."""


def method_at(
    speed: str,
    method: str = "forecast",
    threshold_or_interval: str = DEFAULT,
    options: str = "",
    decide: str = "reference",
    **fields: str,
) -> Method:
    """The method that the node StepCache's fields ask for; `fields` are the others of `chosen_method`.

    `method`, `threshold_or_interval` and `decide` act at speed "custom" only; at 2x to 4x they are an error if set.

    If `speed` is "off", the other fields are not read, so that one field turns the node off.

    Raises `OptionError` naming the field, the value, what is accepted and what to do.

    Example:
        >>> from stepcache.samplers.comfyui import method_at
        >>> method_at("off", options="warmup=2").name
        'none'
        >>> method_at("3x: every third step").name
        'forecast'
    """
    if speed == OFF:
        return make_method("none")
    if speed == CUSTOM:
        return chosen_method(method, threshold_or_interval, options, **fields)
    if speed not in SPEEDS:
        raise OptionError(f"speed={speed!r}: accepted is one of {', '.join(map(repr, (*SPEEDS, OFF, CUSTOM)))}")
    for name, value, usual in (
        ("method", method, "forecast"),
        ("threshold_or_interval", threshold_or_interval, DEFAULT),
        ("decide", decide, "reference"),
    ):
        if _plain(value) != usual:
            raise OptionError(
                f"{name}={value!r} acts only at speed {CUSTOM!r}: choose that, or set {name} back to {usual!r}"
            )
    if "interval" in _keys(_one_line(options)):
        raise OptionError(f"options: speed {speed!r} sets the interval: take interval out, or choose {CUSTOM!r}")
    return chosen_method("forecast", str(SPEEDS[speed]), options, **fields)


def chosen_method(
    method: str,
    number: str = DEFAULT,
    options: str = "",
    *,
    start: str = DEFAULT,
    end: str = DEFAULT,
    mask: str = "none",
    policy: str = "dynamic",
    skip: str = "all",
) -> Method:
    """A method by its name. `number`: its main number. A key written in `options` wins over its field.

    Raises `OptionError` naming the field, the option, the value and what is accepted.

    Example:
        >>> from stepcache.samplers.comfyui import chosen_method
        >>> chosen_method("ucache", "0.5", mask="fast", policy="static").criterion.threshold
        0.5
    """
    text = _one_line(options)
    keys = _keys(text)
    fields: dict[str, Any] = {} if skip == "all" else {"skip": skip}
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


def _one_line(options: str) -> str:
    return ",".join(line.strip().strip(",") for line in options.splitlines() if line.strip())


def _keys(text: str) -> set[str]:
    return {part.partition("=")[0].strip() for part in text.split(",")}
