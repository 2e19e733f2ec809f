"""A tolerance instead of a number of calls: the error of a run is set and the calls follow.

It was tuned on two networks. On others one tolerance is no one error: 0.02 gave 32 to 56 dB on nine networks, Euler and
DPM++ 2M, 20 steps. See docs/tolerance.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branch import Branch
from .clock import Position
from .criteria.base import Criterion, state
from .deferred import DeferredScalar
from .methods.base import Method
from .methods.registry import checked_options
from .options import OptionError, number
from .parametrization import Parametrization
from .plan import Verdict
from .predictors.adaptive_order import AdaptiveOrder
from .run_info import RunInfo


@checked_options
def ForecastTolerance(tolerance: float = 0.02, guidance: float = 7.5, **common: Any) -> Method:
    """Forecast's prediction, skipping while all skips of the run together are expected to leave less than `tolerance`.

    Args:
        tolerance: the error that all skips together may leave in the result, as a share of the latent's scale. 0 never
            skips.
        guidance: the scale of guidance, uncond + guidance (cond - uncond), if the two are seen apart.
        **common: every option of `Method` but skip="uncond".
    """
    if common.get("skip") == "uncond":
        raise OptionError(
            f"tolerance={tolerance!r}, skip='uncond': a tolerance counts errors of every branch; with "
            "skip='uncond' use Forecast(interval)"
        )
    rule = ToleranceRule(tolerance, guidance)
    chosen = {"criterion": rule, "predictor": AdaptiveOrder(), "last_step": True, "name": "forecast-tolerance"}
    return Method(**{**chosen, **common})


Place = tuple[int, float]
"""An evaluation's number in the run, counted from 0, and its coordinate."""


class _Miss(NamedTuple):
    """A computed evaluation: its place, those of the last two computed before it, and how far a prediction was off.

    `path` has the newest first.
    """

    path: tuple[Place | None, ...]
    off: DeferredScalar | None
    size: DeferredScalar | None


