"""What became of one branch at one evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .clock import Position
from .deferred import DeferredScalar


@dataclass
class Event:
    """What was decided for one branch at one evaluation.

    `estimate` and `threshold` are the criterion's numbers, None if it was not asked or had none.
    `prediction_error`, on computed evaluations of a deciding branch, is mean |prediction - output| and `size` mean
    |output|, in network space: how far a skip would have been off.
    """

    position: Position
    branch: str
    computed: bool
    reason: str
    estimate: float | None = None
    threshold: float | None = None
    prediction_error: DeferredScalar | None = None
    size: DeferredScalar | None = None

    @property
    def error_share(self) -> float | None:
        """`prediction_error` as a share of `size`; None if the prediction was not checked, or not finite."""
        if self.prediction_error is None or self.size is None:
            return None
        error, size = float(self.prediction_error), float(self.size)
        return error / size if size > 0 and math.isfinite(error / size) else None
