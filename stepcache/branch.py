"""One branch of guidance in one evaluation, and the cache of what it computed before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .clock import Position
from .deferred import DeferredScalar, DeferredScalars, mean_abs, mean_abs_difference, some_rows
from .offload import KeptTensor, Offloaded
from .parametrization import Parametrization
from .run_info import RunInfo


@dataclass(frozen=True)
class CacheEntry:
    """One computed evaluation of one branch, in the network's own space.

    Attributes:
        position: run, step and evaluation.
        coordinate: its place in `RunInfo.coordinate`, None if that is not finite.
        x: the network's input (x c_in), or the baseline that replaced it (`Branch.rebase`); in the latents' dtype, or
            in the method's.
        out: the network's raw output, in the same dtype.
        size: mean |out|.
        backtest_errors: the predictor's own, one for each order.
        index: its place in the schedule (`RunInfo.index`).
        parametrization: what x and out mean there.
        noise: the noise level (B,), if it was measured.
    """

    position: Position
    coordinate: float | None
    if TYPE_CHECKING:
        x: Tensor
        out: Tensor
    else:
        x: KeptTensor = KeptTensor()
        out: KeptTensor = KeptTensor()
    size: DeferredScalar
    backtest_errors: Tensor | None = None
    index: float | None = None
    parametrization: Parametrization = Parametrization()
    noise: Tensor | None = None

    def offloaded(self) -> CacheEntry:
        """The same with its tensors in the host's memory."""
        entry = copy(self)
        for name in ("x", "out"):
            if not isinstance(kept := self.__dict__[name], Offloaded):
                entry.__dict__[name] = Offloaded(kept)
        return entry

    def some_rows(self) -> CacheEntry:
        """The same entry with `deferred.some_rows` of its tensors."""
        return replace(self, x=some_rows(self.x), out=some_rows(self.out))


History = deque[CacheEntry]


