"""Limits on how much is skipped: in a run, and in a row."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import number
from ..plan import ComputeReason
from ..run_info import RunInfo
from .base import Gate, GateCheck


@dataclass(frozen=True)
class MaxCached(Gate):
    """At most `limit` skipped evaluations in a run; -1 is no limit, 0 never skips.

    Example:
        >>> from stepcache.extend import MaxCached, Position, RunInfo, SkipCounts
        >>> MaxCached(3).begin(RunInfo())(Position(0, 9, 1.0), SkipCounts(skipped=3)).reason
        'max_cached'
    """

    limit: int

    def __post_init__(self) -> None:
        number("max_cached", self.limit, low=-1, whole=True)

    def begin(self, run: RunInfo) -> GateCheck:
        reason = ComputeReason("max_cached")
        return lambda position, counts: reason if 0 <= self.limit <= counts.skipped else None


@dataclass(frozen=True)
class MaxConsecutive(Gate):
    """At most `limit` skipped evaluations in a row, then one is computed; -1 is no limit, 0 never skips.

    Example:
        >>> from stepcache.extend import MaxConsecutive, Position, RunInfo, SkipCounts
        >>> MaxConsecutive(2).begin(RunInfo())(Position(0, 9, 1.0), SkipCounts(consecutive=2)).reason
        'max_consecutive'
    """

    limit: int

    def __post_init__(self) -> None:
        number("max_consecutive", self.limit, low=-1, whole=True)

    def begin(self, run: RunInfo) -> GateCheck:
        reason = ComputeReason("max_consecutive")
        return lambda position, counts: reason if 0 <= self.limit <= counts.consecutive else None
