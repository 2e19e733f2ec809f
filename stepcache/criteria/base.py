"""What a criterion is: it says whether an evaluation that may be skipped is skipped.

A new one is one class: subclass `Criterion`, write `decide`, and `update` if it learns from computed evaluations. Its
options are its fields; fields made with `state()` hold what it learns in one run.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from ..branch import Branch
from ..plan import Verdict
from ..probe import Blocks
from ..run_info import RunInfo

if TYPE_CHECKING:
    from typing_extensions import Self

INVALID_STATE = "invalid cache state"
"""Why an evaluation is computed if its signal cannot be compared with the one that was kept."""


def state(default: Any = None, factory: Any = None) -> Any:
    """A dataclass field that belongs to a run and not to the options."""
    kind = {"default_factory": factory} if factory else {"default": default}
    return field(init=False, repr=False, compare=False, **kind)


def caller_level() -> int:
    """The `stacklevel` at which a warning given by the caller points out of this package, at what the user wrote."""
    level, frame = 1, sys._getframe(1)
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]
    ):
        level, frame = level + 1, frame.f_back
    return level


class Criterion(ABC):
    """Decides for one branch, the reference, through one run."""

    @property
    def never_skips(self) -> bool:
        """Whether these options can never skip: the model is then always called."""
        return False

    blocks: Blocks | None = None
    """The blocks of the model that it looks at: it is then asked when the forward has passed them."""

    measurements: ClassVar[tuple[str, ...]] = ()
    """What `decide` reads of a branch, as "input_change": if several branches decide, one transfer brings all of it."""

    def begin(self, run: RunInfo) -> Self:
        """A fresh copy for one run: nothing learned in one run reaches another."""
        return deepcopy(self)

    @abstractmethod
    def decide(self, branch: Branch) -> Verdict:
        """Skip or compute; asked for every evaluation that the gates let through and that has a cache to predict from.

        Several numbers of `branch` cost one device-to-host transfer if all are requested before the first `float()`.
        """

    def update(self, branch: Branch, forced: bool) -> None:
        """Learns from a computed evaluation inside the window; `forced` if a gate held it and `decide` was not asked.

        Keep deferred numbers here and turn them into floats in `decide`: then computed evaluations wait for nothing.
        """

    def update_any(self, name: str, branch: Branch) -> None:
        """Learns from a computed evaluation of any branch, including those that follow; called before `update`.

        For rules that look at several branches together, as guidance does. A branch that comes in a call of its own is
        reported after the reference's `update`, and before the next `decide`.
        """
