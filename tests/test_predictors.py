"""What each predictor predicts: worked out by hand, on functions it must reproduce, and as published."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import MODELS, Denoiser, schedule, x_open
from torch import Tensor
from toys import SIX, Toy, cached, drive, fates, heun, level, reasons

from stepcache import Forecast, Method, OptionError, Spectrum, Static, StepMask, UCache, method
from stepcache.bench import METRICS
from stepcache.demo import sampling
from stepcache.extend import (
    DMD,
    AdaptiveOrder,
    Branch,
    CacheEntry,
    Chebyshev,
    DeferredScalars,
    FiniteDifference,
    Interval,
    Lagrange,
    LinearPredictor,
    Position,
    Predictor,
    Reuse,
    RunInfo,
    SkipCounts,
    SpectrumCadence,
    TaylorSeer,
)
from stepcache.samplers.k_diffusion import CachedDenoiser, FlowDenoiser, sample

PREDICTORS: tuple[Predictor, ...] = (
    Lagrange(0),
    Lagrange(1),
    Lagrange(2),
    Lagrange(3, baseline="zero"),
    TaylorSeer(0),
    TaylorSeer(1),
    TaylorSeer(3, baseline="input"),
    FiniteDifference(1),
    FiniteDifference(2),
    FiniteDifference(3),
    Chebyshev(),
    Chebyshev(m=7, baseline="input"),
    AdaptiveOrder(),
    AdaptiveOrder(1),
    DMD(),
    DMD(order=3, history=4, baseline="zero"),
)

Place = tuple[int, float]
"""The index of an evaluation and its sigma."""


def predict(
    predictor: Predictor,
    known: Iterable[tuple[Place, Tensor, Tensor]],
    place: Place,
    x: Tensor,
    run: RunInfo | None = None,
) -> Tensor | None:
    """The prediction at a place, from computed evaluations (place, x, out), oldest first, of which it keeps its own."""
    deferred, run = DeferredScalars(), run or RunInfo()
    history: deque[CacheEntry] = deque(maxlen=predictor.memory)

    def branch(place: Place, x: Tensor) -> Branch:
        return Branch(Position(0, place[0], place[1]), run, x, history, predictor.predict, deferred)

    for at, past, out in known:
        computed = branch(at, past)
        computed.out = out
        predictor.remember(history, computed.entry(past.dtype))
    wide = x if x.dtype == torch.float64 else x.float()
    return branch(place, wide).prediction


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def number(
    predictor: Predictor, known: Sequence[tuple[Place, float]], place: Place, run: RunInfo | None = None
) -> float:
    """The predicted output where every x is 0, so that output and residual are the same."""
    predicted = predict(predictor, [(at, one(0), one(out)) for at, out in known], place, one(0), run)
    return float(predicted)


def walk(outs: Sequence[float], gap: int = 1) -> list[tuple[Place, float]]:
    """Outputs at evaluations `gap` apart; sigma is 2 to the power of minus the evaluation's index."""
    return [((gap * i, 2.0 ** -(gap * i)), out) for i, out in enumerate(outs)]


def test_an_output_that_was_not_computed_and_a_prediction_that_is_not_there_are_errors():
    branch = Branch(Position(0, 0, 1.0), RunInfo(), one(0), [], Reuse().predict, DeferredScalars())
    with pytest.raises(RuntimeError, match="has not been computed yet"):
        _ = branch.out
    with pytest.raises(RuntimeError, match="cannot be predicted"):
        branch.predict()
    assert not branch.finite


# Lagrange


@pytest.mark.parametrize("baseline", ["input", "zero"])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_lagrange_reproduces_a_polynomial_in_log_sigma_of_its_order(order, baseline):
    """Unequal gaps; x moves at random, which the residual carries over and the output leaves out."""
    torch.manual_seed(order)
    coefficients = torch.randn(order + 1, 2, 3, 4, dtype=torch.float64)
    x = torch.randn(7, 2, 3, 4, dtype=torch.float64)
    sigmas = [14.6, 9.0, 7.7, 3.1, 2.9, 0.8, 0.3]

    def out(i: int) -> Tensor:
        polynomial = sum(c * math.log(sigmas[i]) ** k for k, c in enumerate(coefficients))
        return polynomial + x[i] if baseline == "input" else polynomial

    known = [((i, sigmas[i]), x[i], out(i)) for i in range(6)]
    predicted = predict(Lagrange(order, baseline), known, (6, sigmas[6]), x[6])
    torch.testing.assert_close(predicted, out(6), rtol=1e-9, atol=1e-9)


