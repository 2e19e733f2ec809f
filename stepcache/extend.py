"""The names for authors of methods and of hosts; users need `stepcache` alone.

A method from a paper is a function that returns a `Method` (gate, criterion, predictor), decorated with `register`. A
host writes a `Call` and passes it to an `Engine`.
"""

from ._optional import require
from .branch import Branch, CacheEntry, History
from .call import Call
from .caller import Caller, caller
from .clock import Clock, Position, near, same_sigma
from .criteria import (
    INVALID_STATE,
    Always,
    Criterion,
    EasyCacheRule,
    MagCacheRule,
    Never,
    OutputRate,
    RelativeChange,
    UCacheRule,
    calibration,
    state,
)
from .deferred import DeferredScalar, DeferredScalars, mean_abs, mean_abs_difference, some_rows, wide, widened
from .engine import Engine
from .event import Event
from .gates import (
    Gate,
    GateCheck,
    Interval,
    LastStep,
    Mask,
    MaxCached,
    MaxConsecutive,
    SecondOfTwo,
    ShortRun,
    SpectrumCadence,
    Warmup,
    Window,
    as_gates,
)
from .masks import PRESETS, StepMask
from .methods import METHODS, CommonOptions, Method, accepted_options, main_number, method, register
from .methods.registry import GUIDANCE_OPTIONS
from .noise import FreshNoise
from .options import OptionError, flag, number, unknown
from .parametrization import Parametrization
from .plan import ComputeReason, Plan, Verdict
from .predictors import (
    DMD,
    AdaptiveOrder,
    Chebyshev,
    FiniteDifference,
    FixedOrder,
    Hermite,
    Lagrange,
    LinearPredictor,
    Predictor,
    Reuse,
    TaylorSeer,
)
from .probe import Blocks
from .profile import Prediction, Profile
from .ranks import Ranks, groups_of, groups_of_mesh
from .report import Report
from .run_info import RunInfo, SkipCounts
from .settings import Settings

__all__ = [
    "DMD",
    "GUIDANCE_OPTIONS",
    "INVALID_STATE",
    "METHODS",
    "PRESETS",
    "AdaptiveOrder",
    "Always",
    "Blocks",
    "Branch",
    "CacheEntry",
    "Call",
    "Caller",
    "Chebyshev",
    "Clock",
    "CommonOptions",
    "ComputeReason",
    "Criterion",
    "DeferredScalar",
    "DeferredScalars",
    "EasyCacheRule",
    "Engine",
    "Event",
    "FiniteDifference",
    "FixedOrder",
    "FreshNoise",
    "Gate",
    "GateCheck",
    "Hermite",
    "History",
    "Interval",
    "Lagrange",
    "LastStep",
    "LinearPredictor",
    "MagCacheRule",
    "Mask",
    "MaxCached",
    "MaxConsecutive",
    "Method",
    "Never",
    "OptionError",
    "OutputRate",
    "Parametrization",
    "Plan",
    "Position",
    "Prediction",
    "Predictor",
    "Profile",
    "Ranks",
    "RelativeChange",
    "Report",
    "Reuse",
    "RunInfo",
    "SecondOfTwo",
    "Settings",
    "ShortRun",
    "SkipCounts",
    "SpectrumCadence",
    "StepMask",
    "TaylorSeer",
    "UCacheRule",
    "Verdict",
    "Warmup",
    "Window",
    "accepted_options",
    "as_gates",
    "calibration",
    "caller",
    "flag",
    "groups_of",
    "groups_of_mesh",
    "main_number",
    "mean_abs",
    "mean_abs_difference",
    "method",
    "near",
    "number",
    "register",
    "require",
    "same_sigma",
    "some_rows",
    "state",
    "unknown",
    "wide",
    "widened",
]
