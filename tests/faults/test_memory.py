"""How much a run keeps, in which dtype and where; and that nothing of it is left afterwards, however the run ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from soak import Bench, Fails, kept, situations
from torch import Tensor
from toys import SIX, Forgetful, cached, level

from stepcache import Forecast, Method, OptionError, Static, method, offload
from stepcache.extend import Lagrange
from stepcache.samplers.k_diffusion import InTurn

pytestmark = pytest.mark.usefixtures("few_objects")

SHAPE = (1, 1, 7, 111)
"""A latent of 777 elements, which nothing else here has."""


def held(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)) -> int:
    """The bytes of all latents that are alive."""
    tensors = [one for one in gc.get_objects() if type(one) is Tensor and one.numel() == 777 and one.dtype in dtypes]
    return sum(memory.values()) if (memory := {one.data_ptr(): one.nbytes for one in tensors}) else 0


def noisy(x: Tensor, sigma: Tensor, name: str = "") -> Tensor:
    return torch.sin(3 * x) + sigma.reshape(-1, 1, 1, 1)


def peak(chosen: Method, branches: int = 1, sigmas: tuple[float, ...] = SIX) -> int:
    """The most that is alive between two evaluations of a run, in latents of float32, beside the sampler's own."""
    names = InTurn(*"abcd"[:branches]) if branches > 1 else None
    model = cached(Forgetful(noisy), chosen, branches=names)
    most = 0
    with model.run(sigmas, 1), torch.no_grad():
        for k, sigma in enumerate(sigmas[:-1]):
            x = torch.full(SHAPE, 1.0 + k)
            for _ in range(branches):
                model(x, level(sigma))
            del x
            most = max(most, held())
    gc.collect()
    assert held() == 0
    return most / (777 * 4)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_cache_is_two_latents_an_evaluation_and_branch(order, branches):
    assert peak(Static("111110", predictor=Lagrange(order)), branches) == 2 * (order + 1) * branches


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_halves_it(dtype):
    assert peak(Static("111110", predictor=Lagrange(2), dtype=dtype)) == 3
    assert peak(Static("111110", predictor=Lagrange(2), dtype="float32")) == 6


def test_forecast_keeps_three_evaluations_and_what_the_noise_is_measured_from():
    """2 x 3 latents a branch, and 3 (1 + branches); x of the two is one tensor if it is kept in its own dtype."""
    sigmas = (*(10.0 * 0.8**k for k in range(12)), 0.0)
    assert peak(Forecast(), 1, sigmas) == 6 + 3 * 2 - 2
    assert peak(Forecast(dtype="float16"), 1, sigmas) == 3 + 3 * 2


class Away:
    """A host's memory in which nothing can be mistaken for a latent on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self.bytes, self.dtype, self.shape = tensor.view(torch.uint8).flatten().tolist(), tensor.dtype, tensor.shape

    def back(self) -> Tensor:
        return torch.tensor(self.bytes, dtype=torch.uint8).view(self.dtype).reshape(self.shape)


@pytest.fixture
def host(monkeypatch):
    """Stands in for another device, which the tests have not: the host's memory is `Away`."""
    monkeypatch.setattr(offload, "to_host", Away)
    monkeypatch.setattr(offload, "to_device", lambda there, device: there.back())


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("predictor", [Lagrange(2), Forecast().predictor], ids=["lagrange", "adaptive"])
def test_offloaded_nothing_is_left_on_the_device_between_evaluations(predictor):
    assert peak(Static("111110", predictor=predictor, offload="cpu"), 2) == 0


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", ["forecast", "ucache", "uncond", "taylorseer", "spectrum", "hicache", "masked"])
def test_offloading_changes_no_bit(name, monkeypatch):
    pytest.importorskip("k_diffusion")
    import soak

    make = soak.METHODS[name]
    some = [one for one in situations(300, seed=5) if one.method == name and one.steps > 5 and not one.fault][:3]
    assert some
    without = [Bench().run(one) for one in some]
    monkeypatch.setitem(soak.METHODS, name, lambda: make().replace(offload="cpu"))
    assert [Bench().run(one) for one in some] == without


def test_what_float16_cannot_hold_is_computed():
    """Outputs of 1e5: infinite in float16. bfloat16 has float32's range."""
    for dtype, expected in (("float16", "CCCCCC"), ("bfloat16", "CSSSSC")):
        model = cached(Forgetful(lambda x, sigma: x + 1e5), Static("100001", dtype=dtype), sigmas=SIX)
        for sigma in SIX[:-1]:
            assert torch.isfinite(model(torch.ones(1, 1, 2, 2), level(sigma))).all()
        assert model.report.decisions("guided") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dtype=flaot16", "unknown dtype 'flaot16'. Did you mean 'float16'?"),
        ("offload=cuda", "unknown offload 'cuda'."),
    ],
)
def test_what_cannot_be_is_refused(text, message):
    with pytest.raises(OptionError) as refusal:
        method("forecast", text)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("by", ["thread", "task"])
def test_a_loop_that_nobody_announced_leaves_nothing_if_its_thread_or_task_has_ended(by):
    """It was broken off outside of the model, which the cache cannot see."""
    model = cached(Forgetful(noisy), Forecast(min_evaluations=0), sigmas=SIX)

    def loop() -> int:
        with torch.no_grad():
            for k, sigma in enumerate(SIX[:4]):
                model(torch.full(SHAPE, 1.0 + k), level(sigma))
        return kept(model)

    async def task() -> int:
        return loop()

    if by == "thread":
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(loop).result() > 0
    else:
        assert asyncio.run(task()) > 0
    gc.collect()
    assert (held(), kept(model)) == (0, 0)
    assert model.report.events


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("where", [None, "cpu"])
@pytest.mark.parametrize("end", ["network", "outside", "generator", "complete"])
def test_nothing_of_a_run_is_left_however_it_ended(end, where):
    calls = 0

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if end == "network" and calls == 4:
            raise Fails
        return noisy(x, sigma)

    model = cached(Forgetful(network), Forecast(min_evaluations=0, offload=where))

    def loop():
        with model.run(SIX, 1), torch.no_grad():
            for k, sigma in enumerate(SIX[:-1]):
                model(torch.full(SHAPE, 1.0 + k), level(sigma))
                if end == "outside" and k == 3:
                    raise Fails
                yield

    steps = loop()
    with contextlib.suppress(Fails):
        for k, _ in enumerate(steps):
            if end == "generator" and k == 3:
                steps.close()
                break
    gc.collect()
    assert (held(), kept(model)) == (0, 0)
    assert model.report.events
