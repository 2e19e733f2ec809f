"""What every file of a calibration has in common: what it was made on, and what was measured there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fingerprint import Fingerprint
from .masks import LONGEST
from .options import OptionError, number, shown
from .run_info import RunInfo

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "stepcache profile 1"
LARGEST_FILE = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What a calibration was made on.

    Attributes:
        schedule: the sigmas of the run.
        sampler: its name.
        guidance: the weight of each branch of guidance, as seen in the calibration.
        model: the model; None: not known.
        measured: figures on the calibration seeds and on the held-out ones, and what they cost.
        versions: of the packages that made it.
    """

    schedule: tuple[float, ...] = ()
    sampler: str = ""
    guidance: Mapping[str, float] = field(default_factory=dict)
    model: Fingerprint | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def evaluations(self) -> int:
        """Of the run."""
        raise NotImplementedError

    def written(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "measured": dict(self.measured),
            "guidance": dict(self.guidance),
            "schedule": [float(f"{sigma:.7g}") for sigma in self.schedule],
            "model": None if self.model is None else self.model.written(),
            "versions": dict(self.versions),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, an entry a line."""
        lines = [f"  {json.dumps(key)}: {_laid_out(value)}" for key, value in self.written().items()]
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that `save` wrote. It is data: nothing in it is run. OptionError if it is not of this kind."""
        return cls.made_of(opened(path))

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """From the text of a file."""
        return cls.made_of(parsed(text))

    @classmethod
    def made_of(cls, given: Mapping[str, Any]) -> Self:
        """From JSON values; OptionError for what `written` does not write."""
        raise NotImplementedError

    def compare(self, run: RunInfo, scaled: str) -> None:
        """Lets the report say if the run is not the one that this was made for; `scaled` is what another length means.

        A run of unknown length is not compared in length.
        """
        if run.evaluations is not None and run.evaluations != self.evaluations:
            run.notes.append(f"the profile was made for {self.evaluations} evaluations and {scaled}")
        elif run.schedule is not None and self.schedule and not _alike(run.schedule, self.schedule):
            run.notes.append("the profile was made for another schedule of as many steps: it was not measured here")
        if self.model is not None and run.network is not None:
            difference = self.model.difference(Fingerprint.of(run.network))
            if difference:
                run.warnings.append(
                    f"the profile was made for {difference}: what it promises was not measured here. Calibrate again "
                    "with stepcache tune"
                )


def opened(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The content of a file; OptionError if it is not one of a calibration."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise OptionError(f"profile: path={shown(os.fspath(path))} cannot be read: {error}") from None
    if len(text) > LARGEST_FILE:
        raise OptionError(f"profile: path={shown(os.fspath(path))} is larger than {LARGEST_FILE // 2**20} MiB")
    return parsed(text)


def parsed(text: str | bytes) -> Mapping[str, Any]:
    """The content of a file's text."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise OptionError("profile: this is not JSON") from None
    if not isinstance(given, Mapping) or given.get("format") != FORMAT:
        raise OptionError(f"profile: this is not a profile: its format must be {FORMAT!r}")
    return given


def origin(given: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of `Calibrated` in a file's content."""
    schedule = given.get("schedule", [])
    if not isinstance(schedule, list) or len(schedule) > 2 * LONGEST:
        raise OptionError(f"profile: schedule={shown(schedule)}: accepted is a list of sigmas")
    guidance, versions = as_object(given, "guidance"), as_object(given, "versions")
    return {
        "schedule": tuple(number("profile: sigma", sigma, high=1e9) for sigma in schedule),
        "sampler": str(given.get("sampler", ""))[:100],
        "guidance": {str(k): number("profile: guidance", v, low=-1e6, high=1e6) for k, v in guidance.items()},
        "model": None if given.get("model") is None else Fingerprint.read(given["model"]),
        "measured": as_object(given, "measured"),
        "versions": {str(key): str(value)[:100] for key, value in versions.items()},
    }


def as_object(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry that must be an object; empty if it is missing."""
    value = given.get(name, {})
    if not isinstance(value, Mapping):
        raise OptionError(f"profile: {name}={shown(value)}: accepted is an object")
    return value


def _alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two schedules are the same but for rounding."""
    return len(one) == len(other) and all(abs(a - b) <= 1e-3 * max(a, b) for a, b in zip(one, other, strict=True))


def _laid_out(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(inner)}" for key, inner in value.items()) + "\n  }"
