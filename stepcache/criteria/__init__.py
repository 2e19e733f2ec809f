"""Criteria: whether an evaluation that may be skipped is skipped. One file an idea; `base` says what a criterion is."""

from .always import Always, Never
from .base import INVALID_STATE, Criterion, state
from .easycache import EasyCacheRule
from .magcache import MagCacheRule, calibration
from .output_rate import OutputRate
from .relative_change import RelativeChange
from .ucache import UCacheRule

__all__ = [
    "INVALID_STATE",
    "Always",
    "Criterion",
    "EasyCacheRule",
    "MagCacheRule",
    "Never",
    "OutputRate",
    "RelativeChange",
    "UCacheRule",
    "calibration",
    "state",
]
