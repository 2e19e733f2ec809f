"""Predictors: what a skipped evaluation returns, in the network's own space.

A new one is one class: set `memory`, write `predict`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .memory import Evidence


class Predictor(ABC):
    """Predicts the network's raw output from the evaluations computed before."""

    memory: int = 1
    """How many computed evaluations are kept for it, per condition; each costs two latents."""

    finite_where_memory_is: bool = False
    """Whether a prediction from finite outputs is sure to be finite; then a condition that follows the anchor in a
    call of its own need not be checked, which would cost a transfer."""

    @abstractmethod
    def predict(self, evidence: Evidence) -> Tensor | None:
        """The raw output expected for the input `evidence.x`, as a new tensor of its shape and in float32 or wider.

        `evidence.history` holds 1 to `memory` computed evaluations of the same condition and shape, oldest first. None
        where nothing can be told: the evaluation is then computed.
        """


@dataclass(frozen=True)
class Reuse(Predictor):
    """Residual reuse, as UCache, EasyCache and most published caches do:

        out = out' + (x - x')

    with x', out' the network input and raw output of the last computed evaluation. Exact where the network is the
    identity plus a constant; of order 0 in sigma.
    """

    memory = 1
    finite_where_memory_is = True

    def predict(self, evidence: Evidence) -> Tensor:
        return evidence.moved + evidence.history[-1].out
