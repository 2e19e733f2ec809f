"""Schedules that are none: 1 to 3 steps, sigmas that are repeated, that rise, that do not end at 0.

With STEPCACHE_LONG=1 all of them under every method, however the schedule is known; without it only announced runs, and
of the others every third."""

from __future__ import annotations

import itertools
import os
import warnings

import pytest
import torch
from soak import METHODS, Network, alike, named
from torch import Tensor

from stepcache import Forecast
from stepcache.samplers.k_diffusion import CachedDenoiser, sample

ODD = {
    "one step": (10.0, 0.0),
    "two steps": (10.0, 1.0, 0.0),
    "three steps": (10.0, 3.0, 1.0, 0.0),
    "one step that does not end at 0": (10.0, 1.0),
    "does not end at 0": (10.0, 7.0, 5.0, 3.0, 2.0, 1.0),
    "repeated": (10.0, 7.0, 7.0, 5.0, 5.0, 5.0, 3.0, 2.0, 1.0, 0.0),
    "one sigma": (5.0, 5.0, 5.0, 5.0, 5.0),
    "rises": (1.0, 2.0, 3.0, 5.0, 7.0, 10.0),
    "rises once": (10.0, 7.0, 5.0, 3.0, 6.0, 5.0, 3.0, 2.0, 1.0, 0.0),
    "begins at 0": (0.0, 5.0, 3.0, 1.0, 0.0),
    "0 in the middle": (5.0, 3.0, 0.0, 2.0, 1.0, 0.0),
    "only 0": (0.0, 0.0),
    "ends at 0 twice": (10.0, 5.0, 2.0, 1.0, 0.0, 0.0),
    "tiny": tuple(1e-30 * 0.5**k for k in range(8)),
    "huge": tuple(1e30 * 0.5**k for k in range(8)),
}


def loop(model, x: Tensor, sigmas: Tensor, callback=None, disable: bool = True) -> Tensor:
    """Euler, as long as sigma is above 0: k-diffusion's own divides by it."""
    for number, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoised = model(x, sigma.expand(len(x)), cond=torch.ones(len(x)))
        if callback is not None:
            callback({"x": x, "i": number, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = denoised + (x - denoised) * (following / sigma if sigma > 0 else 1.0)
    return x


@pytest.mark.parametrize("known", ["announced", "given", "bare"])
@pytest.mark.parametrize("name", METHODS)
def test_a_second_run_on_any_schedule_is_the_first_again(name, known):
    """One after another on one wrapper: the same bits, and finite if the bare loop is.

    Where nobody says that a run begins, a sigma that comes once more may belong to the run before: it may cost a few
    evaluations, or find a few more to skip.
    """
    every, offset = (
        (1, 0) if "STEPCACHE_LONG" in os.environ or known == "announced" else (3, [*METHODS].index(name) % 3)
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for schedule in [*ODD.values()][offset::every]:
            sigmas = torch.tensor(schedule)
            x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * max(schedule)
            network = Network()
            bare = loop(network, x, sigmas)
            given = sigmas if known == "given" else None
            model = CachedDenoiser(network, METHODS[name](), branches=named, sigmas=given)
            first = sample(loop, model, x, sigmas) if known == "announced" else loop(model, x, sigmas)
            decisions = model.report.decisions("cond")
            second = sample(loop, model, x, sigmas) if known == "announced" else loop(model, x, sigmas)
            unsaid = known == "bare" or (known == "given" and len(set(schedule)) == 1)
            assert unsaid or alike(first, second), schedule
            assert torch.isfinite(first).all() or not torch.isfinite(bare).all(), schedule
            if known == "announced":
                assert len(decisions) == len(schedule) - 1, schedule
                assert model.report.decisions("cond") == decisions
                assert model.engine.runs.current is None


@pytest.mark.parametrize("steps", range(1, 9))
def test_a_run_of_eight_steps_and_fewer_is_the_bare_one_under_forecast_and_the_report_says_why(steps):
    sigmas = torch.cat([torch.linspace(10, 1, steps), torch.zeros(1)])
    network = Network()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 10
    model = CachedDenoiser(network, Forecast(), branches=named)
    with torch.no_grad():
        assert torch.equal(sample(loop, model, x, sigmas), loop(network, x, sigmas))
    assert "C" * steps == model.report.decisions("cond")
    assert "all are computed" in " ".join(model.report.notes)
