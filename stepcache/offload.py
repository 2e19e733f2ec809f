"""Tensors that wait in the host's memory between evaluations (`Method.offload`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Offloaded:
    """A copy of a tensor in the host's memory. `back()` copies it to where it came from.

    From an accelerator the copy is pinned and nobody waits for it: both ways follow one another on the device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.shape = tensor.device, tensor.shape
        self._host = to_host(tensor)

    def back(self) -> Tensor:
        return to_device(self._host, self.device)


def to_host(tensor: Tensor) -> Any:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def to_device(host: Any, device: torch.device) -> Tensor:
    return host.to(device, non_blocking=True)


def brought(kept: Tensor | Offloaded) -> Tensor:
    """The tensor itself, wherever it was kept."""
    return kept.back() if isinstance(kept, Offloaded) else kept


class KeptTensor:
    """A field of a dataclass: given as a tensor or `Offloaded`, read as a tensor."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type) -> Tensor:
        if owner is None:
            raise AttributeError(self.name)  # dataclasses take this for: no default
        return brought(owner.__dict__[self.name])

    def __set__(self, owner: Any, given: Tensor | Offloaded) -> None:
        owner.__dict__[self.name] = given
