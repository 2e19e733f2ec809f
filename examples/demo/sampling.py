"""The demo's networks as k-diffusion models: noise schedule, guidance, and how their samples are marked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from stepcache.bench import METRICS, KDiffusion
from stepcache.extend import require
from stepcache.samplers.k_diffusion import FlowDenoiser

from . import networks

GUIDANCE = 3.0


class Guided(nn.Module):
    """Classifier-free guidance, both branches in one call: denoised = uncond + scale (cond - uncond).

    `null` is the label of uncond.
    """

    def __init__(self, inner_model: nn.Module, scale: float = GUIDANCE, null: int = networks.NO_CLASS) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.scale = scale
        self.null = null

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        labels = torch.cat([torch.full_like(label, self.null), label])
        uncond, cond = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), label=labels).chunk(2)
        return uncond + self.scale * (cond - uncond)


def subject(name: str, guidance: float = GUIDANCE) -> KDiffusion:
    """The shipped network "unet" (eps prediction, Stable Diffusion's betas) or "dit" (rectified flow), to be sampled.

    A seed is a start noise and the digit asked for, its last figure. Samples are in x = x0 + sigma noise, 16x16 pixels.
    """
    network = networks.load(name)
    if name == "dit":
        denoiser = FlowDenoiser(network)
    else:
        wrapper = require("k_diffusion.external", "k-diffusion").DiscreteEpsDDPMDenoiser
        denoiser = wrapper(network, networks.alphas_cumprod(), quantize=False)
    return KDiffusion(
        name if guidance == GUIDANCE else f"{name}, guidance {guidance:g}",
        denoiser,
        (1, networks.SIZE, networks.SIZE),
        partial(sigmas, denoiser),
        guided=partial(Guided, scale=guidance),
        extra_args=asked,
        cached={"branches": ("uncond", "cond")},
        metrics={**METRICS, "right": right},
    )


def sigmas(denoiser: Any, steps: int) -> Tensor:
    """The U-Net's Karras schedule between its training sigmas, or the flow's equal steps in time; then 0."""
    if isinstance(denoiser, FlowDenoiser):
        return denoiser.get_sigmas(steps)
    karras = require("k_diffusion.sampling", "k-diffusion").get_sigmas_karras
    return karras(steps, float(denoiser.sigma_min), float(denoiser.sigma_max))


def asked(seeds: Sequence[int]) -> dict[str, Tensor]:
    """The digits asked for, as the networks' extra argument."""
    return {"label": torch.tensor(seeds) % networks.CLASSES}


@torch.no_grad()
def right(images: Tensor, reference: Tensor, seeds: Sequence[int]) -> list[float]:
    """A metric: 1 where the classifier takes a sample for the digit it was asked to be, else 0."""
    taken = _classifier()(images.clamp(-1, 1)).argmax(1)
    return (taken == asked(seeds)["label"]).float().tolist()


@cache
def _classifier() -> nn.Module:
    return networks.load("classifier")
