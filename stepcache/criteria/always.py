"""The criteria that need no look: always skip, never skip."""

from __future__ import annotations

from dataclasses import dataclass

from ..branch import Branch
from ..plan import Verdict
from .base import Criterion


@dataclass
class Always(Criterion):
    """Skips whatever the gates let through: with a mask, the static policy.

    Example:
        >>> from stepcache import Method
        >>> from stepcache.extend import Always
        >>> Method(criterion=Always(), mask="1101").static
        False
    """

    def decide(self, branch: Branch) -> Verdict:
        return Verdict(True)


@dataclass
class Never(Criterion):
    """Computes everything."""

    @property
    def never_skips(self) -> bool:
        return True

    def decide(self, branch: Branch) -> Verdict:
        return Verdict(False)
