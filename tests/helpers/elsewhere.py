"""A device that this machine has not: tensors that are computed on the CPU, and say that they are on an accelerator.

What brings their numbers to the host is counted, whoever asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("xla:0")
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor on `DEVICE`; torch itself takes it for one on the meta device."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device="meta"
        )
        made.here = here
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of Accelerator")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Elsewhere({self.here})"


class Accelerator(TorchDispatchMode):
    """While it is entered, `DEVICE` is there. `transfers` counts how often the host has waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        found: list[Elsewhere] = []
        args, kwargs = tree_map_only(Elsewhere, lambda one: (found.append(one), one.here)[1], (args, kwargs))
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        if func in READS:
            self.transfers += bool(found)
            return out
        if device is not None and torch.device(device).type == "cpu":
            self.transfers += bool(found)
            return out
        return tree_map_only(Tensor, Elsewhere, out) if found or device is not None else out


def elsewhere(x: Tensor) -> Elsewhere:
    return Elsewhere(x)
