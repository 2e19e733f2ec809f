"""A run as a picture: a cell for each branch of each evaluation, coloured by what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ._optional import require
from .event import Event

SKIPPED = "#e3e6eb"
DECIDED: tuple[str, ...] = "#1d5fa8", "#5b8fcc", "#123d70"
HELD: tuple[str, ...] = "#9cc4e8", "#86bfae", "#b5a5d8", "#d2c08a"
FAILED: tuple[str, ...] = "#e0762c", "#c4453f", "#a8305c"
"""Colours of skipped evaluations, and of computed ones: the method chose so, a rule of the method did not let it
choose (the first evaluation, warm-up, the last step, ...), or a skip was not possible."""

CHOICES = (
    "above threshold",
    "another rank computes",
    "cadence",
    "criterion",
    "interval",
    "mask",
    "profile",
    "retention",
    "the others follow",
)
FAILURES = (
    "prediction not finite",
    "invalid cache state",
    "cannot be taken apart",
    "output not related to the input",
    "sigmas differ in the batch",
    "gradients are asked for",
    "called twice",
)
PAPER = "#ffffff"
BARS = "#c4453f"
"""Of the measured errors."""


def colours(events: Iterable[Event]) -> dict[str, str]:
    """The colour of each reason for which something was computed, in the order of appearance."""
    shades = {family: cycle(family) for family in (DECIDED, HELD, FAILED)}
    reasons = dict.fromkeys(event.reason for event in events if event.computed)
    return {reason: next(shades[_family(reason)]) for reason in reasons}


def _family(reason: str) -> tuple[str, ...]:
    if reason.startswith(FAILURES):
        return FAILED
    return DECIDED if reason.startswith(CHOICES) else HELD


def places(events: Iterable[Event], within: float = 0.06, between: float = 0.2) -> dict[int, tuple[float, float]]:
    """Left and right edge of each evaluation, each 1 wide with its gaps.

    Evaluations of one step are closer to each other (`within`) than those of two (`between`).
    """
    positions = {event.position.evaluation: event.position for event in events}
    order = sorted(positions)
    edges = {}
    for at, number in enumerate(order):
        step = positions[number].step
        same = [
            step is not None and 0 <= other < len(order) and positions[order[other]].step == step
            for other in (at - 1, at + 1)
        ]
        left, right = ((within if joined else between) / 2 for joined in same)
        edges[number] = at + left, at + 1 - right
    return edges


def strip(events: Sequence[Event], branches: Sequence[str], width: int, row: int) -> Tensor:
    """See `Report.strip`."""
    border, gap, bars = row // 2, row // 4, 2 * row
    shares: dict[int, float] = {}
    for event in events:
        if (share := event.error_share) is not None:
            shares[event.position.evaluation] = max(share, shares.get(event.position.evaluation, 0.0))
    height = 2 * border + len(branches) * (row + gap) + (bars if shares else -gap)
    image = _rgb(PAPER).expand(max(height, row), width, 3).clone()
    edges, shade = places(events), colours(events)
    unit = (width - 2 * border) / max(1, len(edges))

    def columns(evaluation: int) -> slice:
        left, right = edges[evaluation]
        begin = border + round(left * unit)
        return slice(begin, max(begin + 1, border + round(right * unit)))

    for event in events:
        top = border + branches.index(event.branch) * (row + gap)
        image[top : top + row, columns(event.position.evaluation)] = _rgb(
            shade[event.reason] if event.computed else SKIPPED
        )
    most = max(shares.values(), default=0.0)
    for evaluation, share in shares.items():
        size = max(1, round((bars - gap) * share / most)) if most else 1
        image[height - border - size : height - border, columns(evaluation)] = _rgb(BARS)
    return image


def _rgb(colour: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(colour[1:])), dtype=torch.uint8)


def figure(events: Sequence[Event], branches: Sequence[str], title: str) -> Any:
    """See `Report.plot`."""
    edges = places(events)
    asked = [event for event in events if event.estimate is not None and event.threshold is not None]
    checked = [event for event in events if event.error_share is not None]
    panels = [part for part, there in ((_criterion, asked), (_errors, checked)) if there]
    heights = [1.5] * len(panels) + [0.42 * max(1, len(branches)) + 0.1]
    width = min(16.0, max(7.5, 2.5 + 0.32 * len(edges)))
    made = require("matplotlib.figure", "demo").Figure(figsize=(width, sum(heights) + 1.7), layout="constrained")
    *upper, lowest = made.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for panel, axis in zip(panels, upper, strict=True):
        panel(axis, events, edges)
        axis.margins(x=0)
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
    _cells(lowest, events, branches, edges)
    _sigmas((upper or [lowest])[0], events, edges)
    made.suptitle(title, fontsize=11, x=0.01, ha="left")
    handles, labels = lowest.get_legend_handles_labels()
    columns = max(1, int(width / 2.4))
    made.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=9, frameon=False)
    return made


def _middle(edges: dict[int, tuple[float, float]], event: Event) -> float:
    return sum(edges[event.position.evaluation]) / 2


def _criterion(axis: Any, events: Sequence[Event], edges: dict[int, tuple[float, float]]) -> None:
    """The criterion's estimate and its threshold, for every branch that decides."""
    asked = [event for event in events if event.estimate is not None and event.threshold is not None]
    for number, branch in enumerate(dict.fromkeys(event.branch for event in asked)):
        mine = [event for event in asked if event.branch == branch]
        at = [_middle(edges, event) for event in mine]
        label = "estimate" if len({event.branch for event in asked}) == 1 else f"estimate, {branch}"
        axis.plot(at, [event.estimate for event in mine], "o-", color=f"C{number}", ms=4, lw=1.2, label=label)
        if not number:
            thresholds = [event.threshold for event in mine]
            axis.step(at, thresholds, color="0.25", ls="--", lw=1, where="mid", label="threshold")
    axis.set_ylim(0, 1.3 * max(max(event.estimate or 0, event.threshold or 0) for event in asked) or 1)
    axis.set_ylabel("criterion", fontsize=9)
    axis.legend(loc="upper left", fontsize=8, frameon=False, ncols=3)


