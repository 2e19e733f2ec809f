"""What a trial tries, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stepcache.profile import Prediction

Places = tuple[int, ...]
Rule = tuple[int, float]


class Choice(NamedTuple):
    """What a trial tries.

    Attributes:
        places: the evaluations that are computed.
        rule: order and share of every prediction; None: each is fitted.
        returns: factors on how far predictions return to the full run, by evaluation; 1 if not named.
    """

    places: Places
    rule: Rule | None = None
    returns: tuple[tuple[int, float], ...] = ()

    @property
    def name(self) -> str:
        """Of its finding in the notebook."""
        rule = "" if self.rule is None else " order {} share {}".format(*self.rule)
        return ",".join(map(str, self.places)) + rule + "".join(f" return {n} {f:g}" for n, f in self.returns)

    def since(self, other: Choice) -> int:
        """Evaluations before this one are the same in both."""
        if self.rule != other.rule:
            return 0
        moved = [n - 1 for n in {*self.places} ^ {*other.places}]
        return min([*moved, *(n for n, _ in {*self.returns} ^ {*other.returns})])


@dataclass(frozen=True)
class Found:
    """One choice, and what came of it on the calibration seeds.

    Attributes:
        choice: what was tried.
        mean: of the metric.
        score: mean - standard deviation / 2, by which choices are compared. The places of the highest mean are too
            often those that happen to suit a few of the seeds.
        predictions: how the other evaluations are predicted.
    """

    choice: Choice
    mean: float
    score: float
    predictions: dict[int, Prediction]

    @property
    def places(self) -> Places:
        """The evaluations that are computed."""
        return self.choice.places
