"""Of steps with two evaluations, only the second takes part."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import ComputeReason
from ..run_info import RunInfo
from .base import Gate, GateCheck


@dataclass(frozen=True)
class SecondOfTwo(Gate):
    """Holds, unrecorded, the first evaluation of every two-evaluation step: Heun, DPM2, DPM++ 2S, DPM++ SDE.

    The published rule of stable-diffusion.cpp: only the second evaluation of such a step reads or writes the cache, and
    the single evaluation of the last one does neither. It needs `stages` to be known (`sample()` knows it); without, it
    lets everything through and the report says so.
    """

    def begin(self, run: RunInfo) -> GateCheck:
        if run.stages is None:
            run.warnings.append(
                "evaluations='second' cannot act: how many evaluations a step has is not known (use sample(), or pass "
                "stages=)"
            )
        reason = ComputeReason("first of two", observe=False, record=False)
        return lambda position, counts: reason if run.stages == 2 and position.stage == 0 else None
