"""The closed-form trajectories on which the golden traces were recorded, and k-diffusion models that follow them.

256 elements, i = 0..255; everything in float32, with transcendentals evaluated in float64 and rounded once:

    x(step)  = cos(0.37 i + 0.05 step) sigma + 0.3 sin(0.11 i)
    network  = 0.8 x_in / sqrt(1 + 0.25 s^2) + 0.2 sin(3 x_in + phi) + 0.25 sin(0.9 s + 0.05 i),   s = sigma
    phi      = 0 (cond), 0.7 (uncond), 1.9 (image-uncond), 0.35 (swapped cond)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

N = 256
PHI = {"cond": 0.0, "uncond": 0.7, "image": 1.9, "swapped": 0.35}


def x_open(step: int, sigma: float, n: int = N) -> Tensor:
    i = np.arange(n, dtype=np.float64)
    x = np.cos(0.37 * i + 0.05 * step) * sigma + 0.3 * np.sin(0.11 * i)
    return torch.from_numpy(x.astype(np.float32))[None]


def network(x_in: Tensor, sigma: float, branch: str) -> Tensor:
    x = x_in.double().numpy()
    i = np.arange(x.shape[-1], dtype=np.float64)
    out = 0.8 * x / math.sqrt(1 + 0.25 * sigma * sigma) + 0.2 * np.sin(3 * x + PHI[branch])
    return torch.from_numpy((out + 0.25 * np.sin(0.9 * sigma + 0.05 * i)).astype(np.float32))


def noise(k: int, n: int = N) -> Tensor:
    i = np.arange(n, dtype=np.float64)
    return torch.from_numpy((2**0.5 * np.sin(0.7 * i * (k + 1) + 1.3 * k + 0.2)).astype(np.float32))[None]


class Eps:
    """eps prediction under the Stable Diffusion sigmas: 1,000 timesteps, c_in = 1 / sqrt(sigma^2 + 1)."""

    scalings = "eps"

    def __init__(self) -> None:
        f32 = np.float32
        low, high = np.sqrt(f32(0.00085)), np.sqrt(f32(0.0120))
        beta = low + (high - low) * np.arange(1000, dtype=f32) / f32(999)
        product = np.multiply.accumulate((f32(1) - (beta.astype(np.float64) ** 2).astype(f32)).astype(f32), dtype=f32)
        self.sigmas = torch.from_numpy(np.sqrt((f32(1) - product) / product).astype(f32))

    def t_to_sigma(self, t: Tensor) -> Tensor:
        logs = self.sigmas.double().log().float()
        low, high, w = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - w) * logs[low] + w * logs[high]).double().exp().float()

    def get_sigmas(self, n: int) -> Tensor:
        return torch.cat([self.t_to_sigma(torch.linspace(999, 0, n)), torch.zeros(1)])

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma * sigma + 1).sqrt()


class Flow(Eps):
    """Rectified flow with sigma = t, shifted: x = (1 - sigma) x0 + sigma noise, c_in = 1."""

    scalings = "flow"
    sigmas = None

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def t_to_sigma(self, t: Tensor) -> Tensor:
        t = (t.float() + 1) / 1000
        return t if self.shift == 1 else self.shift * t / (1 + (self.shift - 1) * t)

    def get_sigmas(self, n: int) -> Tensor:
        t = torch.tensor([999.0]) if n == 1 else 999 - (999 / (n - 1)) * torch.arange(n)
        return torch.cat([self.t_to_sigma(t), torch.zeros(1)])

    def c_in(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class FluxFlow(Flow):
    """Rectified flow with an exponential shift mu."""

    def t_to_sigma(self, t: Tensor) -> Tensor:
        t = (t.float() + 1) / 1000
        e = math.exp(self.shift)
        return e / (e + (1 / t - 1))


MODELS = {
    "compvis": Eps,
    "flow1": Flow,
    "flow3": lambda: Flow(3.0),
    "flux1.15": lambda: FluxFlow(1.15),
}


def schedule(name: str, model: Eps) -> Tensor:
    if name in ("karras20", "karras10tail"):
        low, high = float(model.sigmas[0]) ** (1 / 7), float(model.sigmas[-1]) ** (1 / 7)
        ramp = torch.linspace(0, 1, 20, dtype=torch.float64)
        sigmas = torch.cat([((high + ramp * (low - high)) ** 7).float(), torch.zeros(1)])
        return sigmas if name == "karras20" else sigmas[10:]
    if name in ("flow50", "flow50tail"):
        sigmas = (1 - torch.arange(51, dtype=torch.float64) / 50).float()
        return sigmas if name == "flow50" else sigmas[25:]
    if name == "flow28s3":
        t = 1 - torch.arange(29, dtype=torch.float64) / 28
        return (3 * t / (1 + 2 * t)).float()
    return model.get_sigmas(int(name.removeprefix("disc")))


class Denoiser:
    """denoised = x + c_out network(c_in x): one branch a call, named by the keyword `branch`."""

    def __init__(self, model: Eps, calls: list[str]) -> None:
        self.model, self.calls = model, calls
        self.spoil = None  # the scenario's hook: changes a network output
        for name in ("sigmas", "t_to_sigma", "get_sigmas"):
            setattr(self, name, getattr(model, name))

    def __call__(self, x: Tensor, sigma: Tensor, branch: str) -> Tensor:
        self.calls.append(branch)
        out = network(x * self.model.c_in(sigma), float(sigma.max()), branch)
        if self.spoil is not None:
            self.spoil(out)
        return (x - sigma * out).to(x.dtype)
