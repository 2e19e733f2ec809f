"""The methods by name, and their options as keywords or as text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any, ParamSpec

from .. import options
from ..masks import preset_name
from .base import Method

P = ParamSpec("P")

METHODS: dict[str, Callable[..., Method]] = {}
"""Every method by its published name, filled by `register`."""

GUIDANCE_OPTIONS = ("enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate")
"""cache-dit's options about how guidance comes, which a host knows and a method does not."""


@dataclass(frozen=True)
class Entry:
    """What is known of a registered method beside its function.

    Attributes:
        function: as it was written.
        main: the number to turn first, which hosts show; None: its first number.
        other_names: second names of options, as other projects write them.
        presets: options that `preset=` sets together.
    """

    function: Callable[..., Method]
    main: str | None = None
    other_names: Mapping[str, str] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    main: str | None = None,
    other_names: Mapping[str, str] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Decorates the function that makes a method: it then appears under `name` in every list of methods.

    The decorated function accepts the options' second names, applies presets, and raises `OptionError` for an unknown
    option, with the nearest name, instead of a TypeError. See `Entry` for the arguments.

    Example:
        >>> from stepcache.extend import Method, register
        >>> @register("rare")
        ... def Rare(**common) -> Method:
        ...     return Method.make(common, max_cached=1, name="rare")
        >>> import stepcache
        >>> stepcache.method("rare", "max_cached=2").max_cached
        2
    """

    def decorate(function: Callable[P, Method]) -> Callable[P, Method]:
        entry = Entry(function, main, other_names or {}, presets or {})
        _ENTRIES[name], METHODS[name] = entry, (checked := _checked(entry))
        return checked

    return decorate


def checked_options(function: Callable[P, Method]) -> Callable[P, Method]:
    """Decorates a function that makes a method without registering it: wrong options are an OptionError."""
    return _checked(Entry(function))


def _checked(entry: Entry) -> Callable[..., Method]:
    """The function with its second names and presets, and an OptionError for what it does not take."""

    @wraps(entry.function)
    def made(*positional: Any, **keywords: Any) -> Method:
        given = _completed(entry, positional, _usual_names(entry, keywords))
        try:
            inspect.signature(entry.function).bind(*positional, **given)
        except TypeError as error:
            raise options.OptionError(f"{entry.function.__name__}: {error}") from None
        return entry.function(*positional, **given)

    return made


def _usual_names(entry: Entry, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords under the options' own names; OptionError for one that the method does not take."""
    known = [*_accepted(entry.function), *entry.other_names]
    given: dict[str, Any] = {}
    for key, value in keywords.items():
        if key in GUIDANCE_OPTIONS:
            raise options.OptionError(
                f"{key} is for the host, which knows how branches come: attach(pipe, method, {key}=...); "
                "in k-diffusion name them with branches="
            )
        if key not in known:
            raise options.unknown("option", key, known)
        usual = entry.other_names.get(key, key)
        if usual in given:
            raise options.OptionError(f"{key}={value!r}: {usual} is given twice, under two names")
        given[usual] = value
    return given


def _completed(entry: Entry, positional: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The keywords with those of the preset that was asked for; what is given beside it wins."""
    by_place = dict(zip(inspect.signature(entry.function).parameters, positional, strict=False))
    chosen = given.get("preset", by_place.get("preset"))
    if not entry.presets or chosen is None:
        return given
    preset = entry.presets[preset_name(chosen)]
    return {key: value for key, value in preset.items() if key not in by_place} | given


def accepted_options(name: str) -> dict[str, Any]:
    """The options of a method of `METHODS` with their defaults: its own first, then those common to all.

    Example:
        >>> from stepcache.extend import accepted_options
        >>> accepted_options("easycache")["threshold"]
        0.2
    """
    return _accepted(_ENTRIES[name].function)


def _accepted(function: Callable[..., Method]) -> dict[str, Any]:
    own = inspect.signature(function).parameters.values()
    accepted = {p.name: "" if p.default is p.empty else p.default for p in own if p.kind is not p.VAR_KEYWORD}
    if any(p.kind is p.VAR_KEYWORD for p in own):
        for common in fields(Method):
            if common.name not in ("criterion", "name"):
                accepted.setdefault(common.name, common.default)
    return accepted


def presets_of(name: str) -> Mapping[str, Mapping[str, Any]]:
    """The presets of a method of `METHODS`; empty if it has none."""
    return _ENTRIES[name].presets


def main_number(name: str) -> tuple[str, int | float] | None:
    """Name and default of the number that hosts show first for a method of `METHODS`; None if it has no number.

    Example:
        >>> from stepcache.extend import main_number
        >>> main_number("forecast")
        ('interval', 2)
    """
    entry = _ENTRIES[name]
    own = inspect.signature(entry.function).parameters.values()
    defaults = {p.name: _as_text(p.name, p.default, entry) for p in own if p.kind is not p.VAR_KEYWORD}
    numbers = [key for key, default in defaults.items() if type(default) in (int, float)]
    key = entry.main or next(iter(numbers), None)
    return None if key is None else (key, defaults[key])


def _as_text(key: str, default: Any, entry: Entry) -> Any:
    """The default that gives an option its type when it comes as text; of None, what its annotation begins with."""
    if default is not None:
        return default
    parameter = inspect.signature(entry.function).parameters.get(key)
    return 0 if parameter is not None and str(parameter.annotation).startswith("int") else ""


def method(name: str, option_text: str = "", /, **keywords: Any) -> Method:
    """A method by its published name, with options as text, as keywords, or both.

    Name and text may come as one, as on the command line: "ucache:threshold=1.5".

    Raises `OptionError` naming the option, the value and what is accepted: for an unknown name or key (with the nearest
    one), a missing "=", text that is not a number, a window with start >= end, a negative threshold.

    Example:
        >>> import stepcache
        >>> stepcache.method("ucache", "threshold=1.5,start=0.2", mask="fast").start
        0.2
    """
    if isinstance(name, str) and not option_text:
        name, _, option_text = name.partition(":")
    if not isinstance(name, str) or name not in METHODS:
        raise options.unknown("method", name if isinstance(name, str) else options.shown(name), METHODS)
    entry = _ENTRIES[name]
    typed = {key: _as_text(key, default, entry) for key, default in _accepted(entry.function).items()}
    typed |= {other: typed[usual] for other, usual in entry.other_names.items() if usual in typed}
    text = options.parse(option_text, {k: v for k, v in typed.items() if isinstance(v, (bool, int, float, str))})
    if both := text.keys() & keywords.keys():
        raise options.OptionError(f"{', '.join(sorted(both))}: given both as text and as keyword")
    return METHODS[name](**text, **keywords)
