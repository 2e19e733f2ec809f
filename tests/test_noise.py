"""Fresh noise is seen in the run itself, whatever the sampler, its schedule, the guidance and how branches come."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from stepcache import Forecast, OptionError
from stepcache.bench.unipc import sample_unipc
from stepcache.extend import AdaptiveOrder, FreshNoise, some_rows
from stepcache.samplers.k_diffusion import CachedDenoiser, InTurn, sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from k_diffusion import sampling as k

DETERMINISTIC = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m", "unipc")
NOISY = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
SCHEDULES = {
    "Karras": lambda n: k.get_sigmas_karras(n, 0.03, 15.0),
    "exponential": lambda n: k.get_sigmas_exponential(n, 0.02, 100.0),
    "linear": lambda n: torch.cat([torch.linspace(10, 0.1, n), torch.zeros(1)]),
}


class Network(nn.Module):
    """A smooth nonlinear denoiser; the label changes it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2, 3, padding=1))
            self.requires_grad_(False)

    def forward(self, x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        return self.net(x / (1 + sigma**2).sqrt() + shift) + x / (1 + sigma**2)


class Guided(nn.Module):
    def __init__(self, model: nn.Module, scale: float, separate: bool) -> None:
        super().__init__()
        self.model, self.scale, self.separate = model, scale, separate

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        shift = torch.cat([torch.zeros(len(x), 1, 1, 1), torch.ones(len(x), 1, 1, 1)])
        if self.separate:
            cond, uncond = self.model(x, sigma, shift=1.0), self.model(x, sigma, shift=0.0)
        else:
            uncond, cond = self.model(torch.cat([x, x]), torch.cat([sigma, sigma]), shift=shift).chunk(2)
        return uncond + self.scale * (cond - uncond)


class Listening(AdaptiveOrder):
    """Keeps the noise levels that it is shown."""

    def predict(self, branch):
        levels.append(branch.noise)
        return super().predict(branch)


levels: list[Tensor | None] = []


def measured(sampler: str, schedule: str, wrap=None, steps: int = 12, **arguments) -> Tensor:
    """The noise levels of a run with skips (evaluations, B)."""
    levels.clear()
    cached = CachedDenoiser(Network(), Forecast(predictor=Listening()), **(wrap or {}).pop("cached", {}))
    model = Guided(cached, **wrap) if wrap else cached
    sigmas = SCHEDULES[schedule](steps)
    torch.manual_seed(1)
    x = torch.randn(3, 2, 8, 8) * sigmas[0]
    sample(sample_unipc if sampler == "unipc" else sampler, model, x, sigmas, disable=True, **arguments)
    return torch.stack([level for level in levels if level is not None])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_deterministic_sampler_has_no_noise(sampler, schedule):
    assert measured(sampler, schedule).max() < 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", NOISY)
def test_fresh_noise_is_seen_at_every_evaluation_after_the_first_step(sampler, schedule):
    found = measured(sampler, schedule)
    assert found[2:].min() > 0.1
    assert found.mean() > 0.5


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("separate", [False, True], ids=["batched", "separate"])
@pytest.mark.parametrize("scale", [1.5, 7.5])
def test_inside_guidance_of_any_scale_it_is_the_same(sampler, separate, scale):
    names = InTurn("cond", "uncond") if separate else ("uncond", "cond")
    wrap = {"scale": scale, "separate": separate, "cached": {"branches": names}}
    found = measured(sampler, "Karras", wrap)
    if sampler in DETERMINISTIC:
        assert found.max() < 1e-3
    else:
        assert found[4:].min() > 0.3


def test_a_mixture_lies_between_and_grows_with_the_noise():
    means = [measured("euler_ancestral", "Karras", eta=eta).mean() for eta in (0.0, 0.03, 0.1, 0.3, 1.0)]
    assert means[0] < 1e-3
    assert means == sorted(means)
    churned = [measured("euler", "Karras", s_churn=churn).mean() for churn in (0.0, 0.01, 1.0)]
    assert churned[0] < 1e-3 < churned[1] < churned[2]


@pytest.mark.parametrize("told", [0.0, 0.4, 1.0])
def test_a_host_that_knows_may_say_it(told):
    levels.clear()
    cached = CachedDenoiser(Network(), Forecast(predictor=Listening()), noise=told)
    sample("euler_ancestral", cached, torch.randn(2, 2, 8, 8) * 15, SCHEDULES["Karras"](8), disable=True)
    assert all(level.tolist() == pytest.approx([told, told]) for level in levels)
    with pytest.raises(OptionError, match=r"^noise="):
        CachedDenoiser(Network(), Forecast(), noise=1.5)


def test_the_share_by_hand():
    """x moves from (1, 0, 0) by 3 in the known output's direction and by 0.3 in one of its own: 0.3^2 / (9 + 0.3^2)."""
    noise = FreshNoise()
    x, out = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert noise.level(0, x, 0.0) is None
    noise.record(0, x, [out])
    innovation = 0.09 / 9.09
    expected = innovation / (innovation + 0.15**2)
    assert float(noise.level(1, x + torch.tensor([[0.0, 3.0, 0.3]]), 0.0)) == pytest.approx(expected, rel=1e-4)
    noise.record(1, x, [out])
    assert float(noise.level(2, x + 2 * out, 0.0)) == pytest.approx(0.7 * expected, rel=1e-4)


def test_rounding_of_half_precision_is_not_noise():
    torch.manual_seed(0)
    x, out = torch.randn(1, 4000) * 10, torch.randn(1, 4000)
    moved = x - 0.5 * out
    for dtype in (torch.float16, torch.bfloat16):
        noise = FreshNoise()
        noise.record(0, x.to(dtype).float(), [out])
        assert noise.level(1, moved.to(dtype).float(), torch.finfo(dtype).eps) < 0.05


def test_another_shape_forgets_what_was_given():
    noise = FreshNoise()
    noise.record(0, torch.ones(1, 4), [torch.ones(1, 4)])
    assert noise.level(1, torch.ones(2, 4), 0.0) is None


@pytest.mark.parametrize(
    "shape", [(2, 4, 128, 128), (1, 16, 5, 96, 96), (2, 4096, 64)], ids=["image", "video", "tokens"]
)
def test_of_a_large_latent_some_rows_are_enough(shape):
    noise, random = FreshNoise(), torch.Generator().manual_seed(0)
    x, out, fresh = (torch.randn(shape, generator=random) for _ in range(3))
    noise.record(0, x, [out])
    assert noise.level(1, x - 0.5 * out, 1e-7).max() < 1e-3
    noise.record(1, x - 0.5 * out, [out.sin()])
    assert noise.level(2, x - 0.4 * out.sin() + 0.3 * fresh, 1e-7).min() > 0.5
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(noise)}
    assert sum(kept.values()) < 2 * x.nbytes


def tensors_of(noise: FreshNoise) -> list[Tensor]:
    """Every tensor that it keeps alive, beside the level."""
    return [tensor for _, x, outputs in noise._given for tensor in (x, *outputs)]


def test_some_rows_leave_enough_of_a_sample_and_all_of_a_small_one():
    small = torch.zeros(2, 4, 64, 64)
    assert some_rows(small) is small
    assert some_rows(torch.zeros(2, 4096)).shape == (2, 4096)
    sizes = {
        (1, 4, 128, 128): (1, 4, 43, 128),
        (3, 16, 128, 128): (3, 16, 9, 128),
        (1, 16, 21, 90, 160): (1, 16, 21, 9, 160),
        (1, 4096, 64): (1, 274, 64),
        (1, 64, 2048): (1, 10, 2048),
    }
    assert {shape: tuple(some_rows(torch.zeros(shape)).shape) for shape in sizes} == sizes