def test_lagrange_reproduces_a_polynomial_in_the_runs_own_coordinate():
    """t^2 - t at t = 0.9, 0.7, 0.4 goes on to 0.04 - 0.2 at 0.2, in t; in log t it does not."""
    known = [((i, t), t * t - t) for i, t in enumerate((0.9, 0.7, 0.4))]
    assert number(Lagrange(2), known, (3, 0.2), RunInfo(coordinate=float)) == pytest.approx(-0.16)
    assert number(Lagrange(2), known, (3, 0.2)) != pytest.approx(-0.16, rel=0.01)


def test_lagrange_of_order_0_is_reuse_to_the_last_bit():
    torch.manual_seed(0)
    x, past, out = torch.randn(3, 4, 5, 6)
    known = [((0, 3.0), past, out)]
    assert torch.equal(predict(Lagrange(0), known, (1, 2.0), x), predict(Reuse(), known, (1, 2.0), x))
    assert torch.equal(predict(Lagrange(2), known, (1, 2.0), x), predict(Reuse(), known, (1, 2.0), x))


def test_lagrange_takes_a_lower_order_while_little_is_known():
    """Octaves: after 5: 5. After 5, 7: 9. After 5, 7, 10: 14, the second difference being 1."""
    assert number(Lagrange(2), walk([5]), (1, 0.5)) == 5
    assert number(Lagrange(2), walk([5, 7]), (2, 0.25)) == pytest.approx(9)
    assert number(Lagrange(2), walk([5, 7, 10]), (3, 0.125)) == pytest.approx(14)
    assert number(Lagrange(2), walk([5, 7, 10]), (4, 0.0625)) == pytest.approx(19)


def test_lagrange_keeps_the_newest_of_equal_sigmas_and_all_of_its_order():
    """Heun asks twice at 0.5 and at 0.25; float32 rounding does not make one sigma two."""
    places = [(0, 1.0), (1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25 * (1 + 1e-7))]
    known = list(zip(places, [5, 100, 7, 100, 10], strict=True))
    assert number(Lagrange(2), known, (5, 0.125)) == pytest.approx(14, rel=1e-5)


def test_lagrange_at_a_sigma_it_knows_returns_what_was_computed_there():
    assert number(Lagrange(2), walk([5, 7, 10]), (3, 0.25)) == 10


def test_lagrange_survives_a_coordinate_that_does_not_tell_sigmas_apart():
    assert number(Lagrange(2), walk([5, 7, 10]), (3, 0.125), RunInfo(coordinate=lambda sigma: 1.0)) == 10


def test_lagrange_leaves_out_what_has_no_coordinate():
    """sigma = 0 has no logarithm; at sigma = 0 nothing can be extrapolated to, so the last residual is reused."""
    known = [((0, 1.0), 5), ((1, 0.5), 7), ((2, 0.0), 100)]
    assert number(Lagrange(2), known, (3, 0.25)) == pytest.approx(9)
    assert number(Lagrange(2), walk([5, 7]), (2, 0.0)) == 7
    assert number(Lagrange(2), [((0, 0.0), 3)], (1, 0.5)) == 3
    assert number(Lagrange(1), [((0, math.inf), 100), ((1, 1.0), 5), ((2, 0.5), 7)], (3, 0.25)) == pytest.approx(9)


def test_lagrange_knows_all_of_its_order_under_heun():
    """Asked are 64 32 32 16 16 8 8 4 4 2, computed, and 2 1 1, skipped. The network answers log2(sigma)^2."""
    octaves = tuple(2.0**k for k in range(6, -1, -1))
    method = Method(predictor=Lagrange(2, "zero"), warmup=5)
    model = cached(lambda x, sigma: x * sigma.log2().reshape(-1, 1, 1, 1) ** 2, method)
    with model.run((*octaves, 0.0), stages=2):
        answers = drive(model, heun((*octaves, 0.0)), 1.0)
    assert fates(model) == "C" * 10 + "SSS"
    assert answers[10:] == pytest.approx([1, 0, 0], abs=1e-5)


# TaylorSeer


