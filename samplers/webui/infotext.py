"""The text in an image's metadata: written after a job, and read back when it is pasted into the panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from stepcache.extend import flag, main_number

from .messages import TITLE
from .options import Options, as_text, default_window

LABELS = {
    "method": "",
    "number": "number",
    "window": "window",
    "mask": "mask",
    "policy": "policy",
    "hires": "hires",
    "warmup": "warm-up",
    "max_consecutive": "max in a row",
    "text": "options",
    "negative_only": "negative prompt only",
}
"""What each option is called in the text, after the title."""

SHARED = ("method", "number", "window", "mask", "text")
"""The options that the host may offer for pasting from one tab into another."""

IF_ABSENT = {**asdict(Options()), "mask": "none"}
"""What the panel shows for options that are not in the text."""

Reader = Callable[[Mapping[str, str]], Any]
"""From the key-value pairs of an image to a component's value; None leaves the component as it is."""


def key(option: str) -> str:
    """The key of an option in an image's text.

    Example:
        >>> key("method"), key("warmup")
        ('StepCache', 'StepCache warm-up')
    """
    return f"{TITLE} {LABELS[option]}".strip()


def write(options: Options) -> dict[str, Any]:
    """What is written into the image, by key. Number and window are written even if they are the defaults."""
    name = as_text(options.method).lower()
    main = main_number(name)
    written = {
        "method": name,
        "number": as_text(options.number) or (None if main is None else f"{main[1]:g}"),
        "window": as_text(options.window) or default_window(name),
        "mask": as_text(options.mask) if options.masked else None,
        "policy": options.policy if options.masked else None,
        "hires": bool(options.hires),
        "warmup": options.warmup or None,
        "max_consecutive": options.max_consecutive if options.max_consecutive >= 0 else None,
        "text": as_text(options.text) or None,
        "negative_only": True if flag("negative_only", options.negative_only) else None,
    }
    return {key(option): value for option, value in written.items() if value is not None}


def remove(infotext: dict[str, Any]) -> None:
    """Removes everything of ours from an image's text."""
    for name in [name for name in infotext if name.split()[0] == TITLE]:
        del infotext[name]


def paste_fields(components: Mapping[str, Any]) -> list[tuple[Any, Reader]]:
    """Each component, by the name of its option, with the reader of its value.

    An image without our text disables the extension and changes nothing else.
    """
    kinds: dict[str, Callable[[str], Any]] = {"hires": _is_true, "negative_only": _is_true}
    kinds |= {"warmup": int, "max_consecutive": int}
    readers: list[tuple[Any, Reader]] = [(components["enabled"], lambda infotext: TITLE in infotext)]
    readers += [(components[option], _reader(option, kinds.get(option, str))) for option in LABELS]
    return readers


def _reader(option: str, kind: Callable[[str], Any]) -> Reader:
    def read(infotext: Mapping[str, str]) -> Any:
        if TITLE not in infotext:
            return None
        return kind(infotext[key(option)]) if key(option) in infotext else IF_ABSENT[option]

    return read


def _is_true(text: str) -> bool:
    return text == "True"
