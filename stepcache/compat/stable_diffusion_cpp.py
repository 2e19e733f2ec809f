"""Command lines of stable-diffusion.cpp."""

from __future__ import annotations

import argparse
import shlex
import warnings
from collections.abc import Sequence
from typing import Any

from ..masks import StepMask
from ..methods import METHODS, Method, method
from ..methods.off import Off
from ..methods.registry import presets_of
from ..options import OptionError, shown, unknown

OPTIONS = ("--cache-mode", "--cache-option", "--cache-preset", "--scm-mask", "--scm-policy")


OPTION_KEYS = {
    "spectrum": {"window": "window_size", "flex": "flex_window"},
}
"""Keys of `--cache-option` that have another name here."""


def parse(command: str | Sequence[str]) -> Method:
    """The method that a command line of stable-diffusion.cpp asks for.

    `parse('--cache-mode ucache --cache-option "threshold=1.5,reset=0"')`,
    `parse("--cache-mode cache-dit --cache-preset fast")`, `parse("--cache-mode dbcache --scm-mask 1,1,0,1 --scm-policy
    static")`.

    Args:
        command: the text, or its words. Everything else in it (`sd-cli -m model.safetensors -p "a cat"`) is left aside.

    Options are `--cache-mode` (a method's name, or "disabled"), `--cache-option` (key=value,...), `--cache-preset`,
    `--scm-mask` and `--scm-policy`; the last of several counts, a mask or policy given wins over a preset's. Without a
    mode it is cache-dit if a preset, mask or policy is given, whose options these are there; else nothing is cached.

    Raises `OptionError` for an unknown option that begins with --cache or --scm (with the nearest name), one without a
    value, and whatever `method` does not accept.

    Example:
        >>> from stepcache import parse
        >>> parse("--cache-mode ucache --cache-option threshold=0.5").criterion.threshold
        0.5
    """
    given = _read(_words(command))
    name, text, preset = (given.get(f"--cache-{kind}") for kind in ("mode", "option", "preset"))
    mask, policy = given.get("--scm-mask"), given.get("--scm-policy")
    if name is None and text is not None:
        raise OptionError(f"--cache-option {text}: say whose option it is, with --cache-mode")
    if name is None:
        name = "disabled" if (preset, mask, policy) == (None, None, None) else "cache-dit"
    if name in ("disabled", "none"):
        return Off()
    if name not in METHODS:
        raise unknown("--cache-mode", name, [*METHODS, "disabled"])
    keywords: dict[str, Any] = {"mask": mask, "policy": policy, "preset": preset}
    if not presets_of(name):
        keywords = {"mask": _masked(name, mask, preset, policy)}
    text = _renamed(text or "", OPTION_KEYS.get(name, {}))
    return method(name, text, **{key: value for key, value in keywords.items() if value is not None})


def _words(command: str | Sequence[str]) -> list[str]:
    if isinstance(command, str):
        try:
            return shlex.split(command)
        except ValueError as error:  # a quotation mark without its other
            raise OptionError(f"command {shown(command)}: {error}") from None
    words: list[Any] = list(command) if isinstance(command, Sequence) else [command]
    if not all(isinstance(word, str) for word in words):
        raise OptionError(f"command {shown(command)}: accepted are a text and a list of words")
    return words


def _read(words: list[str]) -> dict[str, str]:
    for word in words:
        option = word.partition("=")[0]
        if option.startswith(("--cache", "--scm")) and option not in OPTIONS:
            raise unknown("option", option, OPTIONS)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for option in OPTIONS:
        parser.add_argument(option, dest=option)
    try:
        found, _ = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise OptionError(f"{error.argument_name}: {error.message}") from None
    return {option: value for option, value in vars(found).items() if value is not None}


def _masked(name: str, mask: str | None, preset: str | None, policy: str | None) -> StepMask | None:
    """For methods that know no presets: a preset is its mask."""
    if mask is not None and preset is not None:
        warnings.warn(
            f"--cache-preset {preset}: of a preset {name} takes the mask only, and --scm-mask is given", stacklevel=3
        )
    chosen = mask if mask is not None else preset
    if chosen is not None:
        return StepMask(chosen, policy or "dynamic")
    if policy not in (None, "dynamic"):
        raise OptionError(f"--scm-policy {policy}: it is about a mask's zeros; give --scm-mask or --cache-preset")
    return None


def _renamed(text: str, names: dict[str, str]) -> str:
    pairs = (part.partition("=") for part in text.split(","))
    return ",".join(f"{names.get(key.strip(), key)}{equals}{value}" for key, equals, value in pairs)