def test_taylorseer_by_hand():
    """Outputs 3, 5, 9 at evaluations 0, 1, 2. D1 = 4, and 2 before; D2 = 2.

    One further: order 0: 9; order 1: 9 + 4; order 2: 13 + 2 / 2. Three further: 9 + 12 + 2 * 9 / 2.
    """
    assert [number(TaylorSeer(k), walk([3, 5, 9]), (3, 0.1)) for k in (0, 1, 2, 3)] == [9, 13, 14, 14]
    assert number(TaylorSeer(2), walk([3, 5, 9]), (5, 0.1)) == 30


def test_taylorseer_divides_every_difference_by_the_last_gap():
    """Outputs 3, 5, 9 at evaluations 0, 4, 6: D1 = 2, and 0.5 before; D2 = 1.5 / 2. At 7: 9 + 2 + 0.75 / 2."""
    known = [((0, 3.0), 3), ((4, 2.0), 5), ((6, 1.0), 9)]
    assert number(TaylorSeer(2), known, (7, 0.5)) == 9 + 2 + 0.375


@pytest.mark.parametrize("gap", [1, 3])
def test_taylorseer_reproduces_a_line_and_not_a_parabola(gap):
    line, parabola = [2 + 3 * i for i in range(4)], [i * i for i in range(4)]
    ahead = 2 / gap
    assert number(TaylorSeer(3), walk(line, gap), (3 * gap + 2, 0.1)) == pytest.approx(11 + 3 * ahead)
    assert number(TaylorSeer(2), walk(parabola, gap), (3 * gap + 2, 0.1)) == pytest.approx(9 + 5 * ahead + ahead**2)


def test_taylorseer_takes_a_lower_order_while_little_is_known():
    assert number(TaylorSeer(2), walk([3]), (1, 0.1)) == 3
    assert number(TaylorSeer(2), walk([3, 5]), (2, 0.1)) == 7


# FSampler


def in_sigma(outs: Sequence[float], sigmas: Sequence[float]) -> list[tuple[Place, float]]:
    return [((i, sigma), out) for i, (out, sigma) in enumerate(zip(outs, sigmas, strict=True))]


def test_finite_differences_by_hand():
    """denoised - x = -sigma out is -8, -6, -3, -1 at sigma 8, 4, 2, 1; here sigma = 0.5.

    h2: -2 + 3 = 1; h3: -3 + 9 - 6 = 0; h4: -4 + 18 - 24 + 8 = -2. Over -0.5: -2, 0, 4.
    """
    known = in_sigma([1, 1.5, 1.5, 1], [8, 4, 2, 1])
    assert [number(FiniteDifference(k), known, (4, 0.5)) for k in (1, 2, 3)] == [-2, 0, 4]


def test_finite_differences_take_a_lower_order_while_little_is_known():
    """h2 of -8, -6 is -4, over -2; h3 needs three and is h2 with two; h2 needs two."""
    known = in_sigma([1, 1.5], [8, 4])
    assert [number(FiniteDifference(k), known, (2, 2.0)) for k in (1, 2, 3)] == [2, 2, 2]
    assert predict(FiniteDifference(1), [((0, 8.0), one(0), one(1))], (1, 4.0), one(0)) is None


@pytest.mark.parametrize("order", [1, 2, 3])
def test_finite_differences_reproduce_sigma_out_as_a_polynomial_of_the_index(order):
    sigmas = [9.0, 7.0, 4.5, 2.0, 0.7]
    change = [sum((i - 1.5) ** k for k in range(order + 1)) for i in range(5)]
    outs = [c / s for c, s in zip(change, sigmas, strict=True)]
    assert number(FiniteDifference(order), in_sigma(outs[:4], sigmas[:4]), (4, 0.7)) == pytest.approx(outs[4])


def test_finite_differences_reproduce_a_constant_only_where_sigma_falls_evenly():
    """2 * 3 - 4 = 2 at sigma 2, but 2 * 2 - 4 = 0 at sigma 1."""
    assert number(FiniteDifference(1), in_sigma([5, 5], [4, 3]), (2, 2.0)) == 5
    assert number(FiniteDifference(1), in_sigma([5, 5], [4, 2]), (2, 1.0)) == 0


def test_finite_differences_tell_nothing_at_sigma_0():
    assert predict(FiniteDifference(1), [((i, 2.0 - i), one(0), one(1)) for i in (0, 1)], (2, 0.0), one(0)) is None


# DMD


