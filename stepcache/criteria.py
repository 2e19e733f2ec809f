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

from torch import Tensor

from .branch import Branch
from .deferred import DeferredScalar
from .gates import RunInfo
from .options import flag, number
from .probe import Blocks

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
    """Decides about one branch (the reference) through one run."""

    never_skips: bool = False
    """True where these options can never skip: then the model is called directly, without any bookkeeping."""

    blocks: Blocks | None = None
    """The blocks of the model that it looks at: it is then asked when the forward has passed them."""

    def begin(self, run: RunInfo) -> Criterion:
        """A fresh copy for one run: nothing learned in one run reaches another."""
        return deepcopy(self)

    @abstractmethod
    def decide(self, branch: Branch) -> Verdict:
        """Asked for every evaluation that the gates let through and that has a memory to predict from.

        Reading several numbers of `branch` costs one device-to-host transfer if they are all requested before the
        first `float()`.
        """

    def observe(self, branch: Branch, forced: bool) -> None:
        """Told of every computed evaluation inside the window; `forced` if a gate held it and `decide` was not asked.

        Keep readings here and turn them into floats in `decide`: then computed evaluations wait for nothing.
        """

    def witness(self, name: str, branch: Branch) -> None:
        """Told of every computed evaluation of every branch, also of those that follow; before `observe`.

        For rules that look at several branches together, as guidance does. One of a call of its own comes later than
        the reference's `observe`, and before the next `decide`.
        """


@dataclass
class Always(Criterion):
    """Skips whatever the gates let through: with a mask, the static policy."""

    def decide(self, branch: Branch) -> Verdict:
        return Verdict(True)


@dataclass
class Never(Criterion):
    """Computes everything."""

    never_skips = True

    def decide(self, branch: Branch) -> Verdict:
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
    size: DeferredScalar | None = state()

    def __post_init__(self) -> None:
        number("threshold", self.threshold)
        number("at_input", self.at_input)

    @property
    def never_skips(self) -> bool:
        return self.threshold == 0

    def decide(self, branch: Branch) -> Verdict:
        threshold = self.threshold * (self.at_input if branch.signal is branch.x else 1.0)
        if self.kept is None:
            return Verdict(False, threshold=threshold)
        if branch.signal is None or branch.signal.shape != self.kept.shape:
            return Verdict(False, threshold=threshold, reason=INVALID_STATE)
        change, size = branch.signal_change(self.kept), self.size
        share = float(change) / float(size) if float(size) > 0 else math.inf
        if not math.isfinite(share):
            return Verdict(False, threshold=threshold, reason=INVALID_STATE)
        return Verdict(share < threshold, share, threshold)

    def observe(self, branch: Branch, forced: bool) -> None:
        self.kept = branch.signal
        self.size = None if branch.signal is None else branch.signal_size


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
    _unread: list[tuple[DeferredScalar, DeferredScalar | None, DeferredScalar | None]] = field(default_factory=list)
    _begun: bool = False

    def observe(self, branch: Branch) -> None:
        if self._begun:
            self._unread.append((branch.size, branch.output_change, branch.input_change))
        else:
            self._unread.append((branch.size, None, None))
        self._begun = True

    def expect(self, branch: Branch) -> float | None:
        """k mean |x - x_c|, the change of output expected since c; None where it cannot be told."""
        change = branch.input_change if self._begun else None
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

    def decide(self, branch: Branch) -> Verdict:
        change = self.response.expect(branch)
        if change is None:
            return Verdict(False, threshold=self.threshold)
        self.error += change / self.response.norm
        return Verdict(self.error < self.threshold, self.error, self.threshold)

    def observe(self, branch: Branch, forced: bool) -> None:
        self.response.observe(branch)
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

    def decide(self, branch: Branch) -> Verdict:
        change = self.response.expect(branch)
        norm, average = self.response.norm, self.response.average
        threshold = self.threshold * self._progress_factor(branch.run.evaluations) * (1 if self.relative else norm)
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

    def observe(self, branch: Branch, forced: bool) -> None:
        self.response.observe(branch)
        self.computed += 1
        self.skips = 0
        if forced and self.reset:
            self.error = 0.0

    def _progress_factor(self, evaluations: int | None) -> float:
        if evaluations is None:
            return 1.0
        progress = self.computed / evaluations
        return 0.5 if progress < 0.2 else 1.5 if progress > 0.8 else 1.0
