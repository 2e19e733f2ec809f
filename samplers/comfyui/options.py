"""A method from a node's fields."""

from __future__ import annotations

from typing import Any

from stepcache import Method, OptionError, StepMask
from stepcache import method as make_method
from stepcache.extend import PRESETS, main_number

UNSET = -1.0
"""In a node's number fields: the method's own default."""


def chosen_method(
    method: str,
    number: float,
    start: float,
    end: float,
    mask: str,
    policy: str,
    options: str = "",
    skip: str = "all",
) -> Method:
    """The method that a node's fields ask for. A key written in `options` wins over its field.

    If the method is "none", the other fields are not read, so that one field turns the node off.

    Raises `OptionError` naming the field, the option, the value and what is accepted.

    Example:
        >>> from stepcache.samplers.comfyui import UNSET, chosen_method
        >>> chosen_method("ucache", 0.5, UNSET, UNSET, "fast", "static").criterion.threshold
        0.5
    """
    if method == "none":
        return make_method(method)
    text = ",".join(line.strip().strip(",") for line in options.splitlines() if line.strip())
    keys = {part.partition("=")[0].strip() for part in text.split(",")}
    fields: dict[str, Any] = {} if skip == "all" else {"skip": skip}
    fields |= {key: share for key, share in (("start", start), ("end", end)) if share != UNSET}
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
        raise OptionError(f"number={number:g} sets {method}'s {next(iter(main))}: {error}") from None


def _main_number(method: str, number: float) -> dict[str, int | float]:
    """The option that the field `number` sets."""
    if number == UNSET:
        return {}
    main = main_number(method)
    if main is None:
        raise OptionError(f"number={number:g}: {method} has none; leave it at {UNSET:g}")
    key, default = main
    if isinstance(default, int) and not float(number).is_integer():
        raise OptionError(f"number={number:g}: {method}'s {key} is a whole number")
    return {key: int(number) if isinstance(default, int) else number}
