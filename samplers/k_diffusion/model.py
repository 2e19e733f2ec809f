"""What a k-diffusion model says of itself: scalings, training table, lowest sigma; and a flow as such a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepcache.extend import unknown

from ..parametrization import SCALINGS, Scalings, eps_scalings
from .call import spread


class FlowDenoiser(nn.Module):
    """A rectified-flow network as a k-diffusion model, right under every sampler of k-diffusion.

    The network gives v(x_t, t) = noise - x0 at x_t = (1 - t) x0 + t noise. k-diffusion's samplers move x = x0 + sigma
    noise, which is x_t / (1 - t) at sigma = t / (1 - t), so

        denoised = x / (1 + sigma) - sigma / (1 + sigma) v(x / (1 + sigma), sigma / (1 + sigma))

    `shift` is the timestep shift of the training timetable (`t_to_sigma`); 3 in Stable Diffusion 3, 1 without.
    """

    def __init__(self, inner_model: Callable[..., Tensor], shift: float = 1.0) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.shift = shift

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma at timestep t in [0, 999]: 1,000 equal steps of flow time, then shifted."""
        t = (t.float() + 1) / 1000
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return t / (1 - t).clamp(min=1e-6)

    def get_sigmas(self, n: int, start: float = 0.99) -> Tensor:
        """n steps, equal in flow time from `start` before the shift, then shifted, then 0."""
        t = torch.linspace(1, 0, n + 1)[:-1] * start
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return torch.cat([t / (1 - t), t.new_zeros(1)])

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        c_skip, c_out, c_in = (spread(c, x) for c in self.get_scalings(sigma))
        return x * c_skip + c_out * self.inner_model(x * c_in, self.sigma_to_t(sigma), **extra)


def owner_of(model: Any, attribute: str) -> Any:
    """The model that has the attribute: this one, one inside it, or the only one among its modules; None without."""
    inside = model
    while inside is not None:
        if getattr(inside, attribute, None) is not None:
            return inside
        inside = getattr(inside, "inner_model", None)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    owners = [module for module in modules if getattr(module, attribute, None) is not None]
    return owners[0] if len(owners) == 1 else None


class ModelScalings:
    """The scalings of a model, or of the one inside it, by its own `get_scalings`; eps where none has that."""

    def __init__(self, model: Any) -> None:
        self.owner = owner_of(model, "get_scalings")

    def __call__(self, sigma: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if self.owner is None:
            return eps_scalings(sigma)
        found = self.owner.get_scalings(sigma)
        return found if len(found) == 3 else (None, *found)


class TrainingTable:
    """Share of the training timetable (0 = most noise) -> sigma, by the model's own `t_to_sigma`.

    Discrete schedules have timesteps 0 to T - 1, with T the length of their table `sigmas` (1,000 without one);
    continuous ones (VDenoiser) 0 to 1.
    """

    def __init__(self, model: Any) -> None:
        self.owner = owner_of(model, "t_to_sigma")

    @torch.no_grad()
    def __call__(self, share: float) -> float:
        table = getattr(self.owner, "sigmas", None)
        discrete = table is not None or hasattr(self.owner, "get_sigmas")
        last = (1000 if table is None else len(table)) - 1 if discrete else 1.0
        t = (1 - torch.tensor(share, dtype=torch.float32)) * last
        return float(self.owner.t_to_sigma(t if table is None else t.to(table.device)))


def scalings_of(model: Any, given: str | Scalings | None) -> Scalings:
    if given is None:
        return ModelScalings(model)
    if callable(given):
        return given
    if given not in SCALINGS:
        raise unknown("scalings", str(given), SCALINGS)
    return SCALINGS[given]


def lowest_sigma_of(model: Any) -> float:
    owner = owner_of(model, "sigma_min")
    return 0.0 if owner is None else float(owner.sigma_min)
