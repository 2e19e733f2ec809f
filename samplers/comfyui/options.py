"""A method from a node's fields."""

from __future__ import annotations

from typing import Any

from stepcache import Method, OptionError, StepMask
from stepcache import method as make_method
from stepcache.extend import PRESETS, main_number

OWN = -1.0
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
    """The method that a node's fields ask for; a key written in `options` wins over its field.

    With "none" the other fields are not looked at, so that one field turns it off. OptionError naming the option, the
    value and what is accepted.
    """
    if method == "none":
        return make_method(method)
    chosen: dict[str, Any] = {} if skip == "all" else {"skip": skip}
    if number != OWN:
        main = main_number(method)
        if main is None:
            raise OptionError(f"number={number:g}: {method} has none; leave it at {OWN:g}")
        if isinstance(main[1], int) and not float(number).is_integer():
            raise OptionError(f"number={number:g}: {method}'s {main[0]} is a whole number")
        chosen[main[0]] = int(number) if isinstance(main[1], int) else number
    for key, share in (("start", start), ("end", end)):
        if share != OWN:
            chosen[key] = share
    text = ",".join(line.strip().strip(",") for line in options.splitlines() if line.strip())
    keys = {part.partition("=")[0].strip() for part in text.split(",")}
    if mask != "none":
        chosen["mask"] = StepMask(mask, policy)
    elif method == "static" and not keys & {"mask"}:
        raise OptionError(f"static needs a mask: a preset ({', '.join(PRESETS)}), or mask=110... in the options")
    return make_method(method, text, **{key: value for key, value in chosen.items() if key not in keys})
