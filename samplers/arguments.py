"""Whether the arguments of a model have changed within a run: the prompt, the class, a control image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor


class _Seen:
    """The last tensor that was passed as an argument: which object, and a mark of its content."""

    def __init__(self) -> None:
        self.object: ref[Tensor] | None = None
        self.version: int | None = None
        self.mark: Tensor | None = None
        self.steady = False
        self.renewed = 0

    def changed(self, tensor: Tensor) -> bool:
        """Whether the content is another one than that of two calls or more before."""
        version = None if tensor.is_inference() else tensor._version
        if self.object is not None and self.object() is tensor and version == self.version:
            self.steady = True
            return False
        if self.renewed > 1 and tensor.device.type != "cpu":
            return False  # a new tensor in every call: to compare each would make the host wait for the device
        before, self.mark = self.mark, _mark(tensor)
        self.object, self.version = ref(tensor), version
        if before is not None and alike(before, self.mark):
            self.steady, self.renewed = True, self.renewed + 1
            return False
        was_steady, self.steady = self.steady, False
        return was_steady


class ArgumentChanges:
    """Counts how often the arguments of the model changed in mid-run: the prompt, the class, a control image.

    An argument, a tensor or a text, has changed if it had been the same in two calls or more in a row and is not any
    longer. So what is another one in every step, as a counter or a mask with noise in it, costs no cache; nor does a
    host that makes new tensors with equal content at every call. Of those on an accelerator, only the first two are
    compared.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], Any] = {}
        self._count: dict[tuple[str, ...], int] = {}

    def __call__(self, names: tuple[str, ...], extra: dict[str, Any]) -> int:
        """The number of changes so far in the calls for these branches."""
        if not extra:
            return 0
        count = self._count.get(names, 0)
        self._count[names] = count + sum([self._changed((names, *path), value) for path, value in _leaves((), extra)])
        return self._count[names]

    def _changed(self, path: tuple[Any, ...], value: Any) -> bool:
        if isinstance(value, Tensor):
            seen = self._seen.get(path)
            if not isinstance(seen, _Seen):
                seen = self._seen[path] = _Seen()
            return seen.changed(value)
        before, steady = self._seen.get(path, (value, False)) if path in self._seen else (value, False)
        self._seen[path] = value, path in self._seen and before == value
        return steady and before != value

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": {}, "_count": {}}


def alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are there, comparable and equal."""
    if a is None or b is None or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(a, b)


@torch.no_grad()
def _mark(tensor: Tensor) -> Tensor | None:
    """Two numbers that change with the content of a tensor; None if it has none that can be read."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized or not tensor.numel():
        return None
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1).float().nan_to_num()
    places = torch.linspace(1, 2, len(flat), device=flat.device)
    return torch.stack((flat.sum(), flat @ places))


def _leaves(path: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The tensors and texts in an argument, each with its place."""
    if isinstance(value, (Tensor, str)):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves((*path, key), item)
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _leaves((*path, place), item)
