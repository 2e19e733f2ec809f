"""What becomes of an evaluation: computed for a reason or predicted, decided for each branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Verdict(NamedTuple):
    """A criterion's answer: skip or not, with the numbers that decided it (None if there were none).

    `reason` is what the report says, if that is more than on which side of the threshold the estimate is.
    """

    skip: bool
    estimate: float | None = None
    threshold: float | None = None
    reason: str | None = None

    @property
    def why(self) -> str | None:
        """What the report says; None if there is nothing to compare.

        Example:
            >>> Verdict(True, 0.1, 0.2).why, Verdict(False, threshold=0.2).why, Verdict(True).why
            ('below threshold', 'no estimate yet', None)
        """
        if self.reason is not None or self.threshold is None:
            return self.reason
        if self.estimate is None:
            return "no estimate yet"
        return "below threshold" if self.skip else "above threshold"


@dataclass(frozen=True)
class ComputeReason:
    """Why a branch must be computed.

    `observe`: the criterion may learn from it. `record`: it goes into the branch's cache.
    """

    reason: str
    observe: bool = True
    record: bool = True


@dataclass
class Plan:
    """Why each branch of a call is computed, or None if it is predicted.

    `verdicts` are the criterion's answers, by branch; `deciding` are the branches that it is asked for. `computed` and
    `predicted` are the branches of either kind.

    Example:
        >>> from stepcache.extend import ComputeReason, Plan
        >>> plan = Plan({"cond": ComputeReason("warm-up"), "uncond": None})
        >>> plan.computed, plan.predicted
        (['cond'], ['uncond'])
    """

    reasons: dict[str, ComputeReason | None]
    deciding: Sequence[str] = ()
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    computed: list[str] = field(init=False)
    predicted: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.computed = [name for name, reason in self.reasons.items() if reason is not None]
        self.predicted = [name for name, reason in self.reasons.items() if reason is None]

    @classmethod
    def compute(
        cls,
        names: Iterable[str],
        reason: ComputeReason,
        deciding: Sequence[str] = (),
        verdicts: Mapping[str, Verdict] | None = None,
    ) -> Plan:
        """Every branch is computed, for one reason."""
        return cls(dict.fromkeys(names, reason), deciding, verdicts or {})

    @classmethod
    def predict(
        cls,
        names: Iterable[str],
        deciding: Sequence[str] = (),
        verdicts: Mapping[str, Verdict] | None = None,
    ) -> Plan:
        """Every branch is predicted."""
        return cls(dict.fromkeys(names), deciding, verdicts or {})

    def with_reasons(self, reasons: dict[str, ComputeReason | None]) -> Plan:
        """The same decision, carried out otherwise."""
        return Plan(reasons, self.deciding, self.verdicts)

    def all_computed(self, reason: ComputeReason) -> Plan:
        """The same plan, but every branch is computed, for this reason."""
        return self.with_reasons(dict.fromkeys(self.reasons, reason))
