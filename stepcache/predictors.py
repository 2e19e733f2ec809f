"""Predictors: what a skipped evaluation returns, in the network's own space.

A new one is one class: set `memory`, write `predict`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .memory import Node
from .readings import widened
from .timeline import Where


class Predictor(ABC):
    """Predicts the network's raw output from the evaluations computed before."""

    memory: int = 1
    """How many computed evaluations are kept for it, per condition; each costs two latents."""

    @abstractmethod
    def predict(self, history: Sequence[Node], x: Tensor, where: Where) -> Tensor | None:
        """The raw output expected for the network input `x` (float32 or wider), or None where it cannot tell.

        `history` holds 1 to `memory` computed evaluations of the same condition and shape, oldest first. The result
        has the shape of `x` and is a new tensor.
        """


@dataclass(frozen=True)
class Reuse(Predictor):
    """Residual reuse, as UCache, EasyCache and most published caches do:

        out = x + (out' - x')

    with x', out' the network input and raw output of the last computed evaluation. Exact where the network is the
    identity plus a constant; of order 0 in sigma.
    """

    memory = 1

    def predict(self, history: Sequence[Node], x: Tensor, where: Where) -> Tensor:
        last = history[-1]
        return (widened(last.out) - widened(last.x)).add_(x)
