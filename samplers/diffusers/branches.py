"""The branches of guidance in a denoiser's calls, and their names."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .guidance import Guidance


class BranchNames:
    """Names the branches of each call of a run.

    Batched guidance repeats the latents; separate calls are named by the pipeline's `cache_context`, or else by their
    order. If guidance ends within the run and the batch falls to one branch's rows, that branch is cond.

    Args:
        guidance: what the user has said.
        perturbed: whether the pipeline is using perturbed attention guidance.
    """

    def __init__(self, guidance: Guidance, perturbed: Callable[[], bool]) -> None:
        self._guidance, self._perturbed = guidance, perturbed
        self._known: dict[str, tuple[tuple[str, ...], int]] = {}

    def forget(self) -> None:
        """Another run, or the latents have only now been told from the rest of the input."""
        self._known.clear()

    def of(self, latents: Tensor, context: str, turn: int) -> tuple[str, ...]:
        """The branches of one call, which is the `turn`-th of its context in this evaluation."""
        if context not in self._known:
            split = self._guidance.enable_separate_cfg is not True
            chunks = next((n for n in (2, 3) if split and _repeats(latents, n)), 1)
            self._known[context] = self._labels(context, chunks), latents.shape[0] // chunks
        names, rows = self._known[context]
        if latents.shape[0] != rows * len(names):
            names = ("cond",) if latents.shape[0] == rows else ("call",)
        first = self._guidance.cfg_compute_first
        if names == ("call",) and first is not None and turn < 2:
            return ("uncond" if turn == (not first) else "cond",)
        return names if turn == 0 else tuple(f"{name} {turn + 1}" for name in names)

    def _labels(self, context: str, chunks: int) -> tuple[str, ...]:
        """Batched branches in diffusers' order: uncond and cond; with perturbed attention; InstructPix2Pix' three."""
        if chunks == 1:
            return (context or "call",)
        labels: tuple[str, ...]
        if not self._perturbed():
            labels = ("uncond", "cond") if chunks == 2 else ("cond", "image", "uncond")
        else:
            labels = ("uncond", "cond", "perturbed")[3 - chunks :]
        taken = {name for names, _ in self._known.values() for name in names}
        return tuple(f"{label} of {context}" if label in taken else label for label in labels)


class ContextName:
    """Wraps a denoiser's `cache_context` and reads the name it is given. A copy of the denoiser has its own again."""

    def __init__(self, module: nn.Module) -> None:
        self.name = ""
        self._module, self._original = module, getattr(module, "cache_context", None)

    def install(self) -> None:
        if self._original is not None:
            self._module.__dict__["cache_context"] = self

    def remove(self) -> None:
        if self._module.__dict__.get("cache_context") is self:
            del self._module.__dict__["cache_context"]

    @contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        before, self.name = self.name, name
        try:
            with nullcontext() if self._original is None else self._original(name, *args, **kwargs):
                yield
        finally:
            self.name = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        kind: Any = type(self._module)
        return types.MethodType(kind.cache_context, memo[id(self._module)])


def _repeats(x: Tensor, n: int) -> bool:
    """Whether a batch is one batch n times over, as batched guidance makes it."""
    if x.shape[0] % n:
        return False
    first, *others = x.chunk(n)
    return all(torch.equal(first, other) for other in others)
