"""What a gate is: it says which evaluations may be skipped. It knows positions and counts, never tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..clock import Position
from ..options import OptionError
from ..plan import ComputeReason
from ..run_info import RunInfo, SkipCounts

UNKNOWN_SCHEDULE = "this run's schedule is not known (pass sigmas=, or use sample())"


GateCheck = Callable[[Position, SkipCounts], ComputeReason | None]


class Gate(ABC):
    """One reason to compute, whatever the criterion would say.

    Attributes:
        beside_static: whether it holds beside a static mask. False for gates that choose evaluations one by one: a
            static mask has chosen all of them.
    """

    beside_static: ClassVar[bool] = True

    @property
    def timetable(self) -> str | None:
        """If it chooses evaluations one by one: why the others are skipped, as the report says it."""
        return None

    @abstractmethod
    def begin(self, run: RunInfo) -> GateCheck:
        """The answer for one run: a function of the position and the counts."""


def as_gates(given: Any) -> tuple[Gate, ...]:
    """Gates given as an option. OptionError if that is not a tuple or a list of them."""
    if not isinstance(given, (tuple, list)) or not all(isinstance(gate, Gate) for gate in given):
        raise OptionError(f"gates={given!r}: accepted are objects of classes made from Gate, in a tuple or a list")
    return tuple(given)


def share_of(share: float, count: int) -> int:
    """floor(share count), the product in float32 as published."""
    return int(torch.tensor(share, dtype=torch.float32) * count)