def linear_system(rates: Sequence[complex], steps: Sequence[float], size: int = 40, rows: int = 2) -> Tensor:
    """A sum of exponentials with random real directions, (len(steps), rows, size); every row has rates of its own."""
    torch.manual_seed(len(rates))
    phi = torch.randn(rows, size, len(rates), dtype=torch.complex128)
    powers = [[(rate * 0.97**row) ** step for rate in rates] for row in range(rows) for step in steps]
    powers = torch.tensor(powers, dtype=torch.complex128).reshape(rows, len(steps), len(rates))
    return torch.einsum("rsk,rtk->trs", phi, powers).real


@pytest.mark.parametrize("baseline", ["input", "zero"])
@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_dmd_recovers_a_linear_system(ahead, baseline):
    """A decaying and an oscillating mode: three real degrees of freedom, six snapshots three evaluations apart."""
    rates = (0.9, 0.8 * complex(math.cos(0.5), math.sin(0.5)))
    y = linear_system(rates, [0, 1, 2, 3, 4, 5, 5 + ahead / 3])
    x = torch.randn_like(y) if baseline == "input" else torch.zeros_like(y)
    known = [((3 * i, 9.0 - i), x[i], y[i] + x[i]) for i in range(6)]
    predicted = predict(DMD(baseline=baseline), known, (15 + ahead, 1.0), x[6])
    torch.testing.assert_close(predicted, y[6] + x[6], rtol=1e-5, atol=1e-5)


def test_dmd_is_taylorseer_below_four_evenly_spaced_evaluations():
    y = linear_system((0.9, 0.5), [0, 1, 2, 3, 4])
    for index in ((0, 1, 2), (0, 1, 2, 4), (0, 1, 3, 5)):
        known = [((n, 9.0 - n), torch.zeros_like(y[n]), y[n]) for n in index if n < 5] + (
            [((5, 3.0), torch.zeros_like(y[0]), y[4])] if 5 in index else []
        )
        arguments = known, (6, 1.0), torch.zeros_like(y[0])
        assert torch.equal(predict(DMD(order=2), *arguments), predict(TaylorSeer(2, "input"), *arguments))


def test_dmd_leaves_out_what_lies_before_the_evenly_spaced_evaluations():
    y = linear_system((0.9, 0.5), [0, 1, 2, 3, 4, 5])
    zero = torch.zeros_like(y[0])
    known = [((-1, 10.0), zero, zero + 100)] + [((2 * i, 9.0 - i), zero, y[i]) for i in range(5)]
    torch.testing.assert_close(predict(DMD(), known, (10, 1.0), zero), y[5], rtol=1e-6, atol=1e-6)


