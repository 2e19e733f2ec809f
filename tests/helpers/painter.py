"""A k-diffusion subject that paints in colour in milliseconds: `stepcache.bench` and `compare` without a network."""

from __future__ import annotations

import torch
from torch import Tensor

from stepcache.bench import KDiffusion

SIZE = 24


def denoise(x: Tensor, sigma: Tensor, strength: float = 1.0) -> Tensor:
    """Pulls towards a pattern, the more the less noise is left; not linear in x, so that fewer steps differ."""
    ramp = torch.linspace(-0.8, 0.8, SIZE)
    pattern = torch.stack([ramp.expand(SIZE, SIZE), ramp[:, None].expand(SIZE, SIZE), ramp.expand(SIZE, SIZE).sin()])
    share = 1 / (1 + sigma.view(-1, 1, 1, 1) ** 2)
    return strength * (share * (x + 0.4 * torch.sin(3 * x)) + (1 - share) * pattern)


def schedule(steps: int) -> Tensor:
    return torch.cat([torch.linspace(10**0.5, 0.1**0.5, steps) ** 2, torch.zeros(1)])


def subject(strength: float = 1.0, channels: int = 3, **options: object) -> KDiffusion:
    extra = {"extra_args": lambda seeds: {"strength": strength}, "decode": lambda latents: latents.clamp(-1, 1)}
    return KDiffusion("painter", denoise, (channels, SIZE, SIZE), schedule, **{**extra, **options})
