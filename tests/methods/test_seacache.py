"""SeaCache: the filter against a direct sum, the accumulation worked out by hand, and where it appears by itself."""

from __future__ import annotations

import math

import pytest
import torch
from toys import SIX, cached, decisions, drive, level

from stepcache import METHODS, Method, OptionError, method
from stepcache.methods.seacache import SeaCache, SeaCacheRule, wiener
from stepcache.samplers.k_diffusion import CachedDenoiser


def by_definition(x: torch.Tensor, image: float, noise: float, power: float) -> torch.Tensor:
    """h(f) = a S / (a^2 S + b^2) with S = 1 / |f|^power, frequency by frequency, in two dimensions."""

    def h(k: int, n: int) -> float:
        f = min(k, n - k) / n
        return 1 / image if f == 0 else image * f**-power / (image**2 * f**-power + noise**2)

    rows, columns = x.shape[-2:]
    gain = torch.tensor([[h(i, rows) * h(j, columns) for j in range(columns)] for i in range(rows)], dtype=x.dtype)
    return torch.fft.ifft2(torch.fft.fft2(x) * gain / gain.mean()).real


@pytest.mark.parametrize(("image", "noise"), [(0.1, 0.99), (0.7, 0.7), (0.99, 0.1)])
def test_the_filter_is_the_wiener_filter(image, noise):
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wiener(x, image, noise, 2.0, (-2, -1)), by_definition(x, image, noise, 2.0))


def test_without_noise_nothing_is_filtered_and_with_much_only_the_mean_is_left():
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wiener(x, 1.0, 0.0, 2.0, (-2, -1)), x)
    smooth = wiener(x, 1e-4, 1.0, 2.0, (-2, -1))
    assert smooth.std() < 1e-3 * smooth.mean().abs()


def test_the_change_accumulates_from_evaluation_to_evaluation():
    """Of power 0 the filter does nothing, and d = |x - x'| / |x'| is 0.1 from each evaluation to the next."""
    xs = [1.1**k for k in range(6)]
    model = cached(lambda x, sigma: 2 * x, SeaCache(0.25, power=0), sigmas=SIX)
    drive(model, SIX[:-1], xs)
    estimates = [event.estimate for event in model.report.events]
    # computed, 0.1, 0.2, 0.3 (computed, then from 0), 0.1, the last step
    assert decisions(model) == "CSSCSC"
    assert estimates[1:5] == pytest.approx([0.1, 0.2, 0.3, 0.1], rel=1e-4)


def test_a_step_that_had_to_be_computed_begins_the_sum_again():
    model = cached(lambda x, sigma: 2 * x, SeaCache(0.25, power=0, mask="100100"), sigmas=SIX)
    drive(model, SIX[:-1], [1.1**k for k in range(6)])
    assert decisions(model) == "CSSCSC"
    assert model.report.events[4].estimate == pytest.approx(0.1, rel=1e-4)


def test_noise_that_the_filter_takes_out_does_not_count():
    """Early in a run fresh noise changes the input a lot, and the filtered input little."""
    generator = torch.Generator().manual_seed(0)
    image = torch.full((1, 1, 64, 64), 10.0)

    def estimate(filtered: bool) -> float:
        rule = SeaCache(1e9, power=2.0 if filtered else 0.0)
        model = CachedDenoiser(lambda x, sigma: x, rule, scalings="flow", sigmas=(0.97, 0.96, 0.9, 0.0))
        for t in (0.97, 0.96):
            model((1 - t) * image + t * torch.randn(image.shape, generator=generator), level(t))
        return model.report.events[1].estimate

    assert estimate(True) < 0.6 * estimate(False)


def test_one_transfer_a_decision(monkeypatch):
    from stepcache.extend import DeferredScalars

    count, fetch = [], DeferredScalars.fetch
    monkeypatch.setattr(DeferredScalars, "fetch", lambda pool: (count.append(1), fetch(pool)))
    model = cached(lambda x, sigma: 2 * x, SeaCache(0.5), sigmas=SIX)
    drive(model, SIX[:-1], [1.1**k for k in range(6)])
    assert len(count) <= sum(event.estimate is not None for event in model.report.events)


def test_options_and_refusals():
    assert METHODS["seacache"] is SeaCache
    assert method("seacache", "threshold=0.6,power=3,warmup=2").criterion == SeaCacheRule(0.6, 3)
    assert SeaCache(0).never_skips
    assert isinstance(SeaCache(last_step=False), Method)
    with pytest.raises(OptionError, match=r"threshold=-1: accepted is a number of at least 0"):
        SeaCache(-1)
    assert math.isinf(SeaCacheRule(math.inf).threshold)