@dataclass
class ToleranceRule(Criterion):
    """Skips as long as all skips of the run together are expected to leave no more than `tolerance` in the result.

    The error is the rms over a sample, as a share of the latent's scale (1 at every sigma), mean over the batch. With
    e_k how far the guided prediction of evaluation k is off, the latent at the end of the run is expected to be off by

        E = 0.4 sqrt(sum over gaps (sum over skips k of the gap of u_k e_k)^2)

    u_k the change of the scaled latent by one unit of output over the step (`error_gain`):
    |d sigma| / sqrt(sigma^2 + 1) for a network that predicts noise, |dt| / sqrt(t^2 + (1 - t)^2) for a flow. Errors of
    one gap add up, those of different gaps in squares. The factor 0.4 accounts for damping in the rest of the run and
    for errors that cancel. After every computed evaluation n, with a and b the two before it,

        e_k = r |(s_k - s_a) (s_k - s_b)|,   r = e_n / |(s_n - s_a) (s_n - s_b)|

    in the run's coordinate s, e_n measured. This corrects the gap that n closed, and estimates the skips ahead. (Of a
    single evaluation a: without the second factor. Before e_n is known: half of the guided residual's rms.)

    A gap of m evaluations is one computed and m - 1 skipped. Next comes the m from 1 to (gap before) + 1 that lets the
    rest of the run do with the fewest calls, if its other gaps are as long as they can be without a larger error than
    this one's; of equals the one with the least E. E at the end must not exceed `tolerance`, nor this gap's square a
    third of what is left of tolerance^2; a longer gap than the one before counts with 1.5 e_k. Where no m fits, or
    the schedule is not known, everything is computed.

    One decision for the batch. It needs the run's schedule and parametrization. Of several branches without a cond
    and an uncond among them the first alone is judged, and the report says so.
    Steps with two evaluations are taken for two of half the length, the second at the step's end.

    Args:
        tolerance: 0 never skips. Default 0.02.
        guidance: the scale of uncond + guidance (cond - uncond). Default 7.5.

    Keeps one latent a branch, at first two, until the next evaluation. Source: ours; measured in docs/tolerance.md.
    """

    tolerance: float = 0.02
    guidance: float = 7.5

    spent: float = state(0.0)
    gap: int = state(2)
    due: int = state(0)
    rate: float | None = state(None)
    size: float = state(0.0)
    path: tuple[Place, ...] = state(())
    places: _Places = state(factory=lambda: _Places())
    _where: Position | None = state(None)
    _path: tuple[Place | None, ...] = state(())
    _offs: dict[str, Tensor | None] = state(factory=dict)
    _residuals: dict[str, Tensor] = state(factory=dict)
    _misses: list[_Miss] = state(factory=list)

    def __post_init__(self) -> None:
        number("tolerance", self.tolerance, high=1e6)
        number("guidance", self.guidance, low=-1e6, high=1e6)

    @property
    def never_skips(self) -> bool:
        return self.tolerance == 0

    def begin(self, run: RunInfo) -> ToleranceRule:
        rule = super().begin(run)
        rule.places = _Places.of(run)
        if not rule.places.known:
            run.notes.append("tolerance: everything is computed, for the run's schedule or its scale is not known")
        return rule

    def update_any(self, name: str, branch: Branch) -> None:
        if not self.places.known:
            return
        if self._where is not branch.position:
            self._close(branch)
            self._where = branch.position
            before = [entry.position for entry in list(branch.history)[:-3:-1]]
            self._path = tuple(self._place(branch, position) for position in (branch.position, *before))
        predicted = branch.prediction
        self._offs[name] = None if predicted is None else predicted - branch.out
        if self.rate is None:
            self._residuals[name] = branch.out - branch.x

    def _place(self, branch: Branch, position: Position) -> Place | None:
        index, coordinate = self.places.index(position), branch.coordinate(position)
        return None if index is None or coordinate is None else (index, coordinate)

    def _close(self, branch: Branch) -> None:
        """Turns what the branches of the last computed evaluation showed into numbers, on the device."""
        if self._where is None:
            return
        offs = {name: off for name, off in self._offs.items() if off is not None}
        off = branch.defer(self._guided(offs, branch)) if len(offs) == len(self._offs) else None
        size = branch.defer(self._guided(self._residuals, branch)) if self._residuals else None
        self._misses.append(_Miss(self._path, off, size))
        self._where = None
        self._offs.clear()
        self._residuals.clear()

    def _guided(self, parts: dict[str, Tensor], branch: Branch) -> Tensor:
        """rms of uncond + guidance (cond - uncond) if both are there; else of the one there is, or the first.

        Of batches of different sizes, which cannot be subtracted, the most that it can be.
        """
        if not {"cond", "uncond"} <= parts.keys():
            sentence = (
                f"tolerance: of {', '.join(parts)} the first alone is judged, for which of them are cond and uncond is "
                "not known"
            )
            if len(parts) > 1 and sentence not in branch.run.notes:
                branch.run.notes.append(sentence)
            return _rms(next(iter(parts.values())))
        if parts["cond"].shape != parts["uncond"].shape:
            return abs(self.guidance) * _rms(parts["cond"]) + abs(self.guidance - 1) * _rms(parts["uncond"])
        return _rms(torch.lerp(parts["uncond"], parts["cond"], self.guidance))

    def decide(self, branch: Branch) -> Verdict:
        index = self.places.index(branch.position)
        if index is None or self._where is branch.position:  # another branch has been computed here already
            return Verdict(False, threshold=self.tolerance)
        self._close(branch)
        for miss in self._misses:
            self._learn(miss)
        if self._misses and self.path:
            self._plan()
        self._misses.clear()
        if not self.path:
            return Verdict(False, threshold=self.tolerance)
        ahead = self._error(self.path, index + 1 - self.path[0][0])
        estimate = SHARE * math.sqrt(self.spent + ahead**2)
        return Verdict(index < self.due and index < self.places.last, estimate, self.tolerance)

    def _learn(self, miss: _Miss) -> None:
        off = None if miss.off is None else float(miss.off)
        self.size = self.size if miss.size is None else float(miss.size)
        path = tuple(place for place in miss.path if place is not None)
        if len(path) < len(miss.path):
            self.path, self.rate = (), None  # off the schedule: begin again
            return
        (index, here), *before = path
        if off is not None and before:
            reach = math.prod(abs(here - there) for _, there in before)
            if reach > 0:
                self.rate = off / reach
            if self.rate is not None:
                self.spent += self._error(tuple(before), index - before[0][0]) ** 2
        self.path = path[:2] if self.rate is not None and len(before) > 1 else path[:1]

    def _error(self, path: tuple[Place, ...], gap: int) -> float:
        """What a gap after path[0] leaves in the latent: the sum of u_k e_k over its skips."""
        first, last = path[0][0] + 1, min(path[0][0] + gap, self.places.last)
        return sum(self._skip(path, k) for k in range(first, last))

    def _skip(self, path: tuple[Place, ...], k: int) -> float:
        error_gain = self.places.error_gains[k]
        if self.rate is None:
            return error_gain * self.size / 2
        return error_gain * self.rate * math.prod(abs(self.places.coordinates[k] - there) for _, there in path)

    def _plan(self) -> None:
        """Chooses the gap after the evaluation computed last."""
        allowed = (self.tolerance / SHARE) ** 2
        left = allowed - self.spent
        best = None
        for gap in range(1, 3 if self.rate is None else self.gap + 2):
            margin = 1 if self.rate is None or gap <= max(self.gap, 1) else MARGIN
            first = margin * self._error(self.path, gap)
            if not first**2 <= left * LARGEST:
                continue
            calls, total = self._rest(gap, margin)
            if total <= left and (best is None or (calls, total) < best[:2]):
                best = calls, total, gap
        self.gap = best[2] if best else 1
        self.due = self.path[0][0] + self.gap if self.path else 0

    def _rest(self, gap: int, margin: float) -> tuple[int, float]:
        """(calls, sum of squared errors) of the rest of the run, with gaps of no larger error than this one's."""
        if self.rate is None:
            return -gap, self._error(self.path, gap) ** 2
        path, last, calls, total = self.path, self.places.last, 0, 0.0
        error = limit = self._error(path, gap)
        while path[0][0] < last:
            total, calls = total + (margin * error) ** 2, calls + 1
            end = min(path[0][0] + gap, last)
            path = ((end, self.places.coordinates[end]), *path[: len(self.path) - 1])
            gap, error = 1, 0.0
            while end + gap < last and error + (skip := self._skip(path, end + gap)) <= limit * (1 + 1e-4):
                gap, error = gap + 1, error + skip
        return calls, total


