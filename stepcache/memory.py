"""What is remembered of computed evaluations, and what a criterion may look at when it decides about the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gates import Run
from .readings import Reading, Readings, mean_abs, mean_abs_difference, wide
from .timeline import Where

if TYPE_CHECKING:
    from .predictors import Predictor


@dataclass(frozen=True)
class Node:
    """One computed evaluation of one condition, in the network's own space.

    `x` is the network's input (x c_in), `out` its raw output, both in the dtype of the latents; `size` is mean |out|.
    """

    where: Where
    x: Tensor
    out: Tensor
    size: Reading


History = deque[Node]


class Evidence:
    """What is known about one condition of one evaluation. Everything is measured when first asked for.

    Attributes:
        where: the place of the evaluation.
        run: what was known of the run when it began.
        x: the network's input now, in float32 or wider.
        history: the computed evaluations of this condition, oldest first; not empty when a criterion is asked.
        computed: how many evaluations of the anchor were computed so far in this run.
        out: the network's raw output, once it has been computed (in `Criterion.observe`).
    """

    def __init__(
        self, where: Where, run: Run, x: Tensor, history: Sequence[Node], predictor: Predictor, readings: Readings
    ) -> None:
        self.where = where
        self.run = run
        self.x = x
        self.history = history
        self.out: Tensor | None = None
        self._predictor = predictor
        self._readings = readings

    @cached_property
    def input_change(self) -> Reading | None:
        """mean |x - x'| with x' the input of the last computed evaluation; None without one."""
        return self._readings.take(mean_abs_difference(self.x, self.history[-1].x)) if self.history else None

    @cached_property
    def prediction(self) -> Tensor | None:
        """The raw output that the predictor expects here; None where it cannot tell."""
        return self._predictor.predict(self.history, self.x, self.where) if self.history else None

    @cached_property
    def finite(self) -> Reading | None:
        """1 if the prediction holds neither NaN nor Inf, else 0; None without a prediction."""
        if self.prediction is None:
            return None
        return self._readings.take(torch.isfinite(self.prediction.sum(dtype=wide(self.prediction.dtype))))

    @cached_property
    def size(self) -> Reading:
        """mean |out| of the computed output."""
        return self._readings.take(mean_abs(self.out))

    @cached_property
    def output_change(self) -> Reading | None:
        """mean |out - out'| with out' the last computed output before this one; None without one."""
        return self._readings.take(mean_abs_difference(self.out, self.history[-1].out)) if self.history else None

    @cached_property
    def off(self) -> Reading | None:
        """mean |prediction - out| / mean |out|: how far the prediction would have been off. None without one."""
        if self.prediction is None:
            return None
        error = mean_abs_difference(self.prediction, self.out)
        return self._readings.take(error / mean_abs(self.out))

    def node(self, storage: torch.dtype) -> Node:
        """What to remember of this evaluation, now that it has been computed."""
        return Node(self.where, self.x.to(storage), self.out.to(storage), self.size)
