"""A subject whose denoiser is known in closed form: two Gaussians, with and without guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepcache.bench import KDiffusion
from stepcache.bench.metrics import psnr_of_range

SHAPE = (1, 6, 6)


class Mixture(nn.Module):
    """The posterior mean of two Gaussians of std 0.3 at -1 and at a pattern; `label` shifts the pattern."""

    def __init__(self) -> None:
        super().__init__()
        pattern = torch.linspace(-1, 1, 36).reshape(SHAPE)
        self.means = nn.Parameter(torch.stack([pattern, -pattern.flip(-1)]), requires_grad=False)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        variance = (0.3**2 + sigma**2)[:, None, None, None]
        means = self.means if label is None else self.means + 0.2 * label.float()[:, None, None, None, None]
        off = x[:, None] - means
        share = torch.softmax(-off.square().flatten(2).sum(2) / (2 * variance[:, :, 0, 0]), 1)
        return (share[:, :, None, None, None] * (means + off * (0.3**2 / variance)[:, None])).sum(1)


class Guided(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner_model = inner

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        label = torch.cat([torch.zeros(len(x)), torch.ones(len(x))])
        uncond, cond = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), label=label).chunk(2)
        return uncond + 4 * (cond - uncond)


def sigmas(steps: int) -> Tensor:
    return torch.cat([torch.logspace(1, -1, steps), torch.zeros(1)])


def mixture(guided: bool = False, model: nn.Module | None = None) -> KDiffusion:
    """Sampled from sigma 10 down to 0.1."""
    return KDiffusion(
        "mixture",
        model or Mixture(),
        SHAPE,
        sigmas,
        guided=Guided if guided else None,
        cached={"branches": ("uncond", "cond")} if guided else {},
        metrics={"PSNR": psnr_of_range},
        limit=None,
    )
