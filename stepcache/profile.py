"""A profile: what a calibration has found for one model, sampler and number of steps. A small JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .fingerprint import Fingerprint
from .masks import LONGEST
from .options import OptionError, number, shown

N = TypeVar("N", int, float)

FORMAT = "stepcache profile 1"
LARGEST_FILE = 4 * 2**20
HISTORY = 3
"""The most past evaluations that a prediction uses."""


@dataclass(frozen=True)
class Prediction:
    """How one skipped evaluation is predicted.

    Attributes:
        order: of the polynomial through the last computed evaluations.
        share: how much of it goes through the denoised image, 0 to 1; the rest through the derivative.
        evaluations: those that the learned weights are for, oldest first; empty without any.
        derivative, denoised: the learned weights, one per evaluation. They are used if exactly these evaluations
            were the last computed ones; otherwise order and share are.
    """

    order: int
    share: float
    evaluations: tuple[int, ...] = ()
    derivative: tuple[float, ...] = ()
    denoised: tuple[float, ...] = ()

    def plain(self) -> Prediction:
        """The same without learned weights."""
        return Prediction(self.order, self.share)

    @classmethod
    def read(cls, name: str, given: Any) -> Prediction:
        if not isinstance(given, Mapping):
            raise OptionError(f"profile: {name}={shown(given)}: accepted is an object with order and share")
        order = number(f"profile: order of {name}", given.get("order"), high=HISTORY - 1, whole=True)
        share = number(f"profile: share of {name}", given.get("share"), high=1.0)
        if "from" not in given:
            return cls(order, share)
        lists: list[Any] = [given.get(key) for key in ("from", "derivative", "denoised")]
        if not all(isinstance(one, list) for one in lists) or len({*map(len, lists)}) > 1 or len(lists[0]) > HISTORY:
            raise OptionError(f"profile: {name}: from, derivative and denoised must be lists of one length")
        evaluations = tuple(number(f"profile: from of {name}", one, high=2 * LONGEST, whole=True) for one in lists[0])
        weights = [tuple(number(f"profile: weight of {name}", w, low=-1e6, high=1e6) for w in one) for one in lists[1:]]
        return cls(order, share, evaluations, *weights)

    def written(self) -> dict[str, Any]:
        told: dict[str, Any] = {"order": self.order, "share": self.share}
        if self.evaluations:
            told |= {"from": list(self.evaluations)}
            told |= {"derivative": _rounded(self.derivative), "denoised": _rounded(self.denoised)}
        return told


@dataclass(frozen=True)
class Profile:
    """Which evaluations of a run are computed, and how each of the others is predicted.

    Attributes:
        computed: one digit per evaluation: 1 is computed, 0 is predicted.
        predictions: by the number of the skipped evaluation.
        schedule: the sigmas that it was made on.
        sampler: the name of the sampler that it was made under.
        guidance: the weight of each branch of guidance, as seen in the calibration.
        model: the model that it was made on; None: not known.
        measured: figures on the calibration seeds and on the held-out ones, and what they cost.
        versions: of the packages that made it.

    Example:
        >>> from stepcache.profile import Prediction, Profile
        >>> Profile((1, 0, 1), {1: Prediction(order=0, share=0.25)}).calls
        2
    """

    computed: tuple[int, ...]
    predictions: Mapping[int, Prediction]
    schedule: tuple[float, ...] = ()
    sampler: str = ""
    guidance: Mapping[str, float] = field(default_factory=dict)
    model: Fingerprint | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    _scaled: dict[int, Profile] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 2 <= len(self.computed) <= 2 * LONGEST or self.computed[0] != 1:
            raise OptionError("profile: computed must have 2 to 2,000 digits, of which the first is 1")
        if missing := [j for j, digit in enumerate(self.computed) if not digit and j not in self.predictions]:
            raise OptionError(f"profile: evaluation {missing[0]} is skipped, and skipped does not say how")

    @property
    def evaluations(self) -> int:
        return len(self.computed)

    @property
    def calls(self) -> int:
        """Evaluations that are computed."""
        return sum(self.computed)

    def scaled(self, evaluations: int) -> Profile:
        """The profile for a run of another length: the same share is computed, at the same places of the run.

        Order and share of a skipped evaluation are those of the nearest one here; learned weights do not carry over.
        """
        if evaluations == self.evaluations or evaluations < 2:
            return self
        if evaluations not in self._scaled:
            self._scaled[evaluations] = self._made_for(evaluations)
        return self._scaled[evaluations]

    def _made_for(self, evaluations: int) -> Profile:
        places = [j for j, digit in enumerate(self.computed) if digit]
        stretch = (evaluations - 1) / (self.evaluations - 1)
        count = min(evaluations, max(1, round(len(places) * evaluations / self.evaluations)))
        chosen = {0}
        for k in range(1, count):
            goal = stretch * _between(places, k * (len(places) - 1) / (count - 1))
            chosen.add(_nearest([j for j in range(evaluations) if j not in chosen], goal))
        own = {stretch * j: how.plain() for j, how in self.predictions.items()}
        skipped = [j for j in range(evaluations) if j not in chosen]
        predictions = {j: own[_nearest(own, j)] if own else Prediction(1, 0.25) for j in skipped}
        return Profile(tuple(int(j in chosen) for j in range(evaluations)), predictions)

    def other_schedule(self, schedule: tuple[float, ...]) -> bool:
        """Whether it was made on other sigmas."""
        same = len(schedule) == len(self.schedule) and all(
            abs(a - b) <= 1e-3 * max(a, b) for a, b in zip(self.schedule, schedule, strict=True)
        )
        return bool(self.schedule) and not same

    def written(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "format": FORMAT,
            "sampler": self.sampler,
            "calls": self.calls,
            "computed": "".join(map(str, self.computed)),
            "skipped": {str(j): self.predictions[j].written() for j in sorted(self.predictions)},
            "measured": dict(self.measured),
            "guidance": dict(self.guidance),
            "schedule": [float(f"{sigma:.7g}") for sigma in self.schedule],
            "model": None if self.model is None else self.model.written(),
            "versions": dict(self.versions),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, one skipped evaluation a line."""
        lines = [f"  {json.dumps(key)}: {_laid_out(value)}" for key, value in self.written().items()]
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Reads a file that `save` wrote. It is data: nothing in it is run. OptionError if it is not a profile."""
        try:
            with Path(path).open("rb") as file:
                text = file.read(LARGEST_FILE + 1)
        except (OSError, ValueError) as error:
            raise OptionError(f"profile: path={shown(os.fspath(path))} cannot be read: {error}") from None
        if len(text) > LARGEST_FILE:
            raise OptionError(f"profile: path={shown(os.fspath(path))} is larger than {LARGEST_FILE // 2**20} MiB")
        return cls.read(text)

    @classmethod
    def read(cls, text: str | bytes) -> Profile:
        """From the text of a file."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise OptionError("profile: this is not JSON") from None
        if not isinstance(given, Mapping) or given.get("format") != FORMAT:
            raise OptionError(f"profile: this is not a profile: its format must be {FORMAT!r}")
        digits = given.get("computed")
        if not isinstance(digits, str) or not set(digits) <= {"0", "1"} or len(digits) > 2 * LONGEST:
            raise OptionError(
                f"profile: computed={shown(digits)}: accepted is text of 0 and 1, a digit an evaluation, at most 2,000"
            )
        skipped, schedule = _object(given, "skipped"), given.get("schedule", [])
        if not isinstance(schedule, list) or len(schedule) > 2 * LONGEST:
            raise OptionError(f"profile: schedule={shown(schedule)}: accepted is a list of sigmas")
        names = {str(j): j for j, digit in enumerate(digits) if digit == "0"}
        if strange := [name for name in skipped if name not in names]:
            raise OptionError(f"profile: skipped has {shown(strange[0])}, which computed does not skip")
        return cls(
            tuple(map(int, digits)),
            {names[name]: Prediction.read(name, how) for name, how in skipped.items()},
            tuple(number("profile: sigma", sigma, high=1e9) for sigma in schedule),
            str(given.get("sampler", ""))[:100],
            {str(k): number("profile: guidance", v, low=-1e6, high=1e6) for k, v in _object(given, "guidance").items()},
            None if given.get("model") is None else Fingerprint.read(given["model"]),
            _object(given, "measured"),
            {str(key): str(value)[:100] for key, value in _object(given, "versions").items()},
        )


def _nearest(known: Iterable[N], goal: float) -> N:
    return min(known, key=lambda one: abs(one - goal))


def _between(values: Sequence[float], at: float) -> float:
    """The value at a place between two of them."""
    below = min(int(at), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (at - below) * (values[above] - values[below])


def _object(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = given.get(name, {})
    if not isinstance(value, Mapping):
        raise OptionError(f"profile: {name}={shown(value)}: accepted is an object")
    return value


def _rounded(weights: tuple[float, ...]) -> list[float]:
    return [float(f"{weight:.6g}") for weight in weights]


def _laid_out(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(inner)}" for key, inner in value.items()) + "\n  }"
