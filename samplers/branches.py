"""Names for the branches of guidance, in calls of their own or batched."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from stepcache import OptionError
from stepcache.extend import same_sigma

from .arguments import alike


class InTurn:
    """Names branches that come in separate calls, in this order: `branches=InTurn("cond", "uncond")`.

    The last ones may be left out (guidance only on some steps): a call at another sigma is the first one's again. Not
    under samplers that evaluate twice at one sigma (Heun, DPM++ 2S): there give a function. Every thread has its turns.
    A call with another x is the first one's too: the evaluation before was broken off between its branches.
    """

    def __init__(self, *names: str) -> None:
        self.names = distinct(names)
        self._turns: dict[int, tuple[int, Tensor, ref[Tensor], torch.Size, Tensor | None]] = {}

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> str:
        turn, seen = 0, self._turns.pop(threading.get_ident(), None)
        if seen is not None and same_sigma(seen[1], sigma):
            _, _, last, shape, few = seen
            if last() is x or shape != x.shape or alike(few, few_of(x)):
                turn = seen[0]  # else another evaluation: the last one has left a branch out
        if turn + 1 < len(self.names):
            self._turns[threading.get_ident()] = turn + 1, sigma, ref(x), x.shape, few_of(x)
        return self.names[turn]

    def reset(self) -> None:
        self._turns.pop(threading.get_ident(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "_turns": {}}


def distinct(names: str | Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    if len(set(names)) != len(names) or not names:
        raise OptionError(f"branches {names!r}: give one or more different names")
    return names


def few_of(x: Tensor) -> Tensor | None:
    """64 numbers of x or so, by which it is known again; None if it has none that can be read."""
    if x.device.type == "meta" or not x.numel():
        return None
    return x.detach().reshape(-1)[:: max(1, x.numel() // 64)].clone()
