"""The extension's axes in the host's XYZ plot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from stepcache import METHODS
from stepcache.extend import PRESETS

from .messages import TITLE
from .options import CUSTOM, SKIPS, SPEEDS


def add_axes(scripts: Any) -> None:
    """Adds the axes, once. `scripts` is the host's module of that name."""
    for entry in scripts.scripts_data:
        if entry.script_class.__module__ not in ("xyz_grid.py", "scripts.xyz_grid"):
            continue
        plot = entry.module
        if any(axis.label.startswith(f"[{TITLE}]") for axis in plot.axis_options):
            return
        methods = [name for name in METHODS if name != "none"]
        for label, option, kind, choices in (
            ("Enabled", "enabled", _is_true, ["True", "False"]),
            ("Speed", "speed", str, [*SPEEDS, CUSTOM]),
            ("Method", "method", str, methods),
            ("Number", "number", float, None),
            ("Skip", "skip", str, SKIPS),
            ("Mask preset", "mask", str, ["none", *PRESETS]),
            ("Mask", "mask", str, None),
        ):
            more: dict[str, Any] = {} if choices is None else {"choices": functools.partial(list, choices)}
            plot.axis_options.append(plot.AxisOption(f"[{TITLE}] {label}", kind, _setter(option), **more))


def options_of_axes(p: Any) -> dict[str, Any]:
    """The options that the plot has set for this job."""
    return getattr(p, "stepcache_axes", {})


def _setter(option: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        p.stepcache_axes = {**options_of_axes(p), option: value}

    return apply


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("true", "1", "yes", "on")