def test_dmd_keeps_at_most_the_modes_asked_for():
    """A strong mode and one of a thousandth; of rank 1 only the strong one is seen."""
    strong, weak = torch.eye(2, dtype=torch.float64)
    y = [(0.9**n * strong + 1e-3 * 0.1**n * weak)[None] for n in range(7)]
    known = [((n, 9.0 - n), torch.zeros_like(y[n]), y[n]) for n in range(6)]
    full, low = (predict(DMD(rank=rank), known, (6, 1.0), torch.zeros_like(y[0])) for rank in (0, 1))
    torch.testing.assert_close(full, y[6], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(low[0, 0], y[6][0, 0], rtol=1e-5, atol=1e-5)


def test_dmd_of_nothing_but_zeros_is_zero():
    zero = torch.zeros(1, 3)
    assert torch.equal(predict(DMD(), [((n, 9.0 - n), zero, zero) for n in range(6)], (6, 1.0), zero), zero)


# Spectrum

SPECTRUM = json.loads((Path(__file__).parent / "data" / "spectrum.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in SPECTRUM["cases"]}
REFUSED = {"sp/karras20/window_-1", "sp/karras20/window_0"}
SAMPLERS = {"euler": "euler", "heun": "heun", "dpm2": "dpm_2", "dpmpp2m": "dpmpp_2m"}


def test_chebyshev_by_hand():
    """Evaluations 0 and 25 of 50 and now 50: tau = -1, 0, 1. m = 1, lam = 1: X'X + I = [[3, -1], [-1, 2]].

    Its inverse is [[2, 1], [1, 3]] / 5, which makes of (1, 1): (3, 4) / 5. Weights -1 / 5 and 3 / 5.
    The line: 1.5 times the last less half the one before. Outputs 10 and 20.
    """
    known = [((0, 2.0), 10), ((25, 1.0), 20)]
    assert number(Chebyshev(w=1, m=1), known, (50, 0.5)) == pytest.approx(10)
    assert number(Chebyshev(w=0, m=1), known, (50, 0.5)) == pytest.approx(25)
    assert number(Chebyshev(w=0.4, m=1), known, (50, 0.5)) == pytest.approx(0.4 * 10 + 0.6 * 25)
    assert predict(Chebyshev(), [((0, 2.0), one(0), one(10))], (1, 1.0), one(0)) is None


def test_chebyshev_is_scaled_to_the_run():
    """As above with a run of 20 evaluations: those at 0 and 10, and now 20. Under Heun 10 steps are 20 evaluations."""
    known = [((0, 2.0), 10), ((10, 1.0), 20)]
    for run in (RunInfo((1.0,) * 21), RunInfo((1.0,) * 11, stages=2)):
        assert number(Chebyshev(w=1, m=1), known, (20, 0.5), run) == pytest.approx(10)
        assert number(Chebyshev(w=1, m=1, steps=50), known, (20, 0.5), run) != pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("m", [0, 1, 2, 3])
def test_chebyshev_without_a_ridge_reproduces_a_polynomial_in_the_index(m):
    known = [((i, 9.0 - i), sum((i / 5) ** k for k in range(m + 1))) for i in (0, 1, 3, 4, 6, 9)]
    expected = sum((11 / 5) ** k for k in range(m + 1))
    assert number(Chebyshev(w=1, m=m, lam=0), known, (11, 0.5)) == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(number(Chebyshev(w=1, m=m, lam=0), known[:2], (11, 0.5)))


def follow(case: dict[str, Any]) -> tuple[CachedDenoiser, list[Tensor], list[str], Tensor]:
    """Runs a case of the reference; also what was returned at every evaluation, and the network's calls."""
    model, calls, returned = MODELS[case["den"]](), [], []
    sigmas = schedule(case["sched"], model)
    network = Denoiser(model, calls)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        cond = network(x, sigma, "cond")
        if not case.get("scenario", {}).get("uncond", 1):
            return cond
        uncond = network(x, sigma, "uncond")
        return uncond + case["cfg"] * (cond - uncond)

    def seen(x: Tensor, sigma: Tensor) -> Tensor:
        returned.append(cache(x, sigma))
        return returned[-1]

    two = case["sampler"] in ("heun", "dpm2")
    options = case["p"] | ({"stop": case["p"]["stop"] / 2} if two else {})
    cache = CachedDenoiser(guided, Spectrum(**options, steps=50), scalings="denoised")
    x = sample(SAMPLERS[case["sampler"]], seen, x_open(0, float(sigmas[0])), sigmas, cache=cache, disable=True)
    return cache, returned, calls, x


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED and "lam_0" not in name])
def test_every_decision_and_every_prediction_of_spectrum_are_the_references(name):
    """Around guidance, as there. With two evaluations a step the reference stops at half the share that it is told."""
    case = CASES[name]
    cache, returned, calls, x = follow(case)
    assert cache.report.fates("guided") == case["dec"]
    assert len(calls) == case["n_model"]
    sizes, firsts = case["col"]["oa"], case["col"]["o0"]
    assert [float(one.abs().sum()) for one in returned] == pytest.approx(sizes, rel=1e-4)
    assert [float(one[0, 0]) for one in returned] == pytest.approx(firsts, rel=1e-3, abs=1e-5 * max(sizes))
    total = case["xf"][1]
    assert [float(x.double().sum()), float(x.abs().sum())] == pytest.approx(case["xf"][:2], rel=1e-4, abs=1e-4 * total)


@pytest.mark.parametrize("name", ["sp/karras20/lam_0", "sp/flow50/lam_0"])
def test_without_a_ridge_the_references_predictions_are_those_of_its_rounding(name):
    """Different on purpose: X'X of four neighbouring evaluations is singular in float32.

    The reference then adds 1e-4 of the mean diagonal, or not, as its Cholesky factorization happens to end.
    """
    case = CASES[name]
    cache, returned, _, _ = follow(case)
    assert cache.report.fates("guided") == case["dec"]
    assert [float(one.abs().sum()) for one in returned[:4]] == pytest.approx(case["col"]["oa"][:4], rel=1e-5)
    assert float(returned[4].abs().sum()) != pytest.approx(case["col"]["oa"][4], rel=1e-4)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_spectrum_refuses_a_window_that_cannot_be_meant(name):
    """Different on purpose: the reference computes everything until such a window has grown to 2."""
    assert "S" not in CASES[name]["dec"][:8]
    with pytest.raises(OptionError, match=r"^window_size=-?\d: accepted is a number of at least 1$"):
        Spectrum(**CASES[name]["p"])


def cadence(gate: SpectrumCadence, run: RunInfo, evaluations: int) -> str:
    answer, counts, letters = gate.begin(run), SkipCounts(), ""
    for n in range(evaluations):
        skip = answer(Position(0, n, 1.0), counts) is None
        letters += "CS"[skip]
        counts = SkipCounts(counts.computed + (not skip), counts.skipped + skip, counts.consecutive + 1 if skip else 0)
    return letters


def test_spectrums_cadence_is_the_references():
    """Rows are [steps, window, flex, warm-up, letters], all with stop = 0.9."""
    for steps, window, flex, warmup, letters in SPECTRUM["tables"]["cadence"]:
        gate = SpectrumCadence(window, flex, warmup, 0.9)
        assert cadence(gate, RunInfo((1.0,) * (steps + 1)), steps) == letters, (steps, window, flex, warmup)


def test_spectrum_stops_at_a_share_of_the_evaluations_whatever_the_sampler():
    gate = SpectrumCadence(flex_window=0, stop=0.5)
    assert cadence(gate, RunInfo((1.0,) * 21), 20) == "CCCCSCSCSC" + "C" * 10
    assert cadence(gate, RunInfo((1.0,) * 11, stages=2), 19) == "CCCCSCSCSC" + "C" * 9


def test_spectrum_says_that_it_cannot_stop_without_a_schedule():
    run = RunInfo()
    assert cadence(SpectrumCadence(flex_window=0), run, 8) == "CCCCSCSC"
    assert run.warnings == ["stop=0.9 cannot act: this run's schedule is not known (pass sigmas=, or use sample())"]


def test_spectrum_by_name_and_with_other_gates():
    assert method("spectrum") == Spectrum()
    assert method("spectrum", "w=0.5,m=4,lam=0.1,flex_window=0.75,warmup=5,stop=1,steps=50").predictor == Chebyshev(
        0.5, 4, 0.1, 50
    )
    assert method("spectrum", "warmup=2,window_size=3").gates == (SpectrumCadence(3, 0.5, 2, 0.9),)
    model = cached(lambda x, sigma: 2 * x, Spectrum(warmup=0, flex_window=2, max_consecutive=1), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert reasons(model) == ["warm-up", "warm-up", "criterion", "max_consecutive", "criterion", "max_consecutive"]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("w", 2), ("m", 1.5), ("lam", -1), ("window_size", 0), ("flex_window", -1), ("warmup", 0.5), ("stop", 7)],
)
def test_spectrums_options_are_checked_by_name(name, bad):
    with pytest.raises(OptionError, match=f"^{name}="):
        Spectrum(**{name: bad})


