"""The whole frontier: the best profile for every number of calls, beside what else makes as many."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stepcache import EasyCache, Forecast, HiCache, Method, Static, TaylorSeerCache
from stepcache._optional import require
from stepcache.bench.subjects import Subject
from stepcache.extend import AdaptiveOrder
from stepcache.masks import PRESETS
from stepcache.options import number
from stepcache.profile import Profile

from .calibrate import number_of_steps, prepared
from .choice import Choice, Found
from .held_out import HeldOut
from .progress import progress
from .search import Search

TUNED, FEWER, OTHER = "tuned", "fewer steps", "best other sampler"

RIVALS: Mapping[str, Sequence[Callable[[], Method]]] = {
    "Forecast": [lambda n=n: Forecast(n) for n in (2, 3, 4, 5, 6)],  # type: ignore[misc]
    "TaylorSeer": [lambda n=n: TaylorSeerCache(interval=n) for n in (2, 3, 4, 5, 6)],  # type: ignore[misc]
    "HiCache": [lambda n=n: HiCache(n) for n in (2, 3, 4, 5, 6)],  # type: ignore[misc]
    "EasyCache": [lambda t=t: EasyCache(t) for t in (0.05, 0.1, 0.2, 0.4, 0.8)],  # type: ignore[misc]
    "presets": [lambda name=name: Static(name) for name in PRESETS],  # type: ignore[misc]
    "presets, Forecast's prediction": [
        lambda name=name: Static(name, predictor=AdaptiveOrder())  # type: ignore[misc]
        for name in PRESETS
    ],
}
"""Published methods at several settings, by the name they have in the table."""


@dataclass(frozen=True)
class Point:
    """A rival on the held-out seeds: calls for one branch, and the mean of the metric."""

    name: str
    calls: float
    mean: float


@dataclass(frozen=True)
class Frontier:
    """What `frontier` has found.

    Attributes:
        profiles: one a number of calls, from few to many; each is better than those with fewer calls.
        points: the rivals.
        title, metric: for table and plot.
    """

    profiles: Sequence[Profile]
    points: Sequence[Point]
    title: str
    metric: str

    @property
    def names(self) -> list[str]:
        """The rivals, in the order of the table."""
        return list(dict.fromkeys(point.name for point in self.points))

    def best(self, name: str, calls: float) -> float | None:
        """The best of a rival with so many calls or fewer; None if it makes more."""
        return max((p.mean for p in self.points if p.name == name and p.calls <= calls), default=None)

    def table(self) -> str:
        """Markdown: a row a number of calls; a rival's cell is its best with as many calls or fewer."""
        head = ["calls", TUNED, *self.names]
        rows = [head, ["---"] * len(head)]
        for profile in self.profiles:
            rivals = [self.best(name, profile.calls) for name in self.names]
            cells = ["" if value is None else f"{value:.1f}" for value in rivals]
            rows.append([str(profile.calls), f"**{mean_of(profile):.1f}**", *cells])
        title = f"{self.title}: {self.metric}, mean over held-out seeds."
        return "\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"

    def plot(self, path: str | Path) -> Path:
        """The metric against calls. Needs matplotlib."""
        figure = require("matplotlib.figure", "bench").Figure(figsize=(8, 5), layout="constrained")
        panel = figure.subplots()
        panel.plot([p.calls for p in self.profiles], [mean_of(p) for p in self.profiles], "o-", lw=2.5, label=TUNED)
        for number_, name in enumerate(self.names):
            own = sorted((point.calls, point.mean) for point in self.points if point.name == name)
            dashes = "--" if name in (FEWER, OTHER) else ":"
            panel.plot(*zip(*own, strict=True), "sDv^<>P*X"[number_ % 9] + dashes, ms=5, lw=1.2, label=name)
        panel.set(title=self.title, xlabel="calls for one branch", ylabel=f"{self.metric} to the full run")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=9)
        figure.savefig(path, dpi=110)
        return Path(path)

    def save(self, folder: str | Path) -> Path:
        """Writes a profile a number of calls, table.md, points.json and frontier.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for profile in self.profiles:
            profile.save(folder / f"{profile.calls:02d}-calls.json")
        (folder / "table.md").write_text(self.table(), encoding="utf-8")
        points = [vars(point) for point in self.points]
        (folder / "points.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
        self.plot(folder / "frontier.png")
        return folder


def frontier(
    subject: Subject,
    *,
    sampler: str = "euler",
    steps: int = 20,
    seeds: int | Sequence[int] = 20,
    calls: Sequence[int] | None = None,
    others: Sequence[str] = (),
    rivals: Mapping[str, Sequence[Callable[[], Method]]] = RIVALS,
    metric: str | None = None,
    budget: float | None = None,
    state: str | None = None,
    workers: int = 1,
    console: Any = None,
) -> Frontier:
    """The best profile for every number of calls, from one recorded run and one measurement of the growth of errors.

    Args:
        subject, sampler, steps, seeds, metric, state, workers, console: see `tune`.
        calls: which numbers of calls; by default all from a tenth of the evaluations to all but one.
        others: the other samplers that are tried as rivals, without a cache.
        rivals: methods at several settings, by the name they have in the table.
        budget: the most full runs that the trials of one number of calls may cost. Default half the number of steps.

    Each number of calls starts from its own best places by dynamic programming, from even ones, and from those of one
    call more less one place.
    """
    steps = number_of_steps(steps)
    each = number("budget", steps / 2 if budget is None else budget)
    with (
        progress(console, float("inf")) as say,
        prepared(subject, sampler, steps, seeds, metric, float("inf"), state, workers, say) as (search, held_out),
    ):
        count = search.study.full.evaluations
        wanted = range(max(2, count // 10), count) if calls is None else calls
        wanted = sorted({number("calls", one, low=1, high=count, whole=True) for one in wanted})
        found = _rising(search, [*_searched(search, wanted, each)])
        profiles = [held_out.profile(one) for one in found]
        points = [*_plain(held_out, wanted, others), *_rivals(held_out, rivals)]
    title = f"{subject.name}, {sampler}, {steps} steps"
    return Frontier(profiles, points, title, held_out.metric)


def _searched(search: Search, wanted: Sequence[int], budget: float) -> list[Found]:
    """The best of each number of calls, from few to many; the search goes from many to few."""
    found: dict[int, Found] = {}
    for calls in reversed(wanted):
        starts = search.starts(calls)
        if calls + 1 in found:
            more = found[calls + 1].places
            fewer = [tuple(place for place in more if place != left) for left in more[1:]]
            starts.insert(1, Choice(min(fewer, key=search.study.placement.cost), found[calls + 1].choice.rule))
        found[calls] = search.climb(list(dict.fromkeys(starts)), budget)
    return [found[calls] for calls in wanted]


def _rising(search: Search, found: Sequence[Found]) -> list[Found]:
    """Leaves out what is no better than with fewer calls, after a try with the places of those and one more."""
    kept = [found[0]]
    for one in found[1:]:
        last = kept[-1]
        if one.score <= last.score and len(one.places) == len(last.places) + 1:
            free = [n for n in range(search.study.full.evaluations) if n not in last.places]
            more = [tuple(sorted((*last.places, n))) for n in free]
            other = search.study.score(Choice(min(more, key=search.study.placement.cost), last.choice.rule))
            one = max(one, other, key=lambda found: found.score)
        if one.score > last.score:
            kept.append(one)
    return kept


def _plain(held_out: HeldOut, wanted: Sequence[int], others: Sequence[str]) -> list[Point]:
    """Runs without a cache, of this sampler and of the best other one, judged by the same full run."""
    points = [Point(FEWER, calls, held_out.fewer_steps(calls)) for calls in wanted]
    runs = [held_out.run(steps=steps, sampler=sampler) for sampler in others for steps in wanted]
    points += [Point(OTHER, calls, fmean(scores)) for scores, calls in held_out.scores(runs)]
    return [
        point
        for point in points
        if point.name != OTHER or point.mean == max(p.mean for p in points if (p.name, p.calls) == (OTHER, point.calls))
    ]


def _rivals(held_out: HeldOut, rivals: Mapping[str, Sequence[Callable[[], Method]]]) -> list[Point]:
    names = [name for name, settings in rivals.items() for _ in settings]
    found = held_out.scores([held_out.run(make()) for settings in rivals.values() for make in settings])
    points = [Point(name, calls, fmean(scores)) for name, (scores, calls) in zip(names, found, strict=True)]
    return [point for point in points if point.calls < held_out.study.full.evaluations]


def mean_of(profile: Profile) -> float:
    """On the held-out seeds."""
    return float(profile.measured["held out"]["mean"])
