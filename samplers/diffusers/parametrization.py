"""What a denoiser's input and output mean, by its scheduler; the noise levels of its training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepcache.extend import Parametrization


def coordinate(scheduler: Any) -> Callable[[float], float] | None:
    """The coordinate that predictors extrapolate in: t, which is sigma itself, for flow models; None for log sigma."""
    return float if _is_flow(scheduler) or not _has_sigma(scheduler) else None


def parametrization(scheduler: Any) -> Callable[[float], Parametrization] | None:
    """Sigma -> what the network predicts there; None if that is not known.

    The network's input is of unit scale, or a flow's interpolation.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from stepcache.samplers.diffusers import parametrization
        >>> scheduler = SimpleNamespace(sigmas=torch.tensor([1.0]), config={"prediction_type": "sample"})
        >>> parametrization(scheduler)(1.0).denoised
        (0.0, 1.0)
    """
    if _is_flow(scheduler):
        return lambda t: Parametrization((0.0, 1.0), (1.0, -t)) if t > 0 else Parametrization()
    if not _has_sigma(scheduler):
        return None
    config = getattr(scheduler, "config", {})
    data, kind = config.get("sigma_data"), config.get("prediction_type", "epsilon")
    if data is not None and hasattr(scheduler, "precondition_outputs"):
        sign = -1 if kind == "v_prediction" else 1
        return lambda s: Parametrization.of(
            s, data**2 / (s**2 + data**2), sign * s * data / math.hypot(s, data), 1 / math.hypot(s, data)
        )
    by_kind = {
        "epsilon": lambda s: Parametrization.of(s, 1.0, -s, 1 / math.hypot(s, 1)),
        "v_prediction": lambda s: Parametrization.of(s, 1 / (s * s + 1), -s / math.hypot(s, 1), 1 / math.hypot(s, 1)),
        "sample": lambda s: Parametrization.of(s, 0.0, 1.0, 1 / math.hypot(s, 1)),
    }
    return by_kind.get(kind)


def training_sigma(scheduler: Any) -> Callable[[float], float] | None:
    """Share of the training timetable (0 = most noise) -> sigma; None if the scheduler has no fixed one."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    config = getattr(scheduler, "config", {})
    steps = config.get("num_train_timesteps", 1000)
    flow = _is_flow(scheduler)
    if flow and config.get("use_dynamic_shifting"):
        return None
    if flow:
        shift = config.get("shift") or config.get("flow_shift") or 1.0

        def by_shift(share: float) -> float:
            t = ((1 - share) * (steps - 1) + 1) / steps
            return shift * t / (1 + (shift - 1) * t)

        return by_shift
    if not isinstance(alphas, Tensor):
        return None
    logs = ((1 - alphas.double()) / alphas.double().clamp(min=1e-8)).sqrt().log().cpu()

    def by_table(share: float) -> float:
        t = (1 - share) * (len(logs) - 1)
        return float(torch.lerp(logs[math.floor(t)], logs[math.ceil(t)], t % 1).exp())

    return by_table


def _has_sigma(scheduler: Any) -> bool:
    return any(isinstance(getattr(scheduler, name, None), Tensor) for name in ("sigmas", "alphas_cumprod"))


def _is_flow(scheduler: Any) -> bool:
    return "Flow" in type(scheduler).__name__ or bool(getattr(scheduler, "config", {}).get("use_flow_sigmas"))