# All of them


def smooth(count: int, shape: tuple[int, ...]) -> list[tuple[Place, Tensor, Tensor]]:
    """Computed evaluations of a smooth network, the indices two apart, sigma falling unevenly; and the next one."""
    torch.manual_seed(1)
    a, b, c = torch.randn(3, *shape, dtype=torch.float64)
    known = []
    for i in range(count):
        s = 8.0 * 0.7**i + 0.1
        known.append(((2 * i, s), (a * s + b).float(), (a * math.sin(s / 5) + b * math.exp(-s / 9) + c).float()))
    return known


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_prediction_of_one_row_does_not_depend_on_the_others(predictor):
    *known, (place, x, _) = smooth(9, (3, 4, 5, 5))
    together = predict(predictor, known, place, x)
    for row in range(3):
        own = [(at, past[row : row + 1], out[row : row + 1]) for at, past, out in known]
        alone = predict(predictor, own, place, x[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_half_precision_latents_are_predicted_in_float32(predictor, dtype):
    """Rounding of what is remembered grows by the sum of the weights' magnitudes, up to 50 here; x is not rounded."""
    *known, (place, x, _) = smooth(9, (1, 4, 5, 5))
    exact = predict(predictor, known, place, x)
    rounded = [(at, past.to(dtype), out.to(dtype)) for at, past, out in known]
    half = predict(predictor, rounded, place, x)
    assert half.dtype == torch.float32
    unit = torch.finfo(dtype).eps * max(float(t.abs().max()) for _, *both in known for t in both)
    assert float((half - exact).abs().max()) < 50 * unit


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_prediction_leaves_what_it_is_made_from_alone(predictor):
    *known, (place, x, _) = smooth(9, (2, 3, 4))
    before = [(past.clone(), out.clone()) for _, past, out in known]
    given = x.clone()
    predicted = predict(predictor, known, place, x)
    assert predicted.shape == x.shape
    assert predicted.dtype == torch.float32
    predicted.zero_()
    assert torch.equal(x, given)
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (_, b, d) in zip(before, known, strict=True))


@pytest.mark.parametrize(
    ("predictor", "evaluations"),
    [
        (Lagrange(0), 1),
        (Lagrange(3), 4),
        (TaylorSeer(2), 3),
        (FiniteDifference(3), 4),
        (Chebyshev(), 6),
        (Chebyshev(m=8), 9),
        (DMD(), 6),
    ],
)
def test_the_memory_is_bounded(predictor, evaluations):
    kept = []
    model = cached(Toy(), Method(predictor=predictor, warmup=20), sigmas=range(21, -1, -1))
    for i in range(20):
        model(torch.full((1, 1, 2, 2), float(i)), level(21 - i))
        kept.append(len(model.engine._run.caches["guided"]))
    assert kept == [min(i + 1, evaluations) for i in range(20)]


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_network_that_answered_nan_is_computed_until_that_is_forgotten(predictor):
    """Evaluation 12 answers NaN: nothing is predicted from it, and skipping returns once it has left the memory."""
    digits = "1" * 13 + "0" * 17

    def network(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return x * math.nan if float(sigma) == 18 else x / (2 + sigma.reshape(-1, 1, 1, 1))

    model = cached(network, Static(digits, predictor=predictor), sigmas=range(30, -1, -1))
    answers = [model(torch.linspace(1, 2, 4).reshape(1, 1, 2, 2), level(30 - i)) for i in range(30)]
    assert [i for i, answer in enumerate(answers) if not answer.isfinite().all()] == [12]
    waits = predictor.order + 1 if isinstance(predictor, DMD) else predictor.memory  # DMD falls back to its series
    assert fates(model) == "C" * (13 + waits) + "S" * (17 - waits)
    assert reasons(model)[13 : 13 + waits] == ["prediction not finite"] * waits


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_another_shape_begins_with_an_empty_memory(predictor):
    model = cached(Toy(), Method(predictor=predictor), sigmas=SIX)
    with model.run(SIX):
        for i, sigma in enumerate(SIX[:-1]):
            size = 2 if i < 4 else 3
            model(torch.ones(1, 1, size, size), level(sigma))
    assert fates(model)[4] == "C"
    assert reasons(model)[4] == "no memory yet"


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_predictor_goes_with_every_method(predictor):
    sigmas = torch.linspace(10, 0, 21)
    static = Static(StepMask("1111" + "10" * 8), predictor=predictor)
    for chosen in (UCache(3.0, predictor=predictor), static, Spectrum(predictor=predictor)):
        model = cached(lambda x, sigma: x / (2 + sigma.reshape(-1, 1, 1, 1)), chosen)
        with model.run(sigmas):
            answers = [model(torch.full((2, 1, 4, 4), 1 + float(s)), s.repeat(2)) for s in sigmas[:-1]]
        assert all(answer.isfinite().all() for answer in answers)
        assert "S" in fates(model)


def test_a_weighted_predictor_of_ones_own_is_one_method():
    class Mean(LinearPredictor):
        memory = 2
        baseline = "zero"

        def weights(self, branch):
            return [(entry, 1 / len(branch.history)) for entry in branch.history]

    assert number(Mean(), walk([4, 10, 20]), (3, 0.1)) == 15


@pytest.mark.parametrize("make", [Lagrange, TaylorSeer, Chebyshev, DMD])
def test_what_is_extrapolated_is_the_residual_or_the_output(make):
    with pytest.raises(OptionError, match=r"^unknown baseline 'denoised'. Accepted: input, zero.$"):
        make(baseline="denoised")


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (Lagrange, {"order": -1}),
        (Lagrange, {"order": 1.5}),
        (TaylorSeer, {"order": -1}),
        (FiniteDifference, {"order": 0}),
        (FiniteDifference, {"order": 4}),
        (Chebyshev, {"w": 1.1}),
        (Chebyshev, {"steps": 0}),
        (DMD, {"history": 3}),
        (DMD, {"rank": -1}),
        (DMD, {"ridge": -1}),
        (DMD, {"order": -1}),
    ],
)
def test_options_are_checked_by_name(make, bad):
    [name] = bad
    with pytest.raises(OptionError, match=f"^{name}="):
        make(**bad)