def _errors(axis: Any, events: Sequence[Event], edges: dict[int, tuple[float, float]]) -> None:
    """How far a prediction would have been off where it was computed."""
    checked = [(event, share) for event in events if (share := event.error_share) is not None]
    branches = list(dict.fromkeys(event.branch for event, _ in checked))
    for number, branch in enumerate(branches):
        at, shares = zip(
            *((_middle(edges, event), share) for event, share in checked if event.branch == branch), strict=True
        )
        colour = BARS if len(branches) == 1 else f"C{number}"
        axis.vlines(at, 0, shares, color=colour, lw=1, alpha=0.6)
        axis.plot(at, shares, "o", color=colour, ms=4, label=branch)
    axis.set_ylim(0, 1.1 * max(share for _, share in checked) or 1)
    axis.yaxis.set_major_formatter(require("matplotlib.ticker", "demo").PercentFormatter(1, symbol=" %"))
    axis.set_ylabel("a skip would\nbe off by", fontsize=9)
    if len(branches) > 1:
        axis.legend(loc="best", fontsize=8, frameon=False, ncols=3)


def _cells(axis: Any, events: Sequence[Event], branches: Sequence[str], edges: dict[int, tuple[float, float]]) -> None:
    """The strip, with the reasons as its legend."""
    shade = colours(events)
    kinds: dict[str, list[Event]] = {}
    for event in events:
        kinds.setdefault(f"computed, {event.reason}" if event.computed else "skipped", []).append(event)
    for kind, mine in kinds.items():
        lefts, rights = zip(*(edges[event.position.evaluation] for event in mine), strict=True)
        bottoms = [branches.index(event.branch) + 0.1 for event in mine]
        widths = [right - left for left, right in zip(lefts, rights, strict=True)]
        colour = shade[mine[0].reason] if mine[0].computed else SKIPPED
        axis.bar(lefts, 0.8, widths, bottoms, align="edge", color=colour, label=f"{kind}: {len(mine)}")
    axis.set_xlim(0, max(1, len(edges)))
    axis.set_ylim(max(1, len(branches)), 0)
    axis.set_yticks([row + 0.5 for row in range(len(branches))], branches)
    axis.tick_params(axis="y", length=0)
    axis.spines[:].set_visible(False)
    _numbers(axis, events, edges)


def _numbers(axis: Any, events: Sequence[Event], edges: dict[int, tuple[float, float]]) -> None:
    """Steps below the strip, or evaluations if the steps are not known."""
    steps: dict[int | None, list[float]] = {}
    for event in events:
        steps.setdefault(event.position.step, []).append(_middle(edges, event))
    stages = {event.position.stage for event in events}
    if None in steps or not steps:
        marks = [(str(number), sum(pair) / 2) for number, pair in edges.items()]
        axis.set_xlabel("evaluation (the steps are not known)", fontsize=9)
    else:
        marks = [(str(step), sum(set(at)) / len(set(at))) for step, at in steps.items()]
        axis.set_xlabel("step" if len(stages) < 2 else "step, two evaluations each", fontsize=9)
    every = 1 + len(marks) // 31
    axis.set_xticks([at for _, at in marks[::every]], [text for text, _ in marks[::every]], fontsize=9)


def _sigmas(axis: Any, events: Sequence[Event], edges: dict[int, tuple[float, float]]) -> None:
    """The noise levels above the uppermost panel."""
    sigmas = {event.position.evaluation: event.position.sigma for event in events}
    top, shown = axis.secondary_xaxis("top"), sorted(sigmas)[:: 1 + len(sigmas) // 13]
    top.set_xticks([sum(edges[n]) / 2 for n in shown], [f"{sigmas[n]:.3g}" for n in shown], fontsize=8, color="0.4")
    top.set_xlabel("sigma", fontsize=9, color="0.4")
    top.tick_params(length=2, color="0.6")
    top.spines["top"].set_visible(False)
