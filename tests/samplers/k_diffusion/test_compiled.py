"""torch.compile inside the cache: as many graphs as without it, and none of the cache's own.

With inductor, and CUDA graphs if there is a GPU: STEPCACHE_LONG=1 pytest tests/samplers/k_diffusion/test_compiled.py
"""

from __future__ import annotations

import itertools
import os
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from stepcache import Forecast, UCache
from stepcache.samplers.k_diffusion import CachedDenoiser

SIGMAS = torch.tensor([14.0, 9.0, 6.0, 4.0, 3.0, 2.2, 1.6, 1.2, 0.8, 0.5, 0.2, 0.0])
METHODS = [Forecast(), UCache(1.5, start=0)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Network(nn.Module):
    """eps = tanh of a convolution, as a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Conv2d(2, 2, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        return x - level * torch.tanh(self.layer(x / (1 + level**2).sqrt()))


def drawn(model, size: int = 8, guided: bool = False, device: str = "cpu") -> Tensor:
    """Euler; with guidance in one call of twice the rows."""
    x = float(SIGMAS[0]) * torch.randn(2, 2, size, size, generator=torch.Generator().manual_seed(size)).to(device)
    for sigma, following in itertools.pairwise(SIGMAS.to(device)):
        rows = x.repeat(2, 1, 1, 1) if guided else x
        denoised = model(rows, sigma.expand(len(rows)))
        if guided:
            uncond, cond = denoised.chunk(2)
            denoised = uncond + 2 * (cond - uncond)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


@torch.no_grad()
def several(compiled, method, sizes, guided=False, device: str = "cpu") -> tuple[list[Tensor], str]:
    """Images of these sizes, one after another in one wrapper."""
    names = ("uncond", "cond") if guided else ("cond",)
    model, images = CachedDenoiser(compiled, method, scalings="eps", branches=names), []
    for size in sizes:
        with model.run(SIGMAS, 1) as run:
            images.append(drawn(run, size, guided, device).clone())
    return images, model.report.decisions("cond")


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_compiled_network_stays_one_graph_and_is_skipped(method, guided):
    counter, network = CompileCounter(), Network()
    images, decisions = several(torch.compile(network, backend=counter, fullgraph=True), method, [8] * 3, guided)
    assert counter.frame_count == 1
    expected, known = several(network, method, [8] * 3, guided)
    assert decisions == known
    assert "S" in decisions
    assert all(map(torch.equal, images, expected))


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2), (False, 3)])
def test_sizes_that_change_are_compiled_as_often_as_without_the_cache(dynamic, graphs):
    sizes = (8, 8, 16, 12)
    counts = []
    for method in (None, *METHODS):
        torch._dynamo.reset()
        counter = CompileCounter()
        several(torch.compile(Network(), backend=counter, dynamic=dynamic), method, sizes)
        counts.append(counter.frame_count)
    assert counts == [graphs] * 3


def test_a_network_compiled_in_place_is_one_graph():
    counter, network = CompileCounter(), Network()
    network.compile(backend=counter)
    _, decisions = several(network, Forecast(), [8, 8])
    assert counter.frame_count == 1
    assert "S" in decisions


def test_compiling_around_the_cache_is_noticed_and_skips_all_the_same():
    """Nothing of the cache is traced: it takes no time, and the image is the right one."""
    counter, model = CompileCounter(), CachedDenoiser(Network(), Forecast(), scalings="eps")
    around = torch.compile(model, backend=counter)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.run(SIGMAS, 1):
            image = drawn(around)
    assert len([one for one in caught if "compile first, then attach" in str(one.message)]) == 1
    assert counter.frame_count == 0
    assert "S" in model.report.decisions("guided")
    (expected,), _ = several(Network(), Forecast(), [8])
    assert torch.equal(image, expected)


def test_a_compiled_network_inside_stays_compiled_if_what_is_around_is_compiled_too():
    inner, outer = CompileCounter(), CompileCounter()
    model = CachedDenoiser(torch.compile(Network(), backend=inner), Forecast(), scalings="eps")
    around = torch.compile(model, backend=outer)
    with torch.no_grad(), pytest.warns(UserWarning, match="compile first"), model.run(SIGMAS, 1):
        drawn(around)
    assert (inner.frame_count, outer.frame_count) == (1, 0)


@pytest.mark.skipif("STEPCACHE_LONG" not in os.environ, reason="a minute of compilation: STEPCACHE_LONG=1")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_inductor_compiles_once_and_the_images_stay(method, dynamic, mode):
    """Under CUDA graphs the network's output is overwritten by the next call: the cache keeps its own."""
    network = Network().to(DEVICE)
    sizes = (8, 8, 8) if dynamic is None else (8, 16, 8)
    counters.clear()
    compiled = torch.compile(network, mode=mode, dynamic=dynamic, fullgraph=True)
    images, decisions = several(compiled, method, sizes, device=DEVICE)
    assert counters["stats"]["unique_graphs"] == 1
    expected, known = several(network, method, sizes, device=DEVICE)
    assert decisions == known
    assert "S" in decisions
    for image, other in zip(images, expected, strict=True):
        torch.testing.assert_close(image, other, rtol=1e-3, atol=1e-3)
