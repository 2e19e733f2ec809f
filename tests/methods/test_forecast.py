"""Forecast: which evaluations are computed, and what it gains on trained networks."""

from __future__ import annotations

import statistics

import pytest

from stepcache import Forecast, Method
from stepcache.bench import METRICS
from stepcache.demo import sampling
from stepcache.extend import (
    Interval,
    Position,
    Reuse,
    RunInfo,
    SkipCounts,
)


@pytest.mark.parametrize(("n", "expected"), [(1, "CCCCCCC"), (2, "CSCSCSC"), (3, "CSSCSSC"), (4, "CSSSCSS")])
def test_of_n_evaluations_one_is_computed(n, expected):
    answer, counts, decisions = Interval(n).begin(RunInfo()), SkipCounts(), ""
    for index in range(7):
        computed = index == 0 or answer(Position(0, index, 1.0), counts) is not None
        decisions += "C" if computed else "S"
        count(counts, computed)
    assert decisions == expected


def test_the_first_ones_may_all_be_computed():
    answer, counts, decisions = Interval(3, start=2).begin(RunInfo()), SkipCounts(), ""
    for index in range(8):
        computed = index == 0 or answer(Position(0, index, 1.0), counts) is not None
        decisions += "C" if computed else "S"
        count(counts, computed)
    assert decisions == "CCSSCSSC"


@pytest.mark.parametrize(("n", "expected"), [(2, "CCSCSCSCSC"), (3, "CCSSSCSSSC"), (4, "CCSSSCSSSC")])
def test_of_steps_with_two_evaluations_second_ones_are_computed(n, expected):
    answer, counts, decisions = Interval(n).begin(RunInfo(stages=2)), SkipCounts(), ""
    for index in range(10):
        computed = index == 0 or answer(Position(0, index, 1.0, index // 2, index % 2), counts) is not None
        decisions += "C" if computed else "S"
        count(counts, computed)
    assert decisions == expected


def count(counts: SkipCounts, computed: bool) -> None:
    counts.computed += computed
    counts.skipped += not computed
    counts.consecutive = 0 if computed else counts.consecutive + 1


def quality(network: str, sampler: str, steps: int, method: Method) -> tuple[float, int]:
    """PSNR in dB to the full run, over 10 samples of a shipped network, and the calls of a branch."""
    subject, seeds = sampling.subject(network), range(10)
    full = subject.sample(sampler, steps, None, seeds)
    result = subject.sample(sampler, steps, method, seeds)
    return statistics.fmean(METRICS["PSNR"](result.images, full.images, seeds)), result.calls


@pytest.mark.parametrize(
    ("network", "sampler", "steps", "gain"),
    [("unet", "euler", 20, 10), ("dit", "dpmpp_2m", 20, 6), ("unet", "dpmpp_2m_sde", 20, 0), ("unet", "heun", 8, 0)],
)
def test_forecast_gains_over_reuse_at_the_same_calls(network, sampler, steps, gain):
    """Bars a few dB below what was measured, far above what a predictor that falls back to reuse would reach."""
    ours, calls = quality(network, sampler, steps, Forecast())
    reuse, same = quality(network, sampler, steps, Forecast(predictor=Reuse()))
    assert calls == same
    assert ours >= reuse + gain
