"""Settings: a published method with the options that a calibration has found for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .calibrated import FORMAT, Calibrated, as_object, origin
from .masks import LONGEST
from .options import OptionError, number, shown

Value = str | float | bool


@dataclass(frozen=True)
class Settings(Calibrated):
    """A published method and its options, for one model, sampler and number of steps. A small JSON file.

    Attributes:
        method: its name, or name and options as text: "magcache:max_skip_steps=6".
        options: those that were found: a threshold, MagCache's ratios.
        length: evaluations of the run that they were found in.

    Example:
        >>> from stepcache.settings import Settings
        >>> found = Settings("easycache", {"threshold": 0.12}, 20, sampler="euler")
        >>> found.written()["options"]
        {'threshold': 0.12}
    """

    method: str
    options: Mapping[str, Value] = field(default_factory=dict)
    length: int = 0

    @property
    def evaluations(self) -> int:
        return self.length

    def written(self) -> dict[str, Any]:
        head = {"format": FORMAT, "sampler": self.sampler, "evaluations": self.length, "method": self.method}
        return {**head, "options": dict(self.options), **super().written()}

    @classmethod
    def made_of(cls, given: Mapping[str, Any]) -> Settings:
        method, options = given.get("method"), as_object(given, "options")
        if not isinstance(method, str) or method.partition(":")[0] == "profile":
            raise OptionError(f"profile: method={shown(method)}: accepted is the name of a published method")
        wrong = [value for value in options.values() if not isinstance(value, (str, int, float))]
        if wrong:
            raise OptionError(f"profile: options: {shown(wrong[0])} is neither text nor a number")
        length = number("profile: evaluations", given.get("evaluations"), low=1, high=2 * LONGEST, whole=True)
        return cls(method, {str(key): value for key, value in options.items()}, length, **origin(given))
