"""stepcache: answers some of a diffusion sampler's evaluations without running the model.

The core knows no host; adapters live in `stepcache.samplers`. See docs/design.md.
"""

from typing import Any

from .adaptive_order import AdaptiveOrder
from .branch import Branch, CacheEntry
from .clock import Position
from .compat import load_config, parse
from .criteria import Always, Criterion, Never, RelativeChange, Verdict, state
from .engine import Call, Engine
from .gates import (
    ComputeReason,
    Gate,
    Interval,
    LastStep,
    MaxCached,
    MaxConsecutive,
    RunInfo,
    SkipCounts,
    SpectrumCadence,
    Warmup,
    Window,
)
from .hicache import Hermite, HiCache
from .magcache import MagCache
from .masks import StepMask
from .methods import METHODS, EasyCache, Forecast, Method, Off, Spectrum, Static, UCache, method
from .options import OptionError
from .parametrization import Parametrization
from .predictors import DMD, Chebyshev, FiniteDifference, Lagrange, LinearPredictor, Predictor, Reuse, TaylorSeer
from .published import CacheDiT, DBCache, FBCache, TaylorSeerCache
from .report import Event, Report

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`stepcache.attach`: the cache around a pipeline; its adapter is imported when first asked for."""
    if name == "attach":
        from .samplers.diffusers import attach

        return attach
    raise AttributeError(f"module 'stepcache' has no attribute {name!r}")


__all__ = [
    "DMD",
    "METHODS",
    "AdaptiveOrder",
    "Always",
    "Branch",
    "CacheDiT",
    "CacheEntry",
    "Call",
    "Chebyshev",
    "ComputeReason",
    "Criterion",
    "DBCache",
    "EasyCache",
    "Engine",
    "Event",
    "FBCache",
    "FiniteDifference",
    "Forecast",
    "Gate",
    "Hermite",
    "HiCache",
    "Interval",
    "Lagrange",
    "LastStep",
    "LinearPredictor",
    "MagCache",
    "MaxCached",
    "MaxConsecutive",
    "Method",
    "Never",
    "Off",
    "OptionError",
    "Parametrization",
    "Position",
    "Predictor",
    "RelativeChange",
    "Report",
    "Reuse",
    "RunInfo",
    "SkipCounts",
    "Spectrum",
    "SpectrumCadence",
    "Static",
    "StepMask",
    "TaylorSeer",
    "TaylorSeerCache",
    "UCache",
    "Verdict",
    "Warmup",
    "Window",
    "attach",
    "load_config",
    "method",
    "parse",
    "state",
]
