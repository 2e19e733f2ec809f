"""The text in an image's metadata: written after a job, and read back when it is pasted into the panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from stepcache.extend import main_number

from .messages import TITLE
from .options import AUTOMATIC, CUSTOM, Options, as_text

LABELS = {
    "speed": "",
    "method": "method",
    "number": "number",
    "skip": "skips",
    "window": "window",
    "warmup": "warm-up",
    "max_consecutive": "max in a row",
    "mask": "mask",
    "policy": "mask policy",
    "hires": "hires",
    "text": "options",
}
"""What each option is called in the text, after the title."""

RESULT = f"{TITLE} result"
"""The key of the line that says what was saved."""

SHARED = ("speed", "method", "number", "skip", "window", "mask", "text")
"""The options that the host may offer for pasting from one tab into another."""

IF_ABSENT = {**asdict(Options()), "mask": "none"}
"""What the panel shows for options that are not in the text."""

Reader = Callable[[Mapping[str, str]], Any]
"""From the key-value pairs of an image to a component's value; None leaves the component as it is."""


def key(option: str) -> str:
    """The key of an option in an image's text.

    Example:
        >>> key("speed"), key("warmup")
        ('StepCache', 'StepCache warm-up')
    """
    return f"{TITLE} {LABELS[option]}".strip()


def write(options: Options) -> dict[str, Any]:
    """What is written into the image, by key: the speed, and what differs from the panel's defaults.

    With a custom speed, also method and number, even if they are the defaults.
    """
    name, custom, skip = options.chosen_method, options.chosen_speed == CUSTOM, as_text(options.skip).lower()
    main = main_number(name)
    written = {
        "speed": options.chosen_speed,
        "method": name if custom else None,
        "number": as_text(options.number) or (None if main is None else f"{main[1]:g}") if custom else None,
        "skip": None if skip == AUTOMATIC else skip,
        "window": as_text(options.window) or None,
        "warmup": as_text(options.warmup) or None,
        "max_consecutive": as_text(options.max_consecutive) or None,
        "mask": as_text(options.mask) if options.masked else None,
        "policy": options.policy if options.masked else None,
        "hires": None if options.hires else False,
        "text": as_text(options.text) or None,
    }
    return {key(option): value for option, value in written.items() if value is not None}


def remove(infotext: dict[str, Any]) -> None:
    """Removes everything of ours from an image's text."""
    for name in [name for name in infotext if name.split()[0] == TITLE]:
        del infotext[name]


def paste_fields(components: Mapping[str, Any], speeds: Mapping[str, str]) -> list[tuple[Any, Reader]]:
    """Each component, by the name of its option, with the reader of its value. `speeds` are the panel's words for them.

    An image without our text disables the extension and changes nothing else.
    """
    kinds: dict[str, Callable[[str], Any]] = {
        "hires": lambda text: text == "True",
        "speed": lambda text: speeds.get(text, speeds[IF_ABSENT["speed"]]),
    }
    readers: list[tuple[Any, Reader]] = [(components["enabled"], lambda infotext: TITLE in infotext)]
    readers += [(components[option], _reader(option, kinds.get(option, str))) for option in LABELS]
    return readers


def _reader(option: str, kind: Callable[[str], Any]) -> Reader:
    def read(infotext: Mapping[str, str]) -> Any:
        if TITLE not in infotext:
            return None
        return kind(infotext[key(option)]) if key(option) in infotext else IF_ABSENT[option]

    return read
