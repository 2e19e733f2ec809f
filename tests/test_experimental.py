"""A tolerance instead of a threshold: `ToleranceRule` by hand, and `ForecastTolerance` on the shipped networks."""

from __future__ import annotations

import math
import statistics
import weakref
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from tiny_pipelines import PIPELINES
from torch import Tensor
from toys import Toy, cached, decisions, drive, filled

from stepcache import METHODS, Forecast, OptionError, method
from stepcache.bench import METRICS
from stepcache.demo import networks, sampling
from stepcache.experimental import ForecastTolerance, ToleranceRule, error_gain
from stepcache.extend import DeferredScalars, Parametrization, Position, RunInfo
from stepcache.samplers.diffusers import attach, parametrization
from stepcache.samplers.k_diffusion import (
    CachedDenoiser,
    FlowDenoiser,
    InTurn,
    sample,
)
from stepcache.samplers.parametrization import ScalingsAsFloats, denoised_scalings, eps_scalings, flow_scalings

TEN = tuple(1 - k / 10 for k in range(11))
"""Ten steps of 0.1; with coordinate = sigma and exposure 1, u = 0.1 everywhere."""


def unit(sigma: float) -> Parametrization:
    """Of which the exposure is 1."""
    return Parametrization(denoised=(0.0, sigma * math.hypot(sigma, 1)))


@dataclass
class Seen:
    """An `Branch` of one pixel, with its numbers given."""

    run: RunInfo
    position: Position
    off: float = 0.0
    residual: float = 1.0
    history: list[Seen] = field(default_factory=list)
    deferred: DeferredScalars = field(default_factory=DeferredScalars)

    def __post_init__(self) -> None:
        self.x = filled(0)
        self.out = filled(self.residual)
        self.prediction = self.out + self.off if self.history else None

    def coordinate(self, position: Position) -> float:
        return position.sigma

    def defer(self, number: Tensor) -> float:
        return float(number)


class ByHand:
    """A rule told of computed evaluations, one pixel a branch."""

    def __init__(self, tolerance: float, guidance: float = 7.5) -> None:
        self.run = RunInfo(TEN, coordinate=float, parametrization=unit)
        self.rule = ToleranceRule(tolerance, guidance).begin(self.run)
        self.history: list[Seen] = []

    def computed(self, k: int, **offs: float) -> None:
        position = Position(0, k, TEN[k], k)
        for name, off in (offs or {"guided": 0.0}).items():
            self.rule.update_any(name, Seen(self.run, position, off, history=list(self.history)))
        self.history.append(Seen(self.run, position))

    def asked(self, k: int) -> tuple[bool, float]:
        verdict = self.rule.decide(Seen(self.run, Position(0, k, TEN[k], k), history=self.history))
        assert verdict.threshold == self.rule.tolerance
        return verdict.skip, verdict.estimate


@pytest.mark.parametrize(("tolerance", "skip"), [(0.1, True), (0.036, True), (0.034, False), (0.01, False)])
def test_after_one_evaluation_half_of_the_residual_is_at_stake(tolerance, skip):
    """u e = 0.1 / 2 = 0.05, and its square no more than a third of (tolerance / 0.4)^2: from 0.0346 on."""
    hand = ByHand(tolerance)
    hand.computed(0)
    assert hand.asked(1) == (skip, pytest.approx(0.4 * 0.05))


def test_what_a_computed_evaluation_reveals_corrects_the_estimate():
    hand = ByHand(0.1)
    hand.computed(0)
    hand.asked(1)
    hand.computed(2, guided=0.2)  # off by 0.2 at a distance of 0.2: by 0.1 at the skip, which left 0.1 * 0.1
    _, estimate = hand.asked(3)  # the same once more
    assert estimate == pytest.approx(0.4 * math.hypot(0.01, 0.01))
    hand.computed(4, guided=0.08)  # r = 0.08 / (0.2 * 0.4) = 1: at 3 off by 0.1 * 0.3
    _, estimate = hand.asked(5)
    assert estimate == pytest.approx(0.4 * math.sqrt(0.01**2 + 0.003**2 + 0.003**2))
    _, estimate = hand.asked(6)  # two skips of one gap add up: 0.1 (0.1 * 0.3 + 0.2 * 0.4)
    assert estimate == pytest.approx(0.4 * math.sqrt(0.01**2 + 0.003**2 + 0.011**2))


def test_the_gap_grows_by_one_where_the_tolerance_allows_it_and_falls_where_it_does_not():
    def gap(off: float, tolerance: float) -> int:
        hand = ByHand(tolerance)
        hand.computed(0)
        hand.computed(2, guided=0.002)
        hand.computed(4, guided=off)
        return next(m for m in range(1, 6) if not hand.asked(4 + m)[0])

    assert gap(off=0.0001, tolerance=0.05) == 3
    assert gap(off=0.4, tolerance=0.05) == 2
    assert gap(off=10.0, tolerance=0.05) == 1


