"""What `stepcache compare` made, and the one HTML file that shows it: images, differences and traces."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepcache import Report, __version__, trace
from stepcache._optional import require
from stepcache.event import Event
from stepcache.options import number

from .metrics import CAP

GAINS = 1, 2, 5, 10, 20, 50, 100, 200
SMALL = 128
"""Images of at most so many pixels a side are shown in squares, not smoothed."""


@dataclass(frozen=True)
class Shot:
    """One image: how it was made, and how near it is to the full run's (the subject's first metric)."""

    image: Tensor
    steps: int
    calls: float
    seconds: float
    score: float
    report: Report


@dataclass(frozen=True)
class Entry:
    """A method's images, and those of the same sampler without a cache in fewer steps, with at most as many calls.

    `fewer` has None for an image for which the method skipped nothing, or if the sampler cannot make so few calls.
    """

    name: str
    shots: tuple[Shot, ...]
    fewer: tuple[Shot | None, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` made. `metric` is the name of the scores."""

    subject: str
    sampler: str
    steps: int
    metric: str
    captions: tuple[str, ...]
    full: tuple[Shot, ...]
    entries: tuple[Entry, ...]

    def save(self, path: str | Path, gain: float | None = None) -> Path:
        """Writes the page: one HTML file with everything in it, for any browser. Needs jinja2 and Pillow.

        `gain`: how many times brighter differences are shown; None: as bright as can be, for each image apart.
        """
        path = Path(path)
        path.write_text(page(self, gain), encoding="utf-8")
        return path


def page(comparison: Comparison, gain: float | None = None) -> str:
    """The HTML, with every image inside it as a data URI. See `Comparison.save`."""
    fixed = None if gain is None else number("gain", gain, low=1, high=1e6)
    gains = [fixed or _gain(_differences(comparison, at)) for at in range(len(comparison.full))]
    environment = require("jinja2", "bench").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("stepcache.bench") / "page.html.j2").read_text(encoding="utf-8"))
    height, width = comparison.full[0].image.shape[-2:]
    return str(
        template.render(
            comparison=comparison,
            version=__version__,
            gains=[f"{gain:g}" for gain in gains],
            width=width,
            height=height,
            small=max(width, height) <= SMALL,
            frames=len(comparison.full[0].image) if comparison.full[0].image.ndim == 4 else 0,
            full=[_shot(shot, shot, 1) for shot in comparison.full],
            full_totals=_totals(comparison.full, comparison.full),
            rows=[_row(comparison, entry, gains) for entry in comparison.entries],
            skipped=trace.SKIPPED,
        )
    )


def _row(comparison: Comparison, entry: Entry, gains: Sequence[float]) -> dict[str, Any]:
    """A method's card and its rival's."""
    full = comparison.full
    pairs = list(zip(entry.fewer, full, strict=True))
    fewer = [shot for shot, _ in pairs if shot is not None]
    return {
        "name": entry.name,
        "shots": [_shot(*each) for each in zip(entry.shots, full, gains, strict=True)],
        "totals": _totals(entry.shots, full),
        "fewer": [
            None if shot is None else _shot(shot, whole, gain)
            for shot, whole, gain in zip(entry.fewer, full, gains, strict=True)
        ],
        "fewer_totals": _totals(fewer, [whole for shot, whole in pairs if shot is not None]) if fewer else None,
        "ahead": not fewer
        or statistics.fmean(s.score for s in entry.shots) >= statistics.fmean(s.score for s in fewer),
    }


def _totals(shots: Sequence[Shot], full: Sequence[Shot]) -> dict[str, str]:
    """A card's figures: means over its images."""
    seconds, before = (statistics.fmean(shot.seconds for shot in group) for group in (shots, full))
    steps = sorted({shot.steps for shot in shots})
    return {
        "calls": _short(statistics.fmean(shot.calls for shot in shots)),
        "of": _short(statistics.fmean(shot.calls for shot in full)),
        "seconds": f"{seconds:.2f}" if seconds < 100 else f"{seconds:.0f}",
        "speed": f"{before / seconds:.1f}" if seconds else "",
        "score": _decibels(statistics.fmean(shot.score for shot in shots)),
        "steps": " or ".join(map(str, steps)) if len(steps) < 3 else f"{steps[0]} to {steps[-1]}",
    }


def _short(value: float) -> str:
    return f"{value:g}" if value == int(value) else f"{value:.1f}"


def _decibels(score: float) -> str:
    return f"{score:.1f}" if score < CAP else "identical"


