"""What is put in a module's call slot, so that it answers in the module's place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from stepcache import OptionError

SLOT = "_compiled_call_impl"
"""The attribute that `torch.nn.Module.__call__` looks into first. `module.compile()` uses it too."""

Abandon = Callable[[], bool]


@cache
def slot_is_called() -> bool:
    """Whether this torch calls what is in the slot, which is a private attribute of its modules."""
    module = nn.Module()
    module.__dict__[SLOT] = lambda: True
    try:
        return module() is True
    except (NotImplementedError, TypeError):
        return False


class HostPatch:
    """Answers the calls of one module between `install` and `remove`. Subclasses define `__call__`.

    Args:
        name: the module's name in its pipeline, for messages.
        module: the module.
        abandon: removes this patch, and those installed with it, if its run was never finished, and returns whether it
            did; called if another patch needs the place. None: it stays.
    """

    def __init__(self, name: str, module: nn.Module, abandon: Abandon | None = None) -> None:
        self.name, self.module, self.abandon = name, module, abandon
        self._previous: Callable[..., Any] | None = None

    def install(self) -> None:
        """Takes the module's call slot; what was there is kept and called.

        Raises:
            RuntimeError: this torch does not call what is in the slot.
            OptionError: the module is cached already.
        """
        if not slot_is_called():
            raise RuntimeError(
                f"torch {torch.__version__} does not call what is in a module's {SLOT}: nothing can be attached; "
                "use torch 2.4 or newer, and report it if this is one"
            )
        occupant = self.module.__dict__.get(SLOT)
        if isinstance(occupant, HostPatch):
            if occupant.abandon is None or not occupant.abandon():
                raise OptionError(f"{self.name} is cached already: leave the other attachment first")
            occupant = self.module.__dict__.get(SLOT)
        self._previous = occupant
        self.module.__dict__[SLOT] = self

    def remove(self) -> None:
        """Leaves the slot as it was, or as something else has changed it since, with a warning."""
        if self.module.__dict__.get(SLOT) is not self:
            warnings.warn(
                f"{self.name}: something else, .compile() say, took the place of the cache; nothing was skipped since",
                stacklevel=5,
            )
        elif self._previous is None:
            del self.module.__dict__[SLOT]
        else:
            self.module.__dict__[SLOT] = self._previous

    def original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own answer."""
        return (self._previous or self.module._call_impl)(*args, **kwargs)