class Branch:
    """One branch in one evaluation. Everything is measured when it is first asked for.

    Attributes:
        name: what the host calls it.
        position: run, step and evaluation.
        run: what was known of the run when it began.
        x: the network's input now, in float32 or wider; after `rebase` the reference branch's output.
        history: the last computed evaluations of this branch, oldest first, as many as the predictor keeps. Not empty
            when a criterion or a predictor is asked.
        out: the network's raw output; RuntimeError before it has been computed.
        rebased: whether x is another branch's output.
        has_baseline: whether it is known what a prediction is relative to.
        noise: how noisy the sampler is, (B,) from 0 to 1 (`noise.FreshNoise`); None if not known or not asked for.
        checked: whether `prediction_error` and `size` are measured for the report.
        signal: what the criterion compares from one evaluation to the next: what the probed blocks add to their input
            (`Criterion.blocks`), None until the forward pass has reached them; x if no blocks are probed.
    """

    def __init__(
        self,
        position: Position,
        run: RunInfo,
        x: Tensor,
        history: Sequence[CacheEntry],
        predictor: Callable[[Branch], Tensor | None],
        deferred: DeferredScalars,
        parametrized: bool = False,
        rounded: Callable[[Tensor], Tensor] = lambda out: out,
        name: str = "",
        needs_history: bool = True,
    ) -> None:
        self.name = name
        self.position = position
        self.run = run
        self.x: Tensor = x
        self.history = history
        self._out: Tensor | None = None
        self.rebased = False
        self.has_baseline = True
        self.noise: Tensor | None = None
        self.signal: Tensor | None = x
        self.checked = False
        self.prediction_error: DeferredScalar | None = None
        self._input = x
        self._predict = predictor
        self._deferred = deferred
        self._parametrized = parametrized
        self._rounded = rounded
        self._needs_history = needs_history

    @property
    def out(self) -> Tensor:
        if self._out is None:
            raise RuntimeError("this branch's output has not been computed yet")
        return self._out

    @out.setter
    def out(self, out: Tensor) -> None:
        self._out = out

    def coordinate(self, position: Position) -> float | None:
        """The place of an evaluation in `RunInfo.coordinate`; None if that is not a finite number, as log 0."""
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
        """What x and out mean here, if the predictor asks for it. Nothing is known of a rebased branch."""
        known = self.run.parametrization if self._parametrized and not self.rebased else None
        return Parametrization() if known is None else known(self.position.sigma)

    def defer(self, number: Tensor) -> DeferredScalar:
        """Registers a number (0-dimensional), to be transferred together with the others."""
        return self._deferred.defer(number)

    def replace_input(self, x: Tensor) -> None:
        """Replaces the input: the host has learnt from its model's answer which part of it the latents are."""
        if self.signal is self.x:
            self.signal = x
        self.x = self._input = x

    def rebase(self, baseline: Tensor | None) -> None:
        """Predicts relative to `baseline`, the reference branch's output, instead of x. None if it is not known yet.

        A baseline of another shape or on another device cannot be used: there is then no prediction.
        """
        usable = baseline is not None and (baseline.shape, baseline.device) == (self._input.shape, self._input.device)
        self.rebased, self.has_baseline = True, usable
        if baseline is not None and usable:
            self.x = baseline

    @property
    def predictable(self) -> bool:
        """Whether there is a prediction, or will be one as soon as the baseline is known."""
        return self.prediction is not None if self.has_baseline else self._may_predict

    @property
    def _may_predict(self) -> bool:
        return bool(self.history) or not self._needs_history

    @property
    def finite(self) -> bool:
        """Whether there is a prediction of which every number is finite; waits for the device."""
        return self.total is not None and math.isfinite(self.total)

    def request(self, *names: str) -> None:
        """Registers measurements by name, so that the first one that is read brings all of them in one transfer."""
        for name in names:
            getattr(self, name)

    @cached_property
    def moved(self) -> Tensor:
        """x - x' with x' the input of the last computed evaluation, in float32 or wider; there must be one."""
        return self.x - self.history[-1].x

    @cached_property
    def input_change(self) -> DeferredScalar | None:
        """mean |x - x'|; None without a computed evaluation."""
        if not self.history:
            return None
        made = "moved" in self.__dict__  # for the prediction
        return self.defer(mean_abs(self.moved) if made else mean_abs_difference(self.x, self.history[-1].x))

    @cached_property
    def prediction(self) -> Tensor | None:
        """The raw output that the predictor expects here; None if it cannot tell."""
        return self._predict(self) if self._may_predict and self.has_baseline else None

    def predict(self) -> Tensor:
        """The prediction that a skipped evaluation returns; RuntimeError without one."""
        if self.prediction is None:
            raise RuntimeError("this branch cannot be predicted: ask `predictable` first")
        return self.prediction

    @cached_property
    def total(self) -> DeferredScalar | None:
        """The sum of the prediction, finite if the prediction is, as the host gets it; None without one."""
        if self.prediction is None:
            return None
        return self.defer(self._rounded(self.prediction).sum(dtype=self.prediction.dtype))

    @cached_property
    def size(self) -> DeferredScalar:
        """mean |out| of the computed output."""
        return self.defer(mean_abs(self.out))

    @cached_property
    def output_change(self) -> DeferredScalar | None:
        """mean |out - out'| with out' the last computed output before this one; None without one."""
        return self.defer(mean_abs_difference(self.out, self.history[-1].out)) if self.history else None

    def measure_error(self) -> None:
        """Measures how far a prediction is off, now that the output is known: before it joins the cache.

        mean |prediction - out| on `some_rows`, because it is only for the report. None without a prediction.
        """
        self.checked = True
        out = some_rows(self.out)
        whole = out is self.out or "prediction" in self.__dict__  # it was needed for the decision
        prediction = self.prediction if whole else self._some_rows().prediction
        if prediction is not None:
            expected = some_rows(prediction) if whole else prediction
            self.prediction_error = self.defer(mean_abs_difference(expected, out))

    def _some_rows(self) -> Branch:
        """This branch before its output was known, on `some_rows` of everything."""
        few = copy(self)
        for measured in ("moved", "input_change", "output_change", "total"):
            few.__dict__.pop(measured, None)
        few.x, few.history = some_rows(self.x), [entry.some_rows() for entry in self.history]
        return few

    def entry(self, storage: torch.dtype, narrower: bool = False) -> CacheEntry:
        """What the cache keeps of this evaluation, once it has been computed.

        In a `narrower` dtype than the latents' a number may become infinite. Its size is then not finite either, and
        nothing is predicted from it.
        """
        x, out = self.x.to(storage), self.out.to(storage)
        size = self.defer(mean_abs(out) + 0 * mean_abs(x)) if narrower else self.size
        return CacheEntry(
            self.position,
            self.coordinate(self.position),
            x,
            out,
            size,
            index=self.index,
            parametrization=self.parametrization,
            noise=self.noise,
        )
