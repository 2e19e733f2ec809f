"""The demo's networks as a diffusers pipeline, with any scheduler that fits their prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepcache import bench
from stepcache.extend import require

from . import networks
from .sampling import GUIDANCE, asked, subject

diffusers: Any = require("diffusers", "demo")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, dict[str, Callable[[], Any]]] = {
    "unet": {
        "DDIM": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "Euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
        "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
        "UniPC": lambda: diffusers.UniPCMultistepScheduler(**BETAS, use_karras_sigmas=True),
    },
    "dit": {"flow-match Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)},
}
"""Schedulers by network and name."""


class DigitsPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]  # to a type checker it is Any
    """Draws digits: `pipe(labels)`, with classifier-free guidance batched in one call, uncond first."""

    def __init__(self, denoiser: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @property
    def num_timesteps(self) -> int:
        return len(self.scheduler.timesteps)

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float = GUIDANCE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> Tensor:
        """Images (B, 1, 16, 16) in about [-1, 1] of the digits `labels` (B,)."""
        self.scheduler.set_timesteps(num_inference_steps)
        randn_tensor = diffusers.utils.torch_utils.randn_tensor
        x = randn_tensor((len(labels), 1, networks.SIZE, networks.SIZE), generator=generator)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        both = torch.cat([torch.full_like(labels, networks.NO_CLASS), labels])
        scale = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
        flow = isinstance(self.denoiser, networks.DiT)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            x_in = scale(torch.cat([x, x]), t)
            time = (t / 1000 if flow else t).expand(len(x_in))
            uncond, cond = self.denoiser(x_in, time, both).chunk(2)
            x = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, x, return_dict=False)[0]
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, t, {}).pop("latents", x)
        return x


def measured(name: str) -> bench.Pipeline:
    """The shipped network `name` as a subject of `stepcache bench`, its schedulers for samplers."""

    def call(pipe: DigitsPipeline, steps: int, seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(asked(seeds)["label"], num_inference_steps=steps, generator=generators)

    pipe = pipeline(name, next(iter(SCHEDULERS[name])))
    return bench.Pipeline(f"{name}, diffusers", pipe, SCHEDULERS[name], call, metrics=subject(name).metrics)


def pipeline(name: str, scheduler: str) -> DigitsPipeline:
    """The shipped network `name` ("unet", "dit") under one of its `SCHEDULERS`."""
    pipe = DigitsPipeline(networks.load(name), SCHEDULERS[name][scheduler]())
    pipe.set_progress_bar_config(disable=True)
    return pipe
