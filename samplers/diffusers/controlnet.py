"""A ControlNet's calls are put off until their result is looked at, which on a skipped step is never."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .frames import find_caller
from .patch import Abandon, HostPatch
from .runs import PipelineRuns


class ControlNetPatch(HostPatch):
    """Puts a ControlNet's work off until its result is looked at.

    If the denoiser is computed, that is at once, with the very same arguments; if it is skipped, never. What the
    answer looks like is known from the run's first call, which is not put off.
    """

    def __init__(self, name: str, module: nn.Module, runs: PipelineRuns, abandon: Abandon | None = None) -> None:
        super().__init__(name, module, abandon)
        self._runs = runs
        self._timesteps: Tensor | None = None
        self._leaves: list[Any] | None = None
        self._structure: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        if not self._runs.serves(find_caller(frame), frame):
            return self.original(args, kwargs)
        timesteps = self._runs.scheduler.timesteps
        if self._leaves is None or timesteps is not self._timesteps:
            self._timesteps = timesteps
            answer = self.original(args, kwargs)
            leaves, self._structure = tree_flatten(answer)
            self._leaves = [isinstance(leaf, Tensor) or leaf for leaf in leaves]
            return answer
        work = _Work(lambda: self.original(args, kwargs), self._structure)
        leaves = [_Deferred.of(work, k) if leaf is True else leaf for k, leaf in enumerate(self._leaves)]
        return tree_unflatten(leaves, self._structure)


class _Work:
    """A call that is made when the first of its results is wanted."""

    def __init__(self, call: Callable[[], Any], structure: Any) -> None:
        self._call, self._structure = call, structure
        self._results: list[Any] | None = None

    def result(self, k: int) -> Tensor:
        if self._results is None:
            self._results, structure = tree_flatten(self._call())
            if structure != self._structure:
                raise RuntimeError(
                    "the ControlNet's answer has another form than before in this run: attach with controlnet=False"
                )
        return self._results[k]


class _Deferred(Tensor):
    """One tensor of a `_Work`. Whatever is done with it is done with the result."""

    work: _Work
    k: int

    @classmethod
    def of(cls, work: _Work, k: int) -> _Deferred:
        deferred = Tensor._make_subclass(cls, torch.empty(0))
        deferred.work, deferred.k = work, k
        return deferred

    @classmethod
    def __torch_function__(
        cls, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        positional, named = computed((args, kwargs or {}))
        return func(*positional, **named)


def computed(value: Any) -> Any:
    """The value with everything in it that was put off."""
    return tree_map(lambda item: item.work.result(item.k) if isinstance(item, _Deferred) else item, value)