SHARE, MARGIN, LARGEST = 0.4, 1.5, 1 / 3
"""`ToleranceRule`'s constants: the same for every model; how they were found is in docs/tolerance.md."""


@dataclass(frozen=True)
class _Places:
    """The evaluations of a run, as far as the schedule is known: each one's coordinate and error gain, and the last."""

    coordinates: tuple[float, ...] = ()
    error_gains: tuple[float, ...] = ()
    stages: int = 1

    @classmethod
    def of(cls, run: RunInfo) -> _Places:
        """Not `known` if the schedule or the parametrization is not, or if a coordinate is not finite."""
        if run.schedule is None or run.parametrization is None or len(run.schedule) < 2:
            return cls()
        stages = 2 if run.stages == 2 else 1
        coordinates, error_gains = [], []
        try:
            for here, there in zip(run.schedule, run.schedule[1:], strict=False):
                halves = (here, there) if stages == 2 and there > 0 else (here,)
                for sigma in halves:
                    coordinates.append(float(run.coordinate(sigma)))
                    error_gains.append(error_gain(run.parametrization(sigma), sigma) * abs(here - there) / len(halves))
        except (ValueError, ArithmeticError):
            return cls()
        sound = all(map(math.isfinite, (*coordinates, *error_gains)))
        return cls(tuple(coordinates), tuple(error_gains), stages) if sound else cls()

    @property
    def known(self) -> bool:
        return bool(self.coordinates)

    @property
    def last(self) -> int:
        return len(self.coordinates) - 1

    def index(self, position: Position) -> int | None:
        """The place of an evaluation in these lists; None if it is not one of them."""
        if position.step is None or position.step < 0 or position.stage >= self.stages:
            return None
        index = position.step * self.stages + position.stage
        return index if index <= self.last else None


def error_gain(meaning: Parametrization, sigma: float) -> float:
    """How fast the latent, scaled to 1, changes with sigma for one unit of the network's output:

        |denoised[1]| / sigma / sqrt(sigma^2 + data^2)

    data is 1 - sigma for a flow whose t is sigma itself (denoised = x - sigma out), else 1.
    """
    flow = meaning.derivative == (0, 1) and math.dist(meaning.denoised, (1, -sigma)) < 1e-6 * sigma
    return abs(meaning.denoised[1]) / sigma / math.hypot(sigma, 1 - sigma if flow else 1)


def _rms(x: Tensor) -> Tensor:
    """The rms over each sample, mean over the batch (0-dimensional)."""
    return x.flatten(1).square().mean(1).sqrt().mean()
