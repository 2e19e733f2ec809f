"""Criteria: whether an evaluation that may be skipped is skipped.

A new one is one class: subclass `Criterion`, write `decide`, and `observe` if it learns from computed evaluations. Its
options are its fields; fields made with `state()` hold what it learns in one run.
"""

from __future__ import annotations

import math
import sys
import warnings
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Blocks
from .gates import Run
from .memory import Evidence
from .options import flag, number
from .readings import Reading
from .timeline import Where

INVALID_STATE = "invalid cache state"
"""Why an evaluation is computed whose signal cannot be compared with the one that was kept."""


class Verdict(NamedTuple):
    """Skip or not, with the numbers that decided it (None where there were none).

    `reason` is what the report says where there is more to say than that the criterion computes.
    """

    skip: bool
    estimate: float | None = None
    threshold: float | None = None
    reason: str | None = None


def state(default: Any = None, factory: Any = None) -> Any:
    """A dataclass field that belongs to a run and not to the options."""
    kind = {"default_factory": factory} if factory else {"default": default}
    return field(init=False, repr=False, compare=False, **kind)


def _outside() -> int:
    """The `stacklevel` at which a warning given by the caller points out of this package, at what the user wrote."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    return level


class Criterion(ABC):
    """Decides about one condition (the anchor) through one run."""

    never_skips: bool = False
    """True where these options can never skip: then the model is called directly, without any bookkeeping."""

    blocks: Blocks | None = None
    """The blocks of the model that it looks at: it is then asked when the forward has passed them."""

    def begin(self, run: Run) -> Criterion:
        """A fresh copy for one run: nothing learned in one run reaches another."""
        return deepcopy(self)

    @abstractmethod
    def decide(self, evidence: Evidence) -> Verdict:
        """Asked for every evaluation that the gates let through and that has a memory to predict from.

        Reading several numbers of `evidence` costs one device-to-host transfer if they are all requested before the
        first `float()`.
        """

    def observe(self, evidence: Evidence, forced: bool) -> None:
        """Told of every computed evaluation inside the window; `forced` if a gate held it and `decide` was not asked.

        Keep readings here and turn them into floats in `decide`: then computed evaluations wait for nothing.
        """

    def witness(self, name: str, evidence: Evidence) -> None:
        """Told of every computed evaluation of every condition, also of those that follow; before `observe`.

        For rules that look at several conditions together, as guidance does. One of a call of its own comes later than
        the anchor's `observe`, and before the next `decide`.
        """


@dataclass
class Always(Criterion):
    """Skips whatever the gates let through: with a mask, the static policy."""

    def decide(self, evidence: Evidence) -> Verdict:
        return Verdict(True)


@dataclass
class Never(Criterion):
    """Computes everything."""

    never_skips = True

    def decide(self, evidence: Evidence) -> Verdict:
        return Verdict(False)


@dataclass
class RelativeChange(Criterion):
    """The rule of First Block Cache and DBCache:

        d = mean |s - s'| / mean |s'|;   skip while d < threshold

    with s the signal now and s' the signal of the last computed evaluation inside the window. The first evaluation
    there is computed. What the signal is: what the first blocks add to their input (`blocks`); of a network without
    blocks the network's input, for which the threshold is multiplied by `at_input`.

    Sources: chengzeyi/Comfy-WaveSpeed (commit 8253745), diffusers' `FirstBlockCacheConfig` (commit 58eb52c0),
    vipshop/cache-dit (commit f86744af); of the input, stable-diffusion.cpp (commit 97d29908).
    Keeps the signal of one call.
    """

    threshold: float = 0.08
    blocks: Blocks | None = None
    at_input: float = 1.0

    kept: Tensor | None = state()
    size: Reading | None = state()

    def __post_init__(self) -> None:
        number("threshold", self.threshold)
        number("at_input", self.at_input)

    @property
    def never_skips(self) -> bool:
        return self.threshold == 0

    def decide(self, evidence: Evidence) -> Verdict:
        threshold = self.threshold * (self.at_input if evidence.signal is evidence.x else 1.0)
        if self.kept is None:
            return Verdict(False, threshold=threshold)
        if evidence.signal is None or evidence.signal.shape != self.kept.shape:
            return Verdict(False, threshold=threshold, reason=INVALID_STATE)
        change, size = evidence.signal_change(self.kept), self.size
        share = float(change) / float(size) if float(size) > 0 else math.inf
        if not math.isfinite(share):
            return Verdict(False, threshold=threshold, reason=INVALID_STATE)
        return Verdict(share < threshold, share, threshold)

    def observe(self, evidence: Evidence, forced: bool) -> None:
        self.kept = evidence.signal
        self.size = None if evidence.signal is None else evidence.signal_size


@dataclass
class Response:
    """How strongly the network's output answers to its input, from the computed evaluations c inside the window.

    rate k   = mean |out_c - out_c'| / mean |x_c - x_c'|     (kept where either is 0 or not finite)
    norm     = mean |out_c|
    average  = 0.8 average + 0.2 mean |out_c - out_c'|        (begins with the first change)
    """

    rate: float | None = None
    norm: float = 0.0
    average: float | None = None
    _unread: list[tuple[Reading, Reading | None, Reading | None]] = field(default_factory=list)
    _begun: bool = False

    def observe(self, evidence: Evidence) -> None:
        if self._begun:
            self._unread.append((evidence.size, evidence.output_change, evidence.input_change))
        else:
            self._unread.append((evidence.size, None, None))
        self._begun = True

    def expect(self, evidence: Evidence) -> float | None:
        """k mean |x - x_c|, the change of output expected since c; None where it cannot be told."""
        change = evidence.input_change if self._begun else None
        self._read()
        if change is None or self.rate is None:
            return None
        moved = float(change)
        return self.rate * moved if moved > 0 and self.norm > 0 else None

    def _read(self) -> None:
        for size, output_change, input_change in self._unread:
            self.norm = float(size)
            if output_change is None:
                continue
            out, moved = float(output_change), float(input_change)
            if not (math.isfinite(out) and out > 0):
                continue
            self.average = out if self.average is None else 0.8 * self.average + 0.2 * out
            if moved > 0 and math.isfinite(moved):
                self.rate = out / moved
        self._unread.clear()


@dataclass
class EasyCacheRule(Criterion):
    """EasyCache's decision, as stable-diffusion.cpp (commit 97d29908) makes it.

    With c the last computed evaluation, k the rate and norm of `Response`:

        E <- E + k mean |x - x_c| / norm;   skip while E < threshold, else compute;   E <- 0 after every computed one

    The paper's repository (H-EmbodVis/EasyCache) measures the input change against the previous step, skipped or not;
    this form, also ComfyUI's, measures it against the last computed one, which is stricter at the same threshold.
    """

    threshold: float = 0.2

    error: float = state(0.0)
    response: Response = state(factory=Response)

    def __post_init__(self) -> None:
        number("threshold", self.threshold)

    @property
    def never_skips(self) -> bool:
        return self.threshold == 0

    def decide(self, evidence: Evidence) -> Verdict:
        change = self.response.expect(evidence)
        if change is None:
            return Verdict(False, threshold=self.threshold)
        self.error += change / self.response.norm
        return Verdict(self.error < self.threshold, self.error, self.threshold)

    def observe(self, evidence: Evidence, forced: bool) -> None:
        self.response.observe(evidence)
        self.error = 0.0


@dataclass
class UCacheRule(Criterion):
    """UCache's decision, as stable-diffusion.cpp (commit 97d29908) makes it.

    With c the last computed evaluation, k, norm and average of `Response`, m the skips since c, n the evaluations of
    the run (its steps, for samplers with one evaluation a step):

        a = k mean |x - x_c| / sqrt(max(norm, 1e-6) max(1.6 average, 1e-6))    (relative; norm for 1.6 average at first)
        a = k mean |x - x_c|                                                   (not relative: threshold times norm)
        E <- decay E + a (1 + m / 2);   skip while E < f threshold, else compute, and E <- 0 if reset
        f = 0.5 while fewer than 0.2 n evaluations were computed inside the window, 1.5 above 0.8 n, else 1

    Without a known schedule f = 1. The published n is the number of steps even where there are two evaluations a step,
    of which it then sees the second only; `evaluations="second"` does the same.
    """

    threshold: float = 1.0
    decay: float = 1.0
    relative: bool = True
    reset: bool = True

    error: float = state(0.0)
    skips: int = state(0)
    computed: int = state(0)
    response: Response = state(factory=Response)

    def __post_init__(self) -> None:
        number("threshold", self.threshold)
        number("decay", self.decay, high=1.0)
        self.relative, self.reset = flag("relative", self.relative), flag("reset", self.reset)
        if not self.reset and self.decay == 1 and self.threshold > 0:
            warnings.warn(
                "UCache with reset=0 and decay=1: the error only grows, so after the first failed test little or "
                "nothing is skipped. Set decay below 1 (0.9, say), or keep reset=1.",
                stacklevel=_outside(),
            )

    @property
    def never_skips(self) -> bool:
        return self.threshold == 0

    def decide(self, evidence: Evidence) -> Verdict:
        change = self.response.expect(evidence)
        norm, average = self.response.norm, self.response.average
        threshold = self.threshold * self._progress_factor(evidence.run.evaluations) * (1 if self.relative else norm)
        if change is None:
            return Verdict(False, threshold=threshold)
        if self.relative:
            scale = max(norm, 1e-6)
            change /= math.sqrt(scale * (scale if average is None else max(1.6 * average, 1e-6)))
        self.error = self.error * self.decay + change * (1 + 0.5 * self.skips)
        verdict = Verdict(self.error < threshold, self.error, threshold)
        if verdict.skip:
            self.skips += 1
        elif self.reset:
            self.error = 0.0
        return verdict

    def observe(self, evidence: Evidence, forced: bool) -> None:
        self.response.observe(evidence)
        self.computed += 1
        self.skips = 0
        if forced and self.reset:
            self.error = 0.0

    def _progress_factor(self, evaluations: int | None) -> float:
        if evaluations is None:
            return 1.0
        progress = self.computed / evaluations
        return 0.5 if progress < 0.2 else 1.5 if progress > 0.8 else 1.0


class _Miss(NamedTuple):
    """A computed evaluation: where it stood, where the last two computed before it did, and how far a prediction was
    off. `path` holds (place, coordinate), the newest first."""

    path: tuple[tuple[int | None, float | None], ...]
    off: Reading | None
    size: Reading | None


@dataclass
class ToleranceRule(Criterion):
    """Skips as long as all skips of the run together are expected to leave no more than `tolerance` in the result.

    The error is the rms over a sample, as a share of the latent's scale (1 at every sigma), mean over the batch. With
    e_k how far the guided prediction of evaluation k is off, the latent at the end of the run is expected to be off by

        E = 0.4 sqrt(sum over gaps (sum over skips k of the gap of u_k e_k)^2)

    u_k the change of the scaled latent by one unit of output over the step (`Run.exposure`): |d sigma| /
    sqrt(sigma^2 + 1) for a network that predicts noise, |dt| / sqrt(t^2 + (1 - t)^2) for a flow. Errors of one gap add
    up, those of different gaps in squares. 0.4 stands for what the rest of the run damps, and for what
    errors of different gaps undo of each other. After every computed evaluation n, with a and b the two before it,

        e_k = r |(s_k - s_a) (s_k - s_b)|,   r = e_n / |(s_n - s_a) (s_n - s_b)|

    in the run's coordinate s, e_n measured. This corrects the gap that n closed, and estimates the skips ahead. (Of a
    single evaluation a: without the second factor. Before e_n is known: half of the guided residual's rms.)

    A gap of m evaluations is one computed and m - 1 skipped. Next comes the m from 1 to (gap before) + 1 that lets the
    rest of the run do with the fewest calls, if its other gaps are as long as they can be without a larger error than
    this one's; of equals the one with the least E. E at the end must not exceed `tolerance`, nor this gap's square a
    third of what is left of tolerance^2; a longer gap than the one before counts with 1.5 e_k. Where no m fits, or
    the schedule is not known, everything is computed.

    One decision for the batch. It needs what it says of `Run`: schedule, exposure and guidance. Of
    several conditions without a cond and an uncond among them the first alone is judged, and the report says so.
    Steps with two evaluations are taken for two of half the length, the second at the step's end.

    Args:
        tolerance: 0.005 reached 48 to 54 dB, 0.01 45 to 49 dB, 0.02 40 to 45 dB, where latents lie in [-1, 1]. 0 never
            skips. Default 0.02.

    Keeps one latent a condition, at first two, until the next evaluation. Source: ours; measured in docs/tolerance.md.
    """

    tolerance: float = 0.02

    spent: float = state(0.0)
    gap: int = state(2)
    due: int = state(0)
    rate: float | None = state(None)
    size: float = state(0.0)
    path: tuple[tuple[int, float], ...] = state(())
    places: _Places | None = state(None)
    _where: Where | None = state(None)
    _path: tuple[tuple[int | None, float | None], ...] = state(())
    _offs: dict[str, Tensor | None] = state(factory=dict)
    _residuals: dict[str, Tensor] = state(factory=dict)
    _misses: list[_Miss] = state(factory=list)
    _guidance: float | None = state(None)

    def __post_init__(self) -> None:
        number("tolerance", self.tolerance)

    @property
    def never_skips(self) -> bool:
        return self.tolerance == 0

    def begin(self, run: Run) -> ToleranceRule:
        rule = super().begin(run)
        rule.places, rule._guidance = _Places.of(run), run.guidance
        if rule.places is None:
            run.notes.append("tolerance: everything is computed, for the run's schedule or its scale is not known")
        return rule

    def witness(self, name: str, evidence: Evidence) -> None:
        if self.places is None:
            return
        if self._where is not evidence.where:
            self._close(evidence)
            self._where = evidence.where
            nodes = [node.where for node in list(evidence.history)[:-3:-1]]
            self._path = tuple((self.places.index(w), evidence.coordinate(w)) for w in (evidence.where, *nodes))
        predicted = evidence.prediction
        self._offs[name] = None if predicted is None else predicted - evidence.out
        if self.rate is None:
            self._residuals[name] = evidence.out - evidence.x

    def _close(self, evidence: Evidence) -> None:
        """Turns what the conditions of the last computed evaluation showed into numbers, on the device."""
        if self._where is None:
            return
        known = all(off is not None for off in self._offs.values())
        off = evidence.take(self._guided(self._offs, evidence)) if known else None
        size = evidence.take(self._guided(self._residuals, evidence)) if self._residuals else None
        self._misses.append(_Miss(self._path, off, size))
        self._where = None
        self._offs.clear()
        self._residuals.clear()

    def _guided(self, parts: dict[str, Tensor], evidence: Evidence) -> Tensor:
        """rms of uncond + guidance (cond - uncond) where both are there; else of the one there is, or the first.

        Of batches of different sizes, which cannot be subtracted, the most that it can be.
        """
        if not {"cond", "uncond"} <= parts.keys():
            sentence = (
                f"tolerance: of {', '.join(parts)} the first alone is judged, for which of them are cond and uncond is "
                "not known"
            )
            if len(parts) > 1 and sentence not in evidence.run.notes:
                evidence.run.notes.append(sentence)
            return _rms(next(iter(parts.values())))
        if self._guidance is None:
            self._guidance = USUAL_GUIDANCE
            sentence = f"tolerance: the guidance scale is not known, {USUAL_GUIDANCE:g} is taken; name it (guidance=)"
            evidence.run.notes.append(sentence)
        if parts["cond"].shape != parts["uncond"].shape:
            return abs(self._guidance) * _rms(parts["cond"]) + abs(self._guidance - 1) * _rms(parts["uncond"])
        return _rms(torch.lerp(parts["uncond"], parts["cond"], self._guidance))

    def decide(self, evidence: Evidence) -> Verdict:
        index = None if self.places is None else self.places.index(evidence.where)
        if index is None or self._where is evidence.where:  # another condition has been computed here already
            return Verdict(False, threshold=self.tolerance)
        self._close(evidence)
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
        path = tuple(place for place in miss.path if None not in place)
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

    def _error(self, path: tuple[tuple[int, float], ...], gap: int) -> float:
        """What a gap after path[0] leaves in the latent: the sum of u_k e_k over its skips."""
        first, last = path[0][0] + 1, min(path[0][0] + gap, self.places.last)
        return sum(self._skip(path, k) for k in range(first, last))

    def _skip(self, path: tuple[tuple[int, float], ...], k: int) -> float:
        exposure = self.places.exposures[k]
        if self.rate is None:
            return exposure * self.size / 2
        return exposure * self.rate * math.prod(abs(self.places.coordinates[k] - there) for _, there in path)

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


SHARE, MARGIN, LARGEST, USUAL_GUIDANCE = 0.4, 1.5, 1 / 3, 7.5
"""`ToleranceRule`'s constants: the same for every model; how they were found stands in docs/tolerance.md."""


