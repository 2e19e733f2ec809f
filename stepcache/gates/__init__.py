"""Gates: which evaluations may be skipped. One file an idea; `base` says what a gate is."""

from .base import Gate, GateCheck, as_gates
from .interval import Interval
from .last_step import LastStep
from .limits import MaxCached, MaxConsecutive
from .mask import Mask
from .second_of_two import SecondOfTwo
from .short_run import ShortRun
from .spectrum import SpectrumCadence
from .warmup import Warmup
from .window import Window, WindowUnit

__all__ = [
    "Gate",
    "GateCheck",
    "Interval",
    "LastStep",
    "Mask",
    "MaxCached",
    "MaxConsecutive",
    "SecondOfTwo",
    "ShortRun",
    "SpectrumCadence",
    "Warmup",
    "Window",
    "WindowUnit",
    "as_gates",
]
