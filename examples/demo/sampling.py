"""The demo's networks as k-diffusion models: noise schedule, guidance, and the cache in between."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepcache import Method, Report
from stepcache.extras import need
from stepcache.samplers.k_diffusion import CachedDenoiser, FlowDenoiser, sample

from . import networks

GUIDANCE = 3.0


class Guided(nn.Module):
    """Classifier-free guidance, both conditions in one call: denoised = uncond + scale (cond - uncond)."""

    def __init__(self, inner_model: nn.Module, scale: float = GUIDANCE) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.scale = scale

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        labels = torch.cat([torch.full_like(label, networks.NO_CLASS), label])
        uncond, cond = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), label=labels).chunk(2)
        return uncond + self.scale * (cond - uncond)


@dataclass(frozen=True)
class Setup:
    """A network ready for k-diffusion's samplers, in x = x0 + sigma noise."""

    name: str
    denoiser: nn.Module

    def sigmas(self, steps: int) -> Tensor:
        """The U-Net's Karras schedule between its training sigmas, or the flow's equal steps in time; then 0."""
        if isinstance(self.denoiser, FlowDenoiser):
            return self.denoiser.get_sigmas(steps)
        karras = need("k_diffusion.sampling", "k-diffusion").get_sigmas_karras
        return karras(steps, float(self.denoiser.sigma_min), float(self.denoiser.sigma_max))


def setup(name: str) -> Setup:
    """The shipped network "unet" (eps prediction, Stable Diffusion's betas) or "dit" (rectified flow)."""
    network = networks.load(name)
    if name == "dit":
        return Setup(name, FlowDenoiser(network))
    wrapper = need("k_diffusion.external", "k-diffusion").DiscreteEpsDDPMDenoiser
    return Setup(name, wrapper(network, networks.alphas_cumprod(), quantize=False))


@dataclass(frozen=True)
class Sampled:
    """One run: images (B, 1, 16, 16), seconds it took, and its report."""

    images: Tensor
    seconds: float
    report: Report


@torch.no_grad()
def run(
    setup: Setup, sampler: str, steps: int, method: Method | None, samples: int, seed: int, guidance: float = GUIDANCE
) -> Sampled:
    """Samples `samples` digits, the classes in turn, from the noise of `seed`; the cache sits inside the guidance."""
    label = torch.arange(samples) % networks.CLASSES
    sigmas = setup.sigmas(steps)
    noise = torch.randn(samples, 1, networks.SIZE, networks.SIZE, generator=torch.Generator().manual_seed(seed))
    cached = CachedDenoiser(setup.denoiser, method, conditions=("uncond", "cond"), guidance=guidance)
    torch.manual_seed(seed + 1)  # the ancestral sampler's noise
    begun = time.perf_counter()
    images = sample(
        sampler, Guided(cached, guidance), noise * sigmas[0], sigmas, extra_args={"label": label}, disable=True
    )
    return Sampled(images, time.perf_counter() - begun, cached.report)