@dataclass(frozen=True)
class _Places:
    """The evaluations of a run, as far as the schedule tells: coordinate and exposure of each, and the last one."""

    coordinates: tuple[float, ...]
    exposures: tuple[float, ...]
    stages: int

    @classmethod
    def of(cls, run: Run) -> _Places | None:
        """None where the schedule or the exposure is not known, or a coordinate is not finite."""
        if run.schedule is None or run.exposure is None or len(run.schedule) < 2:
            return None
        stages = 2 if run.stages == 2 else 1
        coordinates, exposures = [], []
        try:
            for here, there in zip(run.schedule, run.schedule[1:], strict=False):
                halves = (here, there) if stages == 2 and there > 0 else (here,)
                for sigma in halves:
                    coordinates.append(float(run.coordinate(sigma)))
                    exposures.append(float(run.exposure(sigma)) * abs(here - there) / len(halves))
        except (ValueError, ArithmeticError):
            return None
        sound = all(map(math.isfinite, (*coordinates, *exposures)))
        return cls(tuple(coordinates), tuple(exposures), stages) if sound else None

    @property
    def last(self) -> int:
        return len(self.coordinates) - 1

    def index(self, where: Where) -> int | None:
        """The place of an evaluation in these lists; None where it is not one of them."""
        if where.step is None or where.step < 0 or where.stage >= self.stages:
            return None
        index = where.step * self.stages + where.stage
        return index if index <= self.last else None


def _rms(x: Tensor) -> Tensor:
    """The rms over each sample, mean over the batch (0-dimensional)."""
    return x.flatten(1).square().mean(1).sqrt().mean()
