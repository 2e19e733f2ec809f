"""Sigma, step and stage of every evaluation of a run, from its scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Place = tuple[float, int, int]
"""(sigma, step, stage) of one evaluation."""


def places(scheduler: Any, first: int = 0) -> list[Place]:
    """(sigma, step, stage) of every evaluation of a run that begins at its `first` (image to image), from a scheduler
    that has just been set. Sigmas are rounded to float32, steps before the first are negative.

    Sigma is the scheduler's own, or sqrt((1 - a) / a) with a its alphas_cumprod, or the timestep if it has neither.
    Schedulers of order 2 (Heun, KDPM2, KDPM2A, DPMSolverSDE, FlowMatchHeun) evaluate twice a step, once in the last;
    PNDM twice in its first step, or four times in each of its first three (PRK).
    """
    levels = torch.tensor(_levels(scheduler), dtype=torch.float32).tolist()
    prk_timesteps = getattr(scheduler, "prk_timesteps", None)
    prk = 0 if prk_timesteps is None else len(prk_timesteps)
    twice_first = hasattr(scheduler, "plms_timesteps") and not prk

    def step_and_stage(k: int) -> tuple[int, int]:
        if getattr(scheduler, "order", 1) == 2:
            return divmod(k, 2)
        if k < prk:
            return divmod(k, 4)
        if twice_first:
            return (0, k) if k < 2 else (k - 1, 0)
        return prk // 4 + k - prk, 0

    return [(levels[k], *step_and_stage(k - first)) for k in range(len(levels))]


def _levels(scheduler: Any) -> list[float]:
    """The noise level of every timestep."""
    timesteps = scheduler.timesteps.tolist()
    sigmas, halfway = getattr(scheduler, "sigmas", None), getattr(scheduler, "sigmas_interpol", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(sigmas, Tensor) and len(sigmas) >= len(timesteps):
        levels = sigmas.tolist()[: len(timesteps)]
        if isinstance(halfway, Tensor):  # KDPM2A keeps the middle of a step at the step's begin, KDPM2 at its end
            back = 1 if hasattr(scheduler, "sigmas_down") else 0
            levels = [halfway[k - back].item() if k % 2 else level for k, level in enumerate(levels)]
        return levels
    if isinstance(alphas, Tensor):
        kept = alphas.double().clamp(min=1e-8)
        return [float(((1 - kept[int(t)]) / kept[int(t)]) ** 0.5) for t in timesteps]
    return [float(t) for t in timesteps]
