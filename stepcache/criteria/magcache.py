"""MagCache's rule, and the ratios that it is calibrated with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..branch import Branch
from ..deferred import widened
from ..options import OptionError, flag, number
from ..plan import Verdict
from ..report import Report
from ..run_info import RunInfo
from .base import Criterion, state

CALIBRATION = "calibration: ratios="
"""How the report's note with the ratios begins; what follows is their text."""


@dataclass
class MagCacheRule(Criterion):
    """MagCache's decision. With g_n the ratio of evaluation n and N the evaluations of the run:

        a <- a g_n,   E <- E + |1 - a|,   m <- m + 1
        skip while E <= threshold and m <= max_skip_steps, else compute;   a = 1, E = 0, m = 0 after every computed one
        g_n = mean over the batch of |r_n| / (|r_(n-1)| + 1e-8),   r = out - x,   g_0 = 1,   of a calibration run

    The first floor(retention_ratio N + 1/2) evaluations are computed. Ratios of a run of other length are taken from
    the nearest place, g_round(n (len - 1) / (N - 1)). If N is not known it is the number of ratios; evaluations past
    them are computed. The latents are not looked at: the calls are known before the run.

    |r| is the root of the sum of squares over a sample. Published is the ratio at each token and its mean over them, of
    the residual of a transformer's blocks, which has a thousand channels and more. The network's residual has the few
    channels of a latent, and the ratio at one place is mostly chance: on the shipped DiT its mean jumps between 1.06
    and 2.06, while that of whole samples falls evenly from 1.05 to 1.03 and is the same to 0.2 % for other seeds.
    Published ratios (diffusers' `FLUX_MAG_RATIOS`) are of the blocks' residual and do not fit here: calibrate.

    Args:
        ratios: g_0, g_1, ... as numbers. Empty only with `calibrate`.
        threshold: how much error may accumulate. Default 0.06. 0 never skips.
        max_skip_steps: at most so many skips in a row. Default 3. 0 never skips.
        retention_ratio: the share of the run that is computed first. Default 0.2.
        calibrate: computes everything and writes the ratios into the report's notes; `calibration` reads them.

    Source: arXiv 2506.09045 and diffusers 0.42.1 (`MagCacheConfig`), whose decisions these are.
    """

    ratios: tuple[float, ...] = ()
    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    calibrate: bool = False

    product: float = state(1.0)
    error: float = state(0.0)
    skips: int = state(0)
    measured: dict[int, float] = state(factory=dict)
    _curve: tuple[float, ...] = state(())
    _retained: int = state(0)
    _note: str = state("")

    def __post_init__(self) -> None:
        self.ratios = as_ratios(self.ratios)
        number("threshold", self.threshold)
        number("max_skip_steps", self.max_skip_steps, whole=True)
        number("retention_ratio", self.retention_ratio, high=1.0)
        self.calibrate = flag("calibrate", self.calibrate)
        if not self.ratios and not self.calibrate:
            raise OptionError(
                "ratios='': MagCache needs the ratios of your model and sampler. Run once with calibrate=1, which "
                "computes everything; the report's note 'calibration: ratios=...' has them, as this option takes them"
            )

    @property
    def never_skips(self) -> bool:
        return not self.calibrate and (0 in (self.threshold, self.max_skip_steps) or self.retention_ratio == 1)

    def begin(self, run: RunInfo) -> MagCacheRule:
        rule = super().begin(run)
        count = len(self.ratios) if run.evaluations is None else run.evaluations
        rule._curve = nearest(self.ratios, count)
        rule._retained = int(self.retention_ratio * count + 0.5)
        return rule

    def decide(self, branch: Branch) -> Verdict:
        place = self._place(branch)
        if self.calibrate:
            return Verdict(False, reason="calibration")
        if place is None or place >= len(self._curve):
            return Verdict(False, threshold=self.threshold, reason="no ratio")
        if place < self._retained:
            return Verdict(False, threshold=self.threshold, reason="retention")
        self.product *= self._curve[place]
        self.error += abs(1 - self.product)
        self.skips += 1
        if self.error <= self.threshold and self.skips > self.max_skip_steps:
            return Verdict(False, self.error, self.threshold, "max_skip_steps")
        return Verdict(self.error <= self.threshold, self.error, self.threshold)

    def update(self, branch: Branch, forced: bool) -> None:
        self.product, self.error, self.skips = 1.0, 0.0, 0
        if self.calibrate and (place := self._place(branch)) is not None:
            self.measured[place] = self._ratio(branch)
            self._write(branch.run.notes)

    def _place(self, branch: Branch) -> int | None:
        """Which of the run's evaluations this is; None if the schedule, or the number of stages, is not known."""
        position, run = branch.position, branch.run
        if run.schedule is None:
            return position.evaluation
        stages = 2 if run.stages == 2 else 1
        if position.step is None or position.stage >= stages:
            return None
        return position.step if run.second_only else position.step * stages + position.stage

    def _ratio(self, branch: Branch) -> float:
        if not branch.history:
            return 1.0
        before = branch.history[-1]
        now, then = _magnitude(branch.x, branch.out), _magnitude(before.x, before.out)
        return float(branch.defer((now / (then + 1e-8)).mean()))

    def _write(self, notes: list[str]) -> None:
        """The note with the ratios so far, in the place of the one before."""
        text = CALIBRATION + "/".join(f"{self.measured.get(n, 1.0):.5g}" for n in range(max(self.measured) + 1))
        if self._note in notes:
            notes[notes.index(self._note)] = text
        else:
            notes.append(text)
        self._note = text


MOST = 1e38
"""The highest ratio: any finite one in float32."""


def _magnitude(x: Tensor, out: Tensor) -> Tensor:
    """|out - x| of every sample (B,)."""
    return (widened(out) - x).flatten(1).square_().sum(1).sqrt_()


def nearest(ratios: tuple[float, ...], count: int) -> tuple[float, ...]:
    """The ratios for a run of `count` evaluations, each from the nearest place; for a single one the last."""
    if count < 2 or not ratios:
        return ratios[-1:]
    scale = (len(ratios) - 1) / (count - 1)
    return tuple(ratios[round(n * scale)] for n in range(count))


def as_ratios(given: Any) -> tuple[float, ...]:
    """Ratios from text, or from numbers in a list, a tuple or a tensor. OptionError if they are none."""
    try:
        if isinstance(given, str):
            numbers = [_as_float(word) for word in re.split(r"[\s/;,\[\]]+", given) if word]
        else:
            numbers = given.flatten().tolist() if isinstance(given, Tensor) else list(given)
        return tuple(number("ratios", ratio, high=MOST) for ratio in numbers)
    except (TypeError, ValueError):
        raise OptionError(
            f"ratios={given!r}: accepted are numbers of at least 0 with / between them, as 1/0.98/0.97, or a list"
        ) from None


def _as_float(word: str) -> float:
    if "_" in word:
        raise ValueError
    return float(word)


def calibration(report: Report) -> str:
    """The ratios that a run with `MagCache(calibrate=True)` wrote into its report, as text for `MagCache(ratios=...)`.

    They are the deciding branch's. Raises `OptionError` for a report without.
    """
    for note in report.notes:
        if note.startswith(CALIBRATION):
            return note.removeprefix(CALIBRATION)
    raise OptionError(f"the report of {report.method} has no ratios: run MagCache(calibrate=True) once")