# The coordinate


def coordinate_of(model: CachedDenoiser) -> Callable[[float], float | None]:
    """What predictors of this model's runs are told: sigma -> coordinate."""
    told = []

    class Listening(Reuse):
        def predict(self, branch):
            told.append(branch)
            return super().predict(branch)

    model.engine.method = Method(predictor=Listening())
    for sigma in (0.9, 0.5):
        model(torch.ones(1, 1, 2, 2), level(sigma))
    return lambda sigma: told[-1].coordinate(Position(0, 0, sigma))


def test_predictors_are_told_log_sigma_and_for_flow_models_t():
    network = Toy()
    log = coordinate_of(cached(network, Method()))
    assert (log(2.0), log(0.0), log(math.inf)) == (math.log(2), None, None)
    t = coordinate_of(CachedDenoiser(network, Method(), scalings="flow"))
    assert (t(0.25), t(0.0)) == (0.25, 0.0)
    flow = coordinate_of(CachedDenoiser(FlowDenoiser(lambda x, t: 2 * x), Method()))
    assert (flow(3.0), flow(0.0), flow(math.inf)) == (0.75, 0.0, None)
    own = coordinate_of(cached(network, Method(), coordinate=lambda sigma: 1 / sigma))
    assert (own(4.0), own(0.0)) == (0.25, None)