def test_the_last_evaluation_and_a_spent_tolerance_are_computed():
    hand = ByHand(0.05)
    hand.computed(0)
    hand.computed(8, guided=0.0001)
    hand.asked(9)
    hand.rule.due = 10  # whatever was planned
    assert not hand.asked(9)[0]
    hand = ByHand(0.05)
    hand.computed(0)
    hand.computed(2, guided=3.0)  # 0.4 * 0.1 * 1.5 = 0.06
    assert not any(hand.asked(k)[0] for k in range(3, 10))


def test_not_a_number_is_computed():
    hand = ByHand(0.1)
    hand.computed(0)
    hand.computed(2, guided=math.nan)
    assert not hand.asked(3)[0]
    hand.computed(3, guided=0.0)
    assert not hand.asked(4)[0]


@pytest.mark.parametrize(
    ("options", "off"),
    [({"guidance": 1.0}, 0.2), ({"guidance": 3.0}, 0.4), ({}, 0.1 + 7.5 * 0.1)],
    ids=["none", "three", "usual"],
)
def test_the_error_is_that_of_the_guided_prediction(options, off):
    hand = ByHand(0.5, **options)
    hand.computed(0, uncond=0.0, cond=0.0)
    hand.computed(2, uncond=0.1, cond=0.2)
    assert hand.asked(3)[1] == pytest.approx(0.4 * math.hypot(0.1 * off / 2, 0.1 * off / 2))


@pytest.mark.parametrize(("guidance", "off"), [(3.0, 3 * 0.3 + 2 * 0.1), (1.0, 0.3), (0.5, 0.5 * 0.3 + 0.5 * 0.1)])
def test_branches_of_different_sizes_are_taken_for_as_far_off_as_they_can_be(guidance, off):
    """Three rows of cond and two of uncond cannot be subtracted: |g| cond + |g - 1| uncond bounds the guided error."""
    hand = ByHand(0.5, guidance=guidance)
    for k in (0, 2):
        position = Position(0, k, TEN[k], k)
        for name, error, rows in (("cond", 0.3, 3), ("uncond", -0.1, 2)):
            seen = Seen(hand.run, position, error, history=list(hand.history))
            seen.out = seen.out.expand(rows, -1, -1, -1)
            seen.prediction = None if seen.prediction is None else seen.out + error
            hand.rule.update_any(name, seen)
        hand.history.append(Seen(hand.run, position))
    hand.asked(3)
    assert hand.rule.rate == pytest.approx(off / 0.2)


def test_branches_that_are_not_known_as_cond_and_uncond_are_said_to_be_left_out():
    """As "call" and "call 2", where a pipeline names none: guidance between them cannot be taken into account."""
    hand = ByHand(0.5, guidance=3.0)
    for k in (0, 2, 4):
        hand.computed(k, call=0.1, call_2=0.3)
        hand.asked(k + 1)
    said = "tolerance: of call, call_2 the first alone is judged, for which of them are cond and uncond is not known"
    assert hand.run.notes == [said]
    assert hand.rule.rate == pytest.approx(0.1 / (0.2 * 0.4))
    alone = ByHand(0.5, guidance=3.0)
    alone.computed(0, cond=0.1)
    alone.asked(1)
    assert not alone.run.notes


def test_one_branch_alone_is_taken_as_it_is():
    hand = ByHand(0.5, guidance=3.0)
    hand.computed(0, cond=0.0)
    hand.computed(2, cond=0.2)
    assert hand.asked(3)[1] == pytest.approx(0.4 * math.hypot(0.01, 0.01))


def test_without_a_schedule_or_a_scale_everything_is_computed_and_the_report_says_so():
    model = CachedDenoiser(Toy(), ForecastTolerance(0.1))
    with pytest.warns(UserWarning, match="schedule is not known"):
        drive(model, (10.0, 8.0, 6.0, 4.0), 1.0)
    assert decisions(model) == "CCCC"
    assert any("tolerance" in note for note in model.report.notes)
    run = RunInfo(TEN)
    assert not ToleranceRule(0.1).begin(run).decide(Seen(run, Position(0, 1, 0.9, 1))).skip


def test_an_evaluation_off_the_schedule_is_computed_and_the_plan_begins_again():
    """A two-evaluation sampler that was not announced: its second evaluations are no places of the schedule."""
    model = cached(lambda x, sigma: 2 * x, ForecastTolerance(0.5), sigmas=TEN)
    drive(model, [*TEN[:2], 0.85, *TEN[2:10]], 1.0)
    at = [event.computed for event in model.report.events if event.position.stage]
    assert at == [True]
    assert "S" in decisions(model)[4:]
    hand = ByHand(0.5)
    hand.computed(0)
    position = Position(0, 1, 0.95, 0, stage=1)
    hand.rule.update_any("guided", Seen(hand.run, position, history=list(hand.history)))
    assert hand.rule.decide(Seen(hand.run, Position(0, 2, TEN[1], 1), history=hand.history)) == (False, None, 0.5, None)


