"""Forecast's predictor: worked out by hand, and exact on networks whose data are not centred or mostly empty."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stepcache import Forecast, OptionError
from stepcache.extend import AdaptiveOrder, Branch, DeferredScalars, Lagrange, Parametrization, Position, RunInfo
from stepcache.samplers.k_diffusion import CachedDenoiser, sample
from stepcache.samplers.parametrization import ScalingsAsFloats, eps_scalings, flow_scalings


def predict(
    predictor: AdaptiveOrder,
    known: Sequence[tuple[float, float, float]],
    sigma: float,
    x: float = 0.0,
    run: RunInfo | None = None,
    noise: float | None = None,
) -> float:
    """The output predicted at sigma for an input x, from computed evaluations (sigma, x, out), oldest first."""
    run, history = run or RunInfo(), deque(maxlen=predictor.history_size)
    level = None if noise is None else torch.tensor([noise], dtype=torch.float64)

    def branch(index: int, sigma: float, x: float) -> Branch:
        given = torch.tensor([[x]], dtype=torch.float64)
        one = Branch(Position(0, index, sigma), run, given, history, predictor.predict, DeferredScalars(), True)
        one.noise = level
        return one

    for index, (at, past, out) in enumerate(known):
        computed = branch(index, at, past)
        computed.out = torch.tensor([[out]], dtype=torch.float64)
        predictor.remember(history, computed.entry(torch.float64))
    return float(branch(len(known), sigma, x).prediction)


def walk(outs: Sequence[float]) -> list[tuple[float, float, float]]:
    """Outputs at inputs 0; sigma halves from one to the next, so that without a schedule they are evenly spaced."""
    return [(2.0**-i, 0.0, out) for i, out in enumerate(outs)]


def test_the_order_follows_the_backtest_errors():
    """Of 0, 4, 6, 9 the orders 0, 1, 2 would have predicted 6, 8, 6 for the last; they predict 9, 12, 13 next."""
    errors, guesses = [3.0, 1.0, 3.0], [9.0, 12.0, 13.0]
    first = 1 / (1 + (errors[1] / (5 * errors[0])) ** 4)
    second = first * 0.5 / (1 + (errors[2] / (1.3 * errors[1])) ** 4)
    expected = guesses[0] + first * (guesses[1] - guesses[0]) + second * (guesses[2] - guesses[1])
    assert predict(AdaptiveOrder(), walk([0, 4, 6, 9]), 2.0**-4) == pytest.approx(expected, rel=1e-6)


def test_an_untested_order_is_kept_about_as_far_as_its_history_spans():
    assert predict(AdaptiveOrder(), walk([5]), 0.5) == 5
    untested = 1 / (1 + (1 / 1.5) ** 8)
    assert predict(AdaptiveOrder(), walk([5, 7]), 0.25) == pytest.approx(7 + untested * 2)
    first = 1 / (1 + (1 / (5 * 3)) ** 4)  # order 0 was off by 3 at the last evaluation, order 1 by 1
    second = first * 0.5 / (1 + (0.5 / 1.5) ** 8)
    assert predict(AdaptiveOrder(), walk([5, 7, 10]), 0.125) == pytest.approx(10 + first * 3 + second * 1)


def test_far_from_two_evaluations_that_are_close_together_the_newest_is_kept():
    far = predict(AdaptiveOrder(), walk([5, 7]), 2.0**-5)  # four times as far away as they are apart
    assert far == pytest.approx(7 + 8 / (1 + (4 / 1.5) ** 8))


def test_evaluations_without_an_index_or_all_at_one_are_reused():
    assert predict(AdaptiveOrder(), walk([5, 7]), 0.25, run=RunInfo(coordinate=lambda sigma: 1.0)) == 7
    assert predict(AdaptiveOrder(), [(1.0, 0.0, 5.0), (0.0, 0.0, 7.0)], 0.25) == 5
    assert predict(AdaptiveOrder(), [(0.0, 0.0, 5.0), (1.0, 0.0, 7.0)], 0.25) == 7
    assert predict(AdaptiveOrder(), walk([5, 7]), 0.0) == 7


def test_under_noise_a_series_that_jumps_to_and_fro_is_hardly_extrapolated():
    """Order 1 was off by twice as much as order 0. Half of it is kept at a ratio of 5, under noise at 1.3."""
    jumping = walk([0, 1, -1, 1, -1, 1])
    assert abs(predict(AdaptiveOrder(), jumping, 2.0**-6, noise=1.0) - 1) < 0.5
    assert 2 < predict(AdaptiveOrder(), jumping, 2.0**-6, noise=0.0) - 1 < 2.5
    halfway = predict(AdaptiveOrder(), jumping, 2.0**-6, noise=0.5) - 1
    assert predict(AdaptiveOrder(), jumping, 2.0**-6, noise=1.0) - 1 < halfway
    assert halfway < predict(AdaptiveOrder(), jumping, 2.0**-6, noise=0.0) - 1


def test_extrapolation_is_in_the_schedules_step_index():
    """Outputs 0, 1 at steps 0, 1 of a schedule whose sigmas fall unevenly; step 2 gets 2 of order 1."""
    run = RunInfo(schedule=(10.0, 9.0, 1.0, 0.5, 0.0))
    position = [Position(0, i, run.schedule[i], i) for i in range(3)]
    assert [run.index(one) for one in position] == [0.0, 1.0, 2.0]
    assert run.index(Position(0, 1, 9.0, 0, 1)) == 1.0  # Heun's second evaluation is at the next step's sigma
    assert run.index(Position(0, 1, math.sqrt(90.0), 0, 1)) == pytest.approx(0.5)  # DPM2's is halfway in log sigma
    assert run.index(Position(0, 1, 20.0, 1)) == pytest.approx(1 - math.log(20 / 9) / math.log(9))  # churned upward
    assert run.index(Position(0, 3, 0.25, 3)) == 3.5
    assert run.index(Position(0, 3, 3.3)) is None  # not on the schedule


def test_the_share_of_denoised_by_hand():
    """eps network, sigma 2 then 1, one evaluation: out = 3/4 eps' + 1/4 (x - D') / sigma; x here is 5 in the latent."""
    run = RunInfo(parametrization=ScalingsAsFloats(eps_scalings).parametrization)
    x = 4 / math.sqrt(5), 5 / math.sqrt(2)  # latents 4 and 5, as the network gets them
    denoised = 4 - 2 * 0.5
    expected = 0.75 * 0.5 + 0.25 * (5 - denoised) / 1
    assert predict(AdaptiveOrder(), [(2.0, x[0], 0.5)], 1.0, x[1], run) == pytest.approx(expected, rel=1e-6)
    noisy = 0.2 * 0.5 + 0.8 * (5 - denoised) / 1
    assert predict(AdaptiveOrder(), [(2.0, x[0], 0.5)], 1.0, x[1], run, noise=1.0) == pytest.approx(noisy, rel=1e-6)


@pytest.mark.parametrize(
    ("c_skip", "c_out", "c_in"),
    [(1.0, -2.0, 5**-0.5), (0.2, 0.4, 0.3), (0.0, 1.0, 1.0), (1 / 3, -2 / 3, 1 / 3), (1.0, -0.7, 1.0)],
)
def test_parametrization_gives_back_denoised_and_the_derivative(c_skip, c_out, c_in):
    """At sigma 2 of a latent 7 with a raw output 0.3; of the two flows the derivative is the raw output."""
    sigma, x, out = (2.0, 7.0, 0.3)
    known = Parametrization.of(sigma, c_skip, c_out, c_in)
    denoised = c_skip * x + c_out * out
    assert known.denoised[0] * x * c_in + known.denoised[1] * out == pytest.approx(denoised)
    derivative = known.derivative[0] * x * c_in + known.derivative[1] * out
    flow = c_skip == c_in
    assert derivative == pytest.approx(out if flow else (x - denoised) / sigma)


def test_a_flow_at_any_scaling_is_known_by_its_scalings():
    assert ScalingsAsFloats(flow_scalings).parametrization(0.25).derivative == (0.0, 1.0)
    assert Parametrization.of(0.0, 1.0, 0.0, 1.0) == Parametrization()


class Data:
    """The exact eps network of data that is one image: denoised is that image at every sigma."""

    def __init__(self, image: Tensor) -> None:
        self.image, self.calls = image, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.image.expand_as(x).clone()


MEAN_6 = torch.full((1, 1, 4, 4), 6.0)
EMPTY = torch.zeros(1, 1, 4, 4)
EMPTY[..., 2, 1] = 16.0


@pytest.mark.parametrize("image", [MEAN_6, EMPTY], ids=["mean 6", "empty background"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "dpm_2", "euler_ancestral", "dpmpp_2m_sde"])
def test_forecast_is_exact_on_data_that_is_one_image(image, sampler):
    """eps = (x - image) / sigma is constant along a deterministic run, and the image is denoised under any noise."""
    sigmas = torch.tensor([20.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.0])
    x = image + 20 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    network = Data(image)
    torch.manual_seed(1)
    full = sample(sampler, CachedDenoiser(network, None), x, sigmas, disable=True)
    seen = []

    def keep(info: dict) -> None:
        seen.append((info["denoised"] - image).abs().max())

    torch.manual_seed(1)
    cached = CachedDenoiser(network, Forecast(interval=3, last_step=False))
    result = sample(sampler, cached, x, sigmas, callback=keep, disable=True)
    assert cached.report.skipped > 0
    noisy = sampler in ("euler_ancestral", "dpmpp_2m_sde")
    if noisy:
        torch.testing.assert_close(full, result, rtol=0, atol=2.0)
    else:
        assert max(seen) < 1e-3
        torch.testing.assert_close(full, result, rtol=0, atol=1e-3)


def test_residual_reuse_is_off_by_the_mean_where_forecast_is_exact():
    """Mean 6, sigma from 2 to 1, no noise in x: the residual carries 6 / sqrt(2) - 6 / sqrt(5) into the output."""
    run = RunInfo(parametrization=ScalingsAsFloats(eps_scalings).parametrization)
    x = 6 / math.sqrt(5), 6 / math.sqrt(2)
    known = [(2.0, x[0], 0.0)]
    assert predict(AdaptiveOrder(), known, 1.0, x[1], run) == pytest.approx(0, abs=1e-6)
    assert predict(Lagrange(0), known, 1.0, x[1], run) == pytest.approx(6 / math.sqrt(2) - 6 / math.sqrt(5))


def test_a_sample_does_not_depend_on_its_neighbours():
    torch.manual_seed(3)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 1, 3, padding=1)
    )
    sigmas = torch.tensor([10.0, 6.0, 3.0, 1.5, 0.8, 0.4, 0.2, 0.0])
    x = 10 * torch.randn(3, 1, 6, 6)
    with torch.no_grad():
        model = lambda x, sigma: network(x)  # noqa: E731
        together = sample("dpmpp_2m", CachedDenoiser(model, Forecast()), x, sigmas, disable=True)
        alone = [
            sample("dpmpp_2m", CachedDenoiser(model, Forecast()), x[i : i + 1], sigmas, disable=True) for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_options_are_checked_by_name():
    for bad in ({"order": -1}, {"order": 0.5}, {"trust": -1}):
        [name] = bad
        with pytest.raises(OptionError, match=f"^{name}="):
            AdaptiveOrder(**bad)


def test_the_cache_is_order_plus_one_evaluations():
    assert [AdaptiveOrder(order).history_size for order in (0, 1, 2)] == [1, 2, 3]
    assert isinstance(Forecast().predictor, AdaptiveOrder)