def _shot(shot: Shot, full: Shot, gain: float) -> dict[str, Any]:
    low, high = _limits(_still(full.image))
    difference = (_still(shot.image) - _still(full.image)).abs() / (high - low) * gain
    return {
        "image": _uri((_still(shot.image) - low) / (high - low)),
        "difference": _uri(difference),
        "score": _decibels(shot.score),
        "calls": _short(shot.calls),
        "of": _short(full.calls),
        "steps": shot.steps,
        "trace": _trace(shot.report),
        "reasons": _reasons(shot.report.events),
    }


def _still(image: Tensor) -> Tensor:
    """An image (C, H, W); of a video the middle frame."""
    return (image if image.ndim == 3 else image[len(image) // 2]).float()


def _limits(image: Tensor) -> tuple[float, float]:
    """What is shown black and white: -1 and 1, or the image's own range if it is another one, as that of galaxies."""
    low, high = float(image.min()), float(image.max())
    if low < -1.5 or high > 1.5 or high - low < 0.5:
        return (low, high) if low < high else (low - 1, low + 1)
    return -1.0, 1.0


def _differences(comparison: Comparison, at: int) -> Iterable[Tensor]:
    """How far every run of one image is from the full run, as a share of what is shown."""
    full = _still(comparison.full[at].image)
    low, high = _limits(full)
    for entry in comparison.entries:
        for shot in (entry.shots[at], entry.fewer[at]):
            if shot is not None:
                yield (_still(shot.image) - full).abs() / (high - low)


def _gain(differences: Iterable[Tensor]) -> float:
    """The most of `GAINS` at which 97 % of the pixels of the worst run are not too bright to be told apart."""
    worst = max((float(_quantile(one, 0.97)) for one in differences), default=0.0)
    return max((gain for gain in GAINS if gain * worst <= 1), default=GAINS[0])


def _quantile(values: Tensor, share: float) -> Tensor:
    """`torch.quantile` without its limit of 16 million numbers."""
    flat = values.flatten()
    return flat.kthvalue(max(1, round(share * len(flat)))).values


def _uri(image: Tensor) -> str:
    """An image (C, H, W) from 0 to 1 as a data URI: PNG if it is small, WebP of high quality if not."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous()
    drawn, form = io.BytesIO(), "png" if max(image.shape) <= 2 * SMALL else "webp"
    picture = require("PIL.Image", "bench").fromarray(pixels.numpy())
    picture.save(drawn, form, **({"optimize": True} if form == "png" else {"quality": 95}))
    return f"data:image/{form};base64,{base64.b64encode(drawn.getvalue()).decode()}"


def _trace(report: Report) -> list[dict[str, Any]]:
    """A row of cells for each branch; branches with the same decisions share a row.

    A cell is (colour, tooltip, whether it ends a step).
    """
    shade = trace.colours(report.events)
    rows: dict[tuple[Any, ...], dict[str, list[Event]]] = {}
    for branch in report.branches:
        mine = [event for event in report.events if event.branch == branch]
        decisions = tuple((event.position.evaluation, event.computed, event.reason) for event in mine)
        rows.setdefault(decisions, {})[branch] = mine
    return [{"branches": " and ".join(row), "cells": _cells([*row.values()], shade)} for row in rows.values()]


def _cells(branches: Sequence[Sequence[Event]], shade: dict[str, str]) -> list[tuple[str, str, bool]]:
    """The cells of branches that share a row; the tooltip is that of the one whose prediction was checked."""
    steps = [event.position.step for event in branches[0]]
    ends = [a is None or a != b for a, b in zip(steps, [*steps[1:], None], strict=True)]
    cells = []
    for same, end in zip(zip(*branches, strict=True), ends, strict=True):
        event = next((event for event in same if event.error_share is not None), same[0])
        cells.append((shade[event.reason] if event.computed else trace.SKIPPED, _tooltip(event), end))
    return cells


def _tooltip(event: Event) -> str:
    position = event.position
    place = f"evaluation {position.evaluation}" if position.step is None else f"step {position.step}"
    off = "" if event.error_share is None else f"; a skip would have been off by {event.error_share:.1%}"
    what = _reason(event) if event.computed else "skipped"
    return f"{place}, sigma {position.sigma:.3g}: {what}{off}"


def _reason(event: Event) -> str:
    return "computed" if event.reason == "off" else f"computed, {event.reason}"


def _reasons(events: Sequence[Event]) -> list[tuple[str, str]]:
    """The legend of a trace: colours and words."""
    shade = trace.colours(events)
    found = {_reason(event): shade[event.reason] for event in events if event.computed}
    if any(not event.computed for event in events):
        found["skipped"] = trace.SKIPPED
    return [(colour, words) for words, colour in found.items()]
