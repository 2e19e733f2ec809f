"""How often the host waits for the device: counted on a device that is made up, whoever asks for a number."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from elsewhere import DEVICE, Accelerator
from torch import Tensor

from stepcache import Forecast, Method, UCache
from stepcache.samplers.k_diffusion import CachedDenoiser, InTurn

SIGMAS = (14.0, 9.0, 6.0, 4.0, 3.0, 2.2, 1.6, 1.2, 0.8, 0.5, 0.2, 0.0)
METHODS = {"gated": Method(warmup=99), "forecast": Forecast(min_evaluations=0), "ucache": UCache(1.5, start=0)}


def network(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def waits(
    method: Method, separate: bool, announced: bool, sigmas: tuple[float, ...] | None = None
) -> tuple[list[int], str]:
    """The transfers of every evaluation of an Euler loop, and its decisions."""
    branches = InTurn("cond", "uncond") if separate else None
    model = CachedDenoiser(network, method, scalings="eps", branches=branches, sigmas=sigmas)
    counts = []

    def loop(call: Callable[..., Tensor]) -> None:
        on_device = torch.tensor(SIGMAS).to(DEVICE)
        x = 14 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        for k, (sigma, following) in enumerate(itertools.pairwise(SIGMAS)):
            at, before = on_device[k] * torch.ones(2).to(DEVICE), device.transfers
            denoised = call(x, at)
            if separate:
                denoised = denoised + call(x, at) * 0.1
            counts.append(device.transfers - before)
            x = x + (x - denoised) / sigma * (following - sigma)

    with Accelerator() as device, torch.no_grad():
        if announced:
            with model.run(SIGMAS, 1) as run:
                loop(run)
        else:
            loop(model)
    return counts, model.report.decisions("cond" if separate else "guided")


@pytest.mark.parametrize("separate", [False, True], ids=["one call", "two calls"])
@pytest.mark.parametrize("name", METHODS)
def test_an_announced_run_waits_once_a_decision_and_not_at_all_if_gated(name, separate):
    counts, decisions = waits(METHODS[name], separate, announced=True)
    assert max(counts) == (name != "gated")
    assert counts[0] == 0
    assert ("S" in decisions) == (name != "gated")


@pytest.mark.parametrize("sigmas", [None, SIGMAS], ids=["bare", "given"])
@pytest.mark.parametrize("separate", [False, True], ids=["one call", "two calls"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:the last step cannot be protected")
def test_a_loop_that_nobody_announces_waits_once_more_for_its_sigma_and_place(name, separate, sigmas):
    """What tells it from another loop comes over with sigma."""
    counts, decisions = waits(METHODS[name], separate, announced=False, sigmas=sigmas)
    assert (min(counts), max(counts)) == (1, 1 + (name != "gated"))
    assert ("S" in decisions) == (name != "gated")


def test_another_loop_is_noticed_on_a_device_too():
    model = CachedDenoiser(network, Method(), scalings="eps")
    noise = torch.Generator().manual_seed(0)
    with Accelerator(), torch.no_grad():
        for sigma in (14.0, 9.0, 6.0):
            x = sigma * torch.randn(1, 4, 16, 16, generator=noise).to(DEVICE)
            assert (model(x, torch.tensor([sigma]).to(DEVICE)) == network(x, torch.tensor([sigma]).to(DEVICE))).all()
            assert model.report.decisions("guided") == "C"