def test_the_evidence_of_an_evaluation_is_not_kept():
    """It holds half a dozen latents; the rule keeps one of its own, at first two."""
    hand, gone = ByHand(0.1), []
    for k in range(4):
        seen = Seen(hand.run, Position(0, k, TEN[k], k), history=list(hand.history))
        hand.rule.update_any("guided", seen)
        gone.append(weakref.ref(seen))
        hand.history.append(Seen(hand.run, seen.position))
        del seen
        assert gone[-1]() is None
        hand.asked(k + 1)


def test_tolerance_zero_calls_the_model_directly():
    model = cached(Toy(), ForecastTolerance(0), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "C" * 10
    assert {event.reason for event in model.report.events} == {"off"}


def test_it_is_no_method_of_the_core_and_what_is_refused():
    assert ForecastTolerance not in METHODS.values()
    with pytest.raises(OptionError, match="unknown option 'tolerance'"):
        Forecast(tolerance=0.01)
    with pytest.raises(OptionError, match="'tolerance'"):
        method("forecast", "tolerance=0.01")
    assert ForecastTolerance(0.01, 3.0, warmup=2) == ForecastTolerance(0.01, guidance=3.0).replace(warmup=2)
    assert ForecastTolerance() == ForecastTolerance(0.02, 7.5)
    for tolerance in (-1, math.nan):
        with pytest.raises(OptionError, match="tolerance="):
            ForecastTolerance(tolerance)
    with pytest.raises(OptionError, match="guidance="):
        ForecastTolerance(guidance="3")
    with pytest.raises(OptionError, match="unknown option 'tolerence'"):
        ForecastTolerance(tolerence=0.1)
    with pytest.raises(OptionError, match=r"tolerance=0\.1, skip='uncond': a tolerance counts errors"):
        ForecastTolerance(0.1, skip="uncond")


class Scheduler:
    """As much of diffusers' schedulers as says what the network predicts."""

    def __init__(self, **config: object) -> None:
        self.sigmas = torch.ones(2)
        self.config = config


class FlowScheduler(Scheduler):
    """A flow, by its name."""


def v_scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c_in = (sigma**2 + 1).rsqrt()
    return c_in**2, -sigma * c_in, c_in


@pytest.mark.parametrize(
    ("parametrization", "expected"),
    [
        (ScalingsAsFloats(eps_scalings).parametrization, lambda s: 1 / math.hypot(s, 1)),
        (ScalingsAsFloats(v_scalings).parametrization, lambda s: 1 / math.hypot(s, 1) ** 2),
        (ScalingsAsFloats(denoised_scalings).parametrization, lambda s: 1 / s / math.hypot(s, 1)),
        (ScalingsAsFloats(flow_scalings).parametrization, lambda t: 1 / math.hypot(t, 1 - t)),
        (ScalingsAsFloats(FlowDenoiser(Toy()).get_scalings).parametrization, lambda s: 1 / (1 + s) / math.hypot(s, 1)),
        (parametrization(Scheduler()), lambda s: 1 / math.hypot(s, 1)),
        (parametrization(Scheduler(prediction_type="v_prediction")), lambda s: 1 / (s * s + 1)),
        (parametrization(Scheduler(prediction_type="sample")), lambda s: 1 / s / math.hypot(s, 1)),
        (parametrization(FlowScheduler()), lambda t: 1 / math.hypot(t, 1 - t)),
    ],
    ids=["eps", "v", "denoised", "flow", "FlowDenoiser", "diffusers eps", "diffusers v", "sample", "diffusers flow"],
)
def test_the_exposure_follows_from_the_parametrization(parametrization, expected):
    """|c_out| / sigma over the latent's scale: sqrt(sigma^2 + 1), or sqrt(t^2 + (1 - t)^2) for a flow in its t."""
    for sigma in (0.99, 0.9, 0.7, 0.5, 0.31, 0.1, 0.03, 3.0, 14.6, 80.0):
        assert error_gain(parametrization(sigma), sigma) == pytest.approx(expected(sigma), rel=1e-5)


def test_nothing_of_a_run_reaches_the_next():
    chosen = ForecastTolerance(0.05)
    model = CachedDenoiser(Toy(lambda x, sigma: x * (1 - 0.1 * torch.sin(sigma.max()))), chosen)
    first = sample("euler", model, filled(1.0), torch.tensor(TEN), disable=True), decisions(model)
    second = sample("euler", model, filled(1.0), torch.tensor(TEN), disable=True), decisions(model)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert "S" in first[1]
    assert chosen == ForecastTolerance(0.05)


@cache
def reached(network: str, sampler: str, tolerance: float) -> tuple[float, str]:
    """PSNR in dB to the full run of 20 steps, and the decisions."""
    subject, seeds = sampling.subject(network), range(6)
    full = full_run(network, sampler)
    result = subject.sample(sampler, 20, ForecastTolerance(tolerance, sampling.GUIDANCE), seeds)
    return statistics.fmean(METRICS["PSNR"](result.images, full, seeds)), result.report.decisions("cond")


@cache
def full_run(network: str, sampler: str) -> Tensor:
    return sampling.subject(network).sample(sampler, 20, None, range(6)).images


def test_one_tolerance_is_about_one_error_on_both_networks():
    """Bars some dB beside what was measured: rounding may change a decision."""
    found = [reached("unet", "euler", 0.02), reached("dit", "dpmpp_2m", 0.02)]
    assert all(33 < psnr < 47 for psnr, _ in found)
    assert all(report.count("C") < 10 for _, report in found)


def test_a_smaller_tolerance_is_a_smaller_error_for_more_calls():
    loose, tight = (reached("unet", "euler", tolerance) for tolerance in (0.02, 0.005))
    assert tight[0] > loose[0] + 4
    assert tight[1].count("C") > loose[1].count("C")


def test_the_report_shows_estimate_and_tolerance():
    report = run_of([3]).report
    asked = [event for event in report.events if event.branch == "cond" and event.threshold is not None]
    assert {event.threshold for event in asked} == {0.02}
    assert all(event.estimate <= 0.02 for event in asked if not event.computed)
    assert any(event.estimate > 0 for event in asked)


class InTwoCalls(torch.nn.Module):
    """Guidance 3 that calls the model for each branch."""

    def __init__(self, inner_model: torch.nn.Module) -> None:
        super().__init__()
        self.inner_model = inner_model

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        cond = self.inner_model(x, sigma, label=label)
        uncond = self.inner_model(x, sigma, label=torch.full_like(label, networks.NO_CLASS))
        return uncond + 3.0 * (cond - uncond)


def run_of(labels: list[int], dtype: torch.dtype = torch.float32, separate: bool = False, **options: str):
    """A run of the DiT for these classes, each from the same noise."""
    ready = sampling.subject("dit")
    denoiser = ready.model
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(len(labels), -1, -1, -1)
    model = CachedDenoiser(
        Toy(lambda x, sigma, **extra: denoiser(x.float(), sigma.float(), **extra).to(x.dtype)),
        ForecastTolerance(0.02, guidance=3.0),
        branches=InTurn("cond", "uncond") if separate else ("uncond", "cond"),
        scalings=denoiser.get_scalings,
        coordinate=denoiser.sigma_to_t,
        **options,
    )
    guided = InTwoCalls(model) if separate else sampling.Guided(model)
    sigmas, keywords = ready.sigmas(12).to(dtype), {"extra_args": {"label": torch.tensor(labels)}, "disable": True}
    with torch.no_grad():
        sample("euler", guided, noise.to(dtype) * sigmas[0], sigmas, **keywords)
    return model


def test_decisions_do_not_depend_on_batch_size_order_or_dtype():
    alone = decisions(run_of([3]), "cond")
    assert "S" in alone
    assert decisions(run_of([3, 3, 3]), "cond") == alone
    assert decisions(run_of([3], torch.float64), "cond") == alone
    assert decisions(run_of([1, 5, 8]), "cond") == decisions(run_of([8, 1, 5]), "cond")


@pytest.mark.parametrize("decide", ["batch", "each"])
def test_branches_in_separate_calls_are_judged_together(decide):
    batched, separate = run_of([1, 5]), run_of([1, 5], separate=True, decide=decide)
    assert decisions(separate, "cond") == decisions(separate, "uncond") == decisions(batched, "cond")


def test_one_transfer_a_decided_evaluation(monkeypatch):
    fetched = []
    fetch = DeferredScalars.fetch
    monkeypatch.setattr(DeferredScalars, "fetch", lambda self: (fetched.append(1), fetch(self)))
    report = run_of([3]).report
    assert 0 < len(fetched) <= report.evaluations


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_through_diffusers_the_schedule_comes_from_the_pipeline(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with attach(pipe, ForecastTolerance(0.5)) as loose:
        pipe(**tiny.call(pipe))
    with attach(pipe, ForecastTolerance(1e-6)) as tight:
        pipe(**tiny.call(pipe))
    assert any("S" in loose.report.decisions(branch) for branch in loose.report.branches)
    assert all("S" not in tight.report.decisions(branch) for branch in tight.report.branches)
    assert not any("tolerance" in note for note in loose.report.notes)
