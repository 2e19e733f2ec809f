"""Names for the branches of guidance, in calls of their own or batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from stepcache import OptionError
from stepcache.extend import Caller, caller, same_sigma

from .arguments import alike


class InTurn:
    """Names branches that come in separate calls, in this order: `branches=InTurn("cond", "uncond")`.

    The last ones may be left out (guidance only on some steps): a call at another sigma is the first one's again. Not
    under samplers that evaluate twice at one sigma (Heun, DPM++ 2S): there give a function. Every thread and asyncio
    task has its turns. A call with another x is the first one's too: the evaluation before was broken off between its
    branches.
    """

    def __init__(self, *names: str) -> None:
        self.names = distinct(names)
        self._turns: WeakKeyDictionary[Caller, tuple[int, Tensor, ref[Tensor], torch.Size, Tensor | None]]
        self._turns = WeakKeyDictionary()
        self._anyone: Caller | None = None

    def fork(self) -> InTurn:
        """The same names for one run, with one turn for all threads and tasks that call in it."""
        other = InTurn(*self.names)
        other._anyone = Caller()
        return other

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> str:
        who = self._anyone or caller()
        turn, seen = 0, self._turns.pop(who, None)
        if seen is not None and same_sigma(seen[1], sigma):
            _, _, last, shape, few = seen
            if last() is x or shape != x.shape or alike(few, few_of(x)):
                turn = seen[0]  # else another evaluation: the last one has left a branch out
        if turn + 1 < len(self.names):
            self._turns[who] = turn + 1, sigma, ref(x), x.shape, few_of(x)
        return self.names[turn]

    def reset(self) -> None:
        self._turns.pop(self._anyone or caller(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_turns": WeakKeyDictionary()}


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
