"""How strongly the output answers to the input: what UCache and EasyCache estimate with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..branch import Branch
from ..deferred import DeferredScalar


@dataclass
class OutputRate:
    """How strongly the network's output answers to its input, from the computed evaluations c inside the window.

    rate k   = mean |out_c - out_c'| / mean |x_c - x_c'|     (kept if either is 0 or not finite)
    norm     = mean |out_c|
    average  = 0.8 average + 0.2 mean |out_c - out_c'|        (begins with the first change)
    """

    rate: float | None = None
    norm: float = 0.0
    average: float | None = None
    _unread: list[tuple[DeferredScalar, DeferredScalar | None, DeferredScalar | None]] = field(default_factory=list)
    _begun: bool = False

    def update(self, branch: Branch) -> None:
        if self._begun:
            self._unread.append((branch.size, branch.output_change, branch.input_change))
        else:
            self._unread.append((branch.size, None, None))
        self._begun = True

    def expect(self, branch: Branch) -> float | None:
        """k mean |x - x_c|, the change of output expected since c; None if it is not known."""
        change = branch.input_change if self._begun else None
        self._read()
        if change is None or self.rate is None:
            return None
        moved = float(change)
        return self.rate * moved if moved > 0 and self.norm > 0 else None

    def _read(self) -> None:
        for size, output_change, input_change in self._unread:
            self.norm = float(size)
            if output_change is None or input_change is None:
                continue
            out, moved = float(output_change), float(input_change)
            if not (math.isfinite(out) and out > 0):
                continue
            self.average = out if self.average is None else 0.8 * self.average + 0.2 * out
            if moved > 0 and math.isfinite(moved):
                self.rate = out / moved
        self._unread.clear()
