"""A profile: what a calibration has found for one model, sampler and number of steps. A small JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .calibrated import FORMAT, Calibrated, as_object, origin
from .masks import LONGEST
from .options import OptionError, number, shown

N = TypeVar("N", int, float)

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
class Profile(Calibrated):
    """Which evaluations of a run are computed, and how each of the others is predicted.

    Attributes:
        computed: one digit per evaluation: 1 is computed, 0 is predicted.
        predictions: by the number of the skipped evaluation.

    Example:
        >>> from stepcache.profile import Prediction, Profile
        >>> Profile((1, 0, 1), {1: Prediction(order=0, share=0.25)}).calls
        2
    """

    computed: tuple[int, ...]
    predictions: Mapping[int, Prediction]
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

    def written(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "format": FORMAT,
            "sampler": self.sampler,
            "calls": self.calls,
            "computed": "".join(map(str, self.computed)),
            "skipped": {str(j): self.predictions[j].written() for j in sorted(self.predictions)},
            **super().written(),
        }

    @classmethod
    def made_of(cls, given: Mapping[str, Any]) -> Profile:
        digits = given.get("computed")
        if not isinstance(digits, str) or not set(digits) <= {"0", "1"} or len(digits) > 2 * LONGEST:
            raise OptionError(
                f"profile: computed={shown(digits)}: accepted is text of 0 and 1, a digit an evaluation, at most 2,000"
            )
        skipped = as_object(given, "skipped")
        names = {str(j): j for j, digit in enumerate(digits) if digit == "0"}
        if strange := [name for name in skipped if name not in names]:
            raise OptionError(f"profile: skipped has {shown(strange[0])}, which computed does not skip")
        predictions = {names[name]: Prediction.read(name, how) for name, how in skipped.items()}
        return cls(tuple(map(int, digits)), predictions, **origin(given))


def _nearest(known: Iterable[N], goal: float) -> N:
    return min(known, key=lambda one: abs(one - goal))


def _between(values: Sequence[float], at: float) -> float:
    """The value at a place between two of them."""
    below = min(int(at), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (at - below) * (values[above] - values[below])


def _rounded(weights: tuple[float, ...]) -> list[float]:
    return [float(f"{weight:.6g}") for weight in weights]
