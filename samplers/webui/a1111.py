"""AUTOMATIC1111's web UI."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepcache.extend import Parametrization

from ..batching import cut_rows
from ..k_diffusion import ModelScalings, TrainingTable
from ..parametrization import denoised_scalings, flow_scalings
from .patch import HostPatch


class A1111Patch(HostPatch):
    """Replaces `forward` of the denoiser's inner model, in an object that exists as long as the sampler.

    The host calls it with (x, sigma, cond=...). DDIM, PLMS and UniPC pass timesteps instead of sigma, and their inner
    model returns eps. The rows are the prompts of every image, then the negative prompts; they have no labels.
    """

    def install(self) -> None:
        inner = self._denoiser.inner_model
        own = vars(inner)
        previous, replaced = inner.forward, own.get("forward")
        if getattr(replaced, "stepcache_patch", None) is self:
            return

        def forward(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            def cut(kept: slice) -> Callable[[], Tensor]:
                return functools.partial(previous, x[kept], sigma[kept], **cut_rows(extra, len(x), kept))

            compute = functools.partial(previous, x, sigma, **extra)
            if not self.active:
                return compute()
            level = self.sigma_at(sigma) if self._in_timesteps else sigma
            return self.answer(self._names(len(x)), x, level, (id(inner),), compute, cut)

        def undo() -> None:
            if own.get("forward") is not forward:
                return
            if replaced is None:
                del own["forward"]
            else:
                own["forward"] = replaced

        forward.__dict__["stepcache_patch"] = self
        inner.forward = forward
        self._undo.append(undo)

    def _names(self, rows: int) -> tuple[str, ...] | None:
        """A name for as many rows as there are images: cond, cond 2, ..., then uncond.

        With AND such a slice need not be one prompt of every image, but it is the same in every evaluation, and the
        host splits its calls along slices. None for rows beyond the evaluation's own, and if the images have different
        numbers of prompts, so that there are no such slices.
        """
        evaluation = self.evaluation
        images, prompts = len(evaluation.prompts), sum(evaluation.prompts)
        first = self._seen["rows"]
        self._seen["rows"] += rows
        if rows % images or prompts % images or first + rows > evaluation.rows:
            return None
        names = []
        for group in range(first // images, (first + rows) // images):
            kind, place = ("cond", group) if group < prompts // images else ("uncond", group - prompts // images)
            names.append(kind if place == 0 else f"{kind} {place + 1}")
        return tuple(names)

    def unpaired(self) -> str | None:
        """The slices are for the same images only if there is one image, or one prompt per image."""
        prompts = self.evaluation.prompts
        if len(prompts) == 1 or max(prompts) == 1:
            return None
        return "with prompts joined by AND in a batch of several images, every branch is computed"

    @property
    def _in_timesteps(self) -> bool:
        return not hasattr(self._denoiser.inner_model, "sigma_to_t")

    def scalings(self, sigma: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        inner = self._denoiser.inner_model
        if self._in_timesteps:
            return v_as_eps_scalings(sigma) if hasattr(inner, "predict_eps_from_z_and_v") else denoised_scalings(sigma)
        if not hasattr(inner, "get_scalings") and float(inner.sigma_max) <= 1:
            return flow_scalings(sigma)  # Stable Diffusion 3: its sigmas are times from 0 to 1
        return ModelScalings(inner)(sigma)

    def sigma_at(self, timesteps: Tensor) -> Tensor:
        """Between two training timesteps log sigma is interpolated, as in k-diffusion."""
        table = self._sigma_table.log()
        at = timesteps.to(table.device, torch.float32).clamp(0, len(table) - 1)
        low = at.floor().long()
        high, weight = (low + 1).clamp(max=len(table) - 1), at - low
        return ((1 - weight) * table[low] + weight * table[high]).exp()

    def training_sigma(self) -> Callable[[float], float] | None:
        if not self._in_timesteps:
            return TrainingTable(self._denoiser.inner_model)
        last = len(self._sigma_table) - 1
        return lambda share: float(self.sigma_at(torch.tensor((1 - share) * last)))

    def parametrization(self, sigma: float) -> Parametrization:
        """With timesteps x is sqrt(a) x0 + sqrt(1 - a) noise and the answer eps: denoised = x / sqrt(a) - sigma eps."""
        if not self._in_timesteps:
            return super().parametrization(sigma)
        c_skip, c_out, _ = self._floats.factors(sigma)
        return Parametrization((c_skip, c_out), (math.hypot(sigma, 1) - sigma * c_skip, -sigma * c_out))


def v_as_eps_scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A network that predicts v but is asked for eps, at x = sqrt(a) x0 + sqrt(1 - a) noise, a = 1 / (sigma^2 + 1):

    eps = sqrt(1 - a) x + sqrt(a) v(x)
    """
    root = (sigma * sigma + 1).rsqrt()
    return sigma * root, root, torch.ones_like(sigma)
