"""Step computation masks: which steps of a run are computed (1) and which may be skipped (0).

The idea and the four presets are cache-dit's (v1.5.0, "SCM"); `--scm-mask` and `--scm-policy` are the names under which
stable-diffusion.cpp offers it. At 28 steps the presets are the published ones to the digit. At other numbers of steps
they are scaled by another rule, because the published scaling leaves tails of 10 to 15 skipped steps at 16 to 20 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from .options import OptionError, number, shown, unknown

Policy = Literal["dynamic", "static"]

PRESETS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
"""Run lengths (computed, skipped), interleaved, at 28 steps."""

LONGEST = 1000


@dataclass(frozen=True, init=False)
class StepMask:
    """One digit a step: 1 = compute, 0 = may be skipped.

    `mask` is text ("1,1,0,1" or "1101"), a list of 0 and 1, or the name of a preset (`slow`, `medium`, `fast`, `ultra`,
    or the first letter), which takes the run's own number of steps.

    `policy` says what happens on a zero: "dynamic" (default) asks the method's criterion, "static" skips without
    asking. Either way a step without a cached one before it is computed, and so are those that the window, warm-up,
    last step and limits ask for. An interval (Forecast's, HiCache's, TaylorSeer's) acts beside a dynamic mask, whose
    ones are computed in addition; a static mask takes its place.

    A mask of another length than the run raises OptionError with both lengths when the run's schedule is known. In a
    run without a known schedule (dpm_fast, dpm_adaptive) steps have no numbers: everything is computed and the report
    says so.

    Example:
        >>> from stepcache import StepMask
        >>> print(StepMask.bins(compute=[3, 1, 1], cache=[2, 2]))
        111001001 (dynamic)
        >>> StepMask.preset("fast", steps=10).mask
        (1, 0, 0, 1, 0, 0, 1, 0, 0, 1)
    """

    mask: str | tuple[int, ...]
    policy: Policy

    def __init__(self, mask: str | Iterable[int], policy: str = "dynamic") -> None:
        if policy not in ("dynamic", "static"):
            raise unknown("policy", str(policy), ("dynamic", "static"))
        if isinstance(mask, str) and any(letter.isalpha() for letter in mask):
            object.__setattr__(self, "mask", preset_name(mask))
        else:
            object.__setattr__(self, "mask", _digits(mask))
        object.__setattr__(self, "policy", policy)

    @classmethod
    def preset(cls, name: str, steps: int | None = None, policy: str = "dynamic") -> StepMask:
        """The preset `name` for `steps` steps, 1 to 1,000; without `steps`, for however many the run has."""
        return cls(preset_name(name) if steps is None else scaled(preset_name(name), steps), policy)

    @classmethod
    def bins(cls, compute: Iterable[int], cache: Iterable[int], policy: str = "dynamic") -> StepMask:
        """From run lengths: compute[0] ones, cache[0] zeros, compute[1] ones, ... The last step is computed.

        `StepMask.bins(compute=[3, 1, 1], cache=[2, 2])` is 111001001.
        """
        return cls(_interleaved(_bins("compute", compute), _bins("cache", cache)), policy)

    def for_steps(self, steps: int) -> tuple[int, ...]:
        """The digits for a run of `steps` steps. OptionError if the mask has another length."""
        if isinstance(self.mask, str):
            return scaled(self.mask, steps)
        steps = number("steps", steps, low=1, whole=True)
        if len(self.mask) != steps:
            raise OptionError(
                f"the mask has {len(self.mask)} entries, the run has {steps} steps: "
                f"give one entry a step, or a preset ({', '.join(PRESETS)}), which fits any number"
            )
        return self.mask

    def __str__(self) -> str:
        return f"{self.mask if isinstance(self.mask, str) else ''.join(map(str, self.mask))} ({self.policy})"


def preset_name(name: str) -> str:
    """The full name of a preset given by name or first letter."""
    text = str(name).strip().lower()
    for full in PRESETS:
        if text in (full, full[0]):
            return full
    raise unknown("mask preset", str(name), PRESETS)


def scaled(name: str, steps: int) -> tuple[int, ...]:
    """The preset `name` scaled to `steps` steps.

    With K of 28 steps computed at the positions p(0..K-1) and Z the longest run of zeros there, `steps` = N gets

        C = the larger of round(N K / 28), 2 (first and last), and the least that allows runs of zeros <= ceil(N Z / 28)

    computed steps at the positions p(j (K - 1) / (C - 1)) (N - 1) / 27, linearly interpolated and rounded, then moved
    as little as needed so that no two coincide and no run of zeros is longer than ceil(N Z / 28).
    """
    return _scaled(name, number("steps", steps, low=1, high=LONGEST, whole=True))


@lru_cache(maxsize=256)
def _scaled(name: str, steps: int) -> tuple[int, ...]:
    pattern = _interleaved(*PRESETS[name])
    ones = [i for i, digit in enumerate(pattern) if digit]
    gap = math.ceil(steps * max(PRESETS[name][1]) / len(pattern))
    count = _computed(name, steps)
    if count == 1:
        return (1,) * steps
    positions: list[int] = []
    for j in range(count):
        share = j * (len(ones) - 1) / (count - 1)
        i = min(int(share), len(ones) - 2)
        target = round((ones[i] + (share - i) * (ones[i + 1] - ones[i])) * (steps - 1) / (len(pattern) - 1))
        left = count - 1 - j
        low = max(positions[-1] + 1 if positions else 0, steps - 1 - left * (gap + 1))
        high = min(positions[-1] + gap + 1 if positions else 0, steps - 1 - left)
        positions.append(min(max(target, low), high))
    chosen = set(positions)
    return tuple(int(step in chosen) for step in range(steps))


def _computed(name: str, steps: int) -> int:
    compute, cache = PRESETS[name]
    length, gap = sum(compute) + sum(cache), math.ceil(steps * max(cache) / (sum(compute) + sum(cache)))
    by_share = math.floor(steps * sum(compute) / length + 0.5)
    by_gap = math.ceil((steps + gap) / (gap + 1))
    return max(by_share, by_gap, min(2, steps))


def _bins(name: str, given: Any) -> tuple[int, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise OptionError(f"{name}={shown(given)}: accepted is a list of run lengths")
    bins = tuple(number(f"{name} bin", one, low=1, high=LONGEST, whole=True) for one in islice(given, LONGEST + 1))
    if sum(bins) > LONGEST:
        raise OptionError(f"the {name} bins have {LONGEST} steps and more: accepted are masks of 1 to {LONGEST}")
    return bins


def _interleaved(compute: tuple[int, ...], cache: tuple[int, ...]) -> tuple[int, ...]:
    if len(compute) - len(cache) not in (0, 1) or not compute:
        raise OptionError(
            f"{len(compute)} compute bins and {len(cache)} cache bins: they alternate, compute first, "
            "so there must be as many cache bins or one fewer"
        )
    digits: list[int] = []
    for k in range(len(compute)):
        digits += [1] * compute[k]
        if k < len(cache):
            digits += [0] * cache[k]
    digits[-1] = 1
    return tuple(digits)


def _digits(mask: str | Iterable[int]) -> tuple[int, ...]:
    if not isinstance(mask, (str, Iterable)):
        presets = ", ".join(PRESETS)
        raise OptionError(f"mask={shown(mask)}: accepted are text, a list of 0 and 1, and a preset ({presets})")
    if isinstance(mask, str):
        text = mask.strip()
        pieces = [piece.strip() for piece in text.removesuffix(",").split(",")] if "," in text else list(text)
    else:
        pieces = [_digit(entry) for entry in islice(mask, LONGEST + 1)]
    for position, piece in enumerate(pieces):
        if piece not in ("0", "1"):
            entry = f"mask entry {position + 1} is {shown(piece)}"
            raise OptionError(f"{entry}: accepted is 1 (compute) or 0 (may be skipped)")
    if not pieces:
        raise OptionError("the mask is empty: give one entry a step, 1 (compute) or 0 (may be skipped)")
    if len(pieces) > LONGEST:
        raise OptionError(f"the mask has more than {LONGEST} entries: accepted are 1 to {LONGEST}")
    return tuple(int(piece) for piece in pieces)


def _digit(entry: Any) -> str:
    try:
        return str(int(entry)) if entry in (0, 1) else str(entry)
    except (TypeError, ValueError, RuntimeError):  # an array, a tensor, a number of thousands of digits
        return shown(entry)
