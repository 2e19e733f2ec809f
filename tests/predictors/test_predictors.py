"""What every predictor keeps to: rows, dtypes, bounded caches, options, and the coordinate they are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from predictions import number, predict, smooth, walk
from torch import Tensor
from toys import SIX, Toy, cached, decisions, level, reasons

from stepcache import Method, OptionError, Spectrum, Static, StepMask, UCache
from stepcache.extend import (
    DMD,
    AdaptiveOrder,
    Branch,
    Chebyshev,
    DeferredScalars,
    FiniteDifference,
    Lagrange,
    LinearPredictor,
    Position,
    Predictor,
    Reuse,
    RunInfo,
    TaylorSeer,
)
from stepcache.samplers.k_diffusion import CachedDenoiser, FlowDenoiser

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
def test_the_cache_is_bounded(predictor, evaluations):
    kept = []
    model = cached(Toy(), Method(predictor=predictor, warmup=20), sigmas=range(21, -1, -1))
    for i in range(20):
        model(torch.full((1, 1, 2, 2), float(i)), level(21 - i))
        kept.append(len(model.engine.runs.current.caches["guided"]))
    assert kept == [min(i + 1, evaluations) for i in range(20)]


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_network_that_answered_nan_is_computed_until_that_is_forgotten(predictor):
    """Evaluation 12 answers NaN: nothing is predicted from it, and skipping returns once it has left the history."""
    digits = "1" * 13 + "0" * 17

    def network(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return x * math.nan if float(sigma) == 18 else x / (2 + sigma.reshape(-1, 1, 1, 1))

    model = cached(network, Static(digits, predictor=predictor), sigmas=range(30, -1, -1))
    answers = [model(torch.linspace(1, 2, 4).reshape(1, 1, 2, 2), level(30 - i)) for i in range(30)]
    assert [i for i, answer in enumerate(answers) if not answer.isfinite().all()] == [12]
    waits = predictor.order + 1 if isinstance(predictor, DMD) else predictor.history_size  # its series remains
    assert decisions(model) == "C" * (13 + waits) + "S" * (17 - waits)
    assert reasons(model)[13 : 13 + waits] == ["prediction not finite"] * waits


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_another_shape_begins_with_an_empty_cache(predictor):
    model = cached(Toy(), Method(predictor=predictor), sigmas=SIX)
    with model.run(SIX):
        for i, sigma in enumerate(SIX[:-1]):
            size = 2 if i < 4 else 3
            model(torch.ones(1, 1, size, size), level(sigma))
    assert decisions(model)[4] == "C"
    assert reasons(model)[4] == "no cache yet"


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_predictor_goes_with_every_method(predictor):
    sigmas = torch.linspace(10, 0, 21)
    static = Static(StepMask("1111" + "10" * 8), predictor=predictor)
    for chosen in (UCache(3.0, predictor=predictor), static, Spectrum(predictor=predictor)):
        model = cached(lambda x, sigma: x / (2 + sigma.reshape(-1, 1, 1, 1)), chosen)
        with model.run(sigmas):
            answers = [model(torch.full((2, 1, 4, 4), 1 + float(s)), s.repeat(2)) for s in sigmas[:-1]]
        assert all(answer.isfinite().all() for answer in answers)
        assert "S" in decisions(model)


def test_a_weighted_predictor_of_ones_own_is_one_method():
    class Mean(LinearPredictor):
        history_size = 2
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


def coordinate_of(make: Callable[[Method], CachedDenoiser]) -> Callable[[float], float | None]:
    """What predictors of such a model's runs are told: sigma -> coordinate."""
    told = []

    class Listening(Reuse):
        def predict(self, branch):
            told.append(branch)
            return super().predict(branch)

    model = make(Method(predictor=Listening()))
    for sigma in (0.9, 0.5):
        model(torch.ones(1, 1, 2, 2), level(sigma))
    return lambda sigma: told[-1].coordinate(Position(0, 0, sigma))


def test_predictors_are_told_log_sigma_and_for_flow_models_t():
    network = Toy()
    log = coordinate_of(lambda method: cached(network, method))
    assert (log(2.0), log(0.0), log(math.inf)) == (math.log(2), None, None)
    t = coordinate_of(lambda method: CachedDenoiser(network, method, scalings="flow"))
    assert (t(0.25), t(0.0)) == (0.25, 0.0)
    flow = coordinate_of(lambda method: CachedDenoiser(FlowDenoiser(lambda x, t: 2 * x), method))
    assert (flow(3.0), flow(0.0), flow(math.inf)) == (0.75, 0.0, None)
    own = coordinate_of(lambda method: cached(network, method, coordinate=lambda sigma: 1 / sigma))
    assert (own(4.0), own(0.0)) == (0.25, None)


def test_lagrange_in_t_reproduces_a_velocity_that_is_a_parabola_in_t():
    """k-diffusion's sigma is t / (1 - t) under `FlowDenoiser`; x stays 0, so that only t moves."""
    network = FlowDenoiser(lambda x, t: x + (t * t - t).reshape(-1, 1, 1, 1))
    times = [0.9, 0.7, 0.4, 0.2]
    model = CachedDenoiser(network, Method(predictor=Lagrange(2), warmup=3))
    x = torch.zeros(1, 1, 2, 2)
    with model.run([t / (1 - t) for t in times] + [0.0]):
        answers = [model(x, level(t / (1 - t))) for t in times]
    assert decisions(model) == "CCCS"
    torch.testing.assert_close(answers[3], network(x, level(0.25)), rtol=1e-5, atol=1e-7)


def test_an_output_that_was_not_computed_and_a_prediction_that_is_not_there_are_errors():
    branch = Branch(Position(0, 0, 1.0), RunInfo(), torch.zeros(1), [], Reuse().predict, DeferredScalars())
    with pytest.raises(RuntimeError, match="has not been computed yet"):
        _ = branch.out
    with pytest.raises(RuntimeError, match="cannot be predicted"):
        branch.predict()
    assert not branch.finite
