"""What is remembered of computed evaluations, and what a criterion may look at when it decides about the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .clock import Position
from .deferred import DeferredScalar, DeferredScalars, mean_abs, mean_abs_difference
from .gates import RunInfo
from .parametrization import Parametrization

if TYPE_CHECKING:
    from .predictors import Predictor


@dataclass(frozen=True)
class CacheEntry:
    """One computed evaluation of one branch, in the network's own space.

    `x` is the network's input (x c_in), `out` its raw output, both in the dtype of the latents; `size` is mean |out|;
    `coordinate` is its place in `RunInfo.coordinate`, None where that is not finite, `index` its place in the schedule
    (`RunInfo.index`), `parametrization` what x and out mean there, `noise` the noise level (B,) if it was measured;
    `backtest_errors` is the predictor's own.
    """

    position: Position
    coordinate: float | None
    x: Tensor
    out: Tensor
    size: DeferredScalar
    backtest_errors: Tensor | None = None
    index: float | None = None
    parametrization: Parametrization = Parametrization()
    noise: Tensor | None = None


History = deque[CacheEntry]


class Branch:
    """What is known about one branch of one evaluation. Everything is measured when first asked for.

    Attributes:
        where: the place of the evaluation.
        run: what was known of the run when it began.
        x: the network's input now, in float32 or wider.
        history: the last computed evaluations of this branch, oldest first, as many as the predictor remembers; not
            empty when a criterion or a predictor is asked.
        out: the network's raw output, once it has been computed (in `Criterion.observe`).
        leans: whether this branch is predicted from another's output (`Method.skip`). That then stands for x, here
            and in the memory; x is None until it is known.
        noise: how noisy the sampler is, (B,) from 0 to 1 (`noise.FreshNoise`); None if not known or not asked for.
        signal: what the criterion compares from one evaluation to the next: what the blocks that it looks at add to
            their input (`Criterion.blocks`), None until the forward has got there; without blocks, x.
    """

    def __init__(
        self,
        position: Position,
        run: RunInfo,
        x: Tensor,
        history: Sequence[CacheEntry],
        predictor: Predictor,
        deferred: DeferredScalars,
    ) -> None:
        self.position = position
        self.run = run
        self.x = x
        self.shape, self.device = x.shape, x.device
        self.history = history
        self.out: Tensor | None = None
        self.leans = False
        self.noise: Tensor | None = None
        self.signal: Tensor | None = x
        self._predictor = predictor
        self._deferred = deferred

    def coordinate(self, position: Position) -> float | None:
        """The place of an evaluation in `RunInfo.coordinate`; None where that is not a finite number, as log 0 is not."""
        try:
            value = float(self.run.coordinate(position.sigma))
        except (ValueError, ArithmeticError):
            return None
        return value if math.isfinite(value) else None

    @cached_property
    def index(self) -> float | None:
        """The place of this evaluation in the schedule; see `RunInfo.index`."""
        return self.run.index(self.position)

    @cached_property
    def parametrization(self) -> Parametrization:
        """What x and out mean here, for a predictor that asks. Of a branch that leans on another nothing is known."""
        known = self.run.parametrization if self._predictor.sampler_aware and not self.leans else None
        return Parametrization() if known is None else known(self.position.sigma)

    def defer(self, number: Tensor) -> DeferredScalar:
        """A number measured by the asker (0-dimensional), to come over with the others."""
        return self._deferred.defer(number)

    def lean(self, lead: Tensor | None) -> None:
        """From now on x is another branch's output. One of another shape, or none, cannot be leant on."""
        fits = lead is not None and lead.shape == self.shape and lead.device == self.device
        self.leans, self.x = True, lead if fits else None

    @cached_property
    def moved(self) -> Tensor:
        """x - x' with x' the input of the last computed evaluation, in float32 or wider; there must be one."""
        return self.x - self.history[-1].x

    @cached_property
    def input_change(self) -> DeferredScalar | None:
        """mean |x - x'|; None without a computed evaluation."""
        return self._deferred.defer(mean_abs(self.moved)) if self.history else None

    @cached_property
    def signal_size(self) -> DeferredScalar:
        """mean |signal|."""
        return self._deferred.defer(mean_abs(self.signal))

    def signal_change(self, since: Tensor) -> DeferredScalar:
        """mean |signal - since|."""
        return self._deferred.defer(mean_abs_difference(self.signal, since))

    @cached_property
    def prediction(self) -> Tensor | None:
        """The raw output that the predictor expects here; None where it cannot tell."""
        return self._predictor.predict(self) if self.history and self.x is not None else None

    @cached_property
    def total(self) -> DeferredScalar | None:
        """The sum of the prediction, which is finite where the prediction is; None without one."""
        return None if self.prediction is None else self._deferred.defer(self.prediction.sum())

    @cached_property
    def size(self) -> DeferredScalar:
        """mean |out| of the computed output."""
        return self._deferred.defer(mean_abs(self.out))

    @cached_property
    def output_change(self) -> DeferredScalar | None:
        """mean |out - out'| with out' the last computed output before this one; None without one."""
        return self._deferred.defer(mean_abs_difference(self.out, self.history[-1].out)) if self.history else None

    @cached_property
    def off(self) -> DeferredScalar | None:
        """mean |prediction - out|: how far the prediction would have been off. None without one.

        Measured on every fourth row (of the last dimension but one): it is for the report, and need not cost a pass.
        """
        if self.prediction is None:
            return None
        some = (..., slice(None, None, 4), slice(None)) if self.out.ndim > 2 else ...
        return self._deferred.defer(mean_abs_difference(self.prediction[some], self.out[some]))

    def entry(self, storage: torch.dtype) -> CacheEntry:
        """What to remember of this evaluation, now that it has been computed."""
        place = self.coordinate(self.position)
        return CacheEntry(
            self.position,
            place,
            self.x.to(storage),
            self.out.to(storage),
            self.size,
            index=self.index,
            parametrization=self.parametrization,
            noise=self.noise,
        )
