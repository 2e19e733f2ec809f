"""The schedule of a run, from the host's sampler function and the keywords it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stepcache import OptionError

from ..k_diffusion import EVALUATIONS

SigmaAt = Callable[[Tensor], Tensor]
"""Training timesteps -> sigmas."""


@dataclass(frozen=True)
class RunSchedule:
    """What is known of a run before it begins.

    Attributes:
        sigmas: the noise levels, sigmas[0..n]. None: not known.
        stages: evaluations per step. None: not known.
        on_schedule: every evaluation is at a sigma of the schedule. None: if `stages` is 1.
        callback_counts: the sampler's callback passes the number of the step just begun.
        locate: number of an evaluation -> (step, stage). None: not known.

    `sigmas`, `stages` and `on_schedule` are those of `Engine.begin`.
    """

    sigmas: Tensor | None = None
    stages: int | None = None
    on_schedule: bool | None = None
    callback_counts: bool = False
    locate: Callable[[int], tuple[int, int]] | None = None

    @classmethod
    def of(cls, func: Callable[..., Tensor], keywords: dict[str, Any], sigma_at: SigmaAt) -> RunSchedule:
        """The schedule of a run of `func`. Raises OptionError if the sampler cannot be cached."""
        name = getattr(func, "__name__", "")
        if name == "sample_dpm_adaptive":
            raise OptionError(
                "DPM adaptive chooses its steps from the model's answers, and takes more of them if some are predicted"
            )
        if "timesteps" in keywords:
            return cls._of_timesteps(name, keywords, sigma_at)
        sigmas = keywords.get("sigmas", keywords.get("sigma_sched"))
        stages = EVALUATIONS.get(name)
        on_schedule = (stages == 1 or name == "sample_heun") and not keywords.get("s_churn")
        return cls(sigmas, stages, on_schedule, callback_counts=True)

    @classmethod
    def _of_timesteps(cls, name: str, keywords: dict[str, Any], sigma_at: SigmaAt) -> RunSchedule:
        """DDIM, PLMS and UniPC get ascending timesteps: n of them make n - 1 steps.

        UniPC reads only how many there are and the last one, and makes n steps of its own.
        """
        timesteps = keywords["timesteps"]
        if name == "unipc":
            times = unipc_times(keywords.get("is_img2img", False), timesteps)
            sigmas = None if times is None else sigma_at(times)
            return cls(sigmas, 1, locate=lambda k: (k, 0))
        sigmas = sigma_at(timesteps.flip(0))
        if name == "plms":  # evaluates its first step twice
            return cls(sigmas, locate=lambda k: (max(k - 1, 0), int(k == 1)))
        return cls(sigmas, 1, locate=(lambda k: (k, 0)) if name.startswith("ddim") else None)

    def place(self, evaluation: int) -> tuple[float, int, int] | None:
        """(sigma, step, stage) of an evaluation; None if it is not known, or beyond the schedule."""
        if self.locate is None or self.sigmas is None:
            return None
        step, stage = self.locate(evaluation)
        return (self._sigmas[step + stage], step, stage) if step + stage < len(self._sigmas) else None

    @cached_property
    def _sigmas(self) -> list[float]:
        return [] if self.sigmas is None else self.sigmas.float().tolist()


def unipc_times(image_to_image: bool, timesteps: Tensor) -> Tensor | None:
    """The timesteps of the hosts' UniPC, first to last; None for its spacing by logSNR.

    It evaluates at all of them but the last, at which its last step ends.
    """
    from modules import shared

    first = float(timesteps[-1]) / 1000 + 1 / 1000 if image_to_image else 1.0
    powers = {"time_uniform": 1, "time_quadratic": 2}
    power = powers.get(getattr(shared.opts, "uni_pc_skip_type", "time_uniform"))
    if power is None:
        return None
    times = torch.linspace(first ** (1 / power), (1 / 1000) ** (1 / power), len(timesteps) + 1) ** power
    return (times - 1 / 1000) * 1000
