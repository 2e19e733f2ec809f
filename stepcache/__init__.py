"""stepcache: answers some of a diffusion sampler's evaluations without running the model.

The core knows no host; adapters live in `stepcache.samplers`. See docs/design.md.
"""

from typing import Any

from .adaptive_order import AdaptiveOrder
from .compat import load_config, parse
from .criteria import Always, Criterion, Never, RelativeChange, Verdict, state
from .gates import Every, Gate, Hold, LastStep, MaxCached, MaxConsecutive, Run, SpectrumCadence, Tally, Warmup, Window
from .hicache import Hermite, HiCache
from .magcache import MagCache
from .masks import StepMask
from .memory import Evidence, Node
from .methods import METHODS, EasyCache, Forecast, Method, Off, Spectrum, Static, UCache, method
from .options import OptionError
from .parametrization import Parametrization
from .predictors import DMD, Chebyshev, FiniteDifference, Lagrange, Predictor, Reuse, TaylorSeer, Weighted
from .published import CacheDiT, DBCache, FBCache, TaylorSeerCache
from .report import Event, Report
from .session import Request, Session
from .timeline import Where

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
    "CacheDiT",
    "Chebyshev",
    "Criterion",
    "DBCache",
    "EasyCache",
    "Event",
    "Every",
    "Evidence",
    "FBCache",
    "FiniteDifference",
    "Forecast",
    "Gate",
    "Hermite",
    "HiCache",
    "Hold",
    "Lagrange",
    "LastStep",
    "MagCache",
    "MaxCached",
    "MaxConsecutive",
    "Method",
    "Never",
    "Node",
    "Off",
    "OptionError",
    "Parametrization",
    "Predictor",
    "RelativeChange",
    "Report",
    "Request",
    "Reuse",
    "Run",
    "Session",
    "Spectrum",
    "SpectrumCadence",
    "Static",
    "StepMask",
    "Tally",
    "TaylorSeer",
    "TaylorSeerCache",
    "UCache",
    "Verdict",
    "Warmup",
    "Weighted",
    "Where",
    "Window",
    "attach",
    "load_config",
    "method",
    "parse",
    "state",
]