def test_lagrange_in_t_reproduces_a_velocity_that_is_a_parabola_in_t():
    """k-diffusion's sigma is t / (1 - t) under `FlowDenoiser`; x stays 0, so that only t moves."""
    network = FlowDenoiser(lambda x, t: x + (t * t - t).reshape(-1, 1, 1, 1))
    times = [0.9, 0.7, 0.4, 0.2]
    model = CachedDenoiser(network, Method(predictor=Lagrange(2), warmup=3))
    x = torch.zeros(1, 1, 2, 2)
    with model.run([t / (1 - t) for t in times] + [0.0]):
        answers = [model(x, level(t / (1 - t))) for t in times]
    assert fates(model) == "CCCS"
    torch.testing.assert_close(answers[3], network(x, level(0.25)), rtol=1e-5, atol=1e-7)


# The project's own method; its predictor has tests of its own


@pytest.mark.parametrize(("n", "expected"), [(1, "CCCCCCC"), (2, "CSCSCSC"), (3, "CSSCSSC"), (4, "CSSSCSS")])
def test_of_n_evaluations_one_is_computed(n, expected):
    answer, counts, fates = Interval(n).begin(RunInfo()), SkipCounts(), ""
    for index in range(7):
        computed = index == 0 or answer(Position(0, index, 1.0), counts) is not None
        fates += "C" if computed else "S"
        count(counts, computed)
    assert fates == expected


def test_the_first_ones_may_all_be_computed():
    answer, counts, fates = Interval(3, start=2).begin(RunInfo()), SkipCounts(), ""
    for index in range(8):
        computed = index == 0 or answer(Position(0, index, 1.0), counts) is not None
        fates += "C" if computed else "S"
        count(counts, computed)
    assert fates == "CCSSCSSC"


@pytest.mark.parametrize(("n", "expected"), [(2, "CCSCSCSCSC"), (3, "CCSSSCSSSC"), (4, "CCSSSCSSSC")])
def test_of_steps_with_two_evaluations_second_ones_are_computed(n, expected):
    answer, counts, fates = Interval(n).begin(RunInfo(stages=2)), SkipCounts(), ""
    for index in range(10):
        computed = index == 0 or answer(Position(0, index, 1.0, index // 2, index % 2), counts) is not None
        fates += "C" if computed else "S"
        count(counts, computed)
    assert fates == expected


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
