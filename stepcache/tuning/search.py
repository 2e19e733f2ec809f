"""The search: a recorded run, the growth of errors, the best places by dynamic programming, and trials around them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from stepcache.bench.metrics import Metric
from stepcache.options import OptionError
from stepcache.profile import Prediction

from .notebook import Notebook
from .placement import Placement
from .tape import Tape
from .team import Job, Outcome, Team

Places = tuple[int, ...]

ROUND = 8
"""So many trials are made before the best of them is taken: independent of each other, so that workers can share."""

PATIENCE = 0.1
"""The penalty of a round without success, as a share of the best score minus the median one."""

QUIET = 12
"""After so many rounds without a better choice the search ends."""

FINE = 30
"""Up to so many evaluations the growth is measured at each, beyond at every second."""


@dataclass(frozen=True)
class Found:
    """One choice of places, and what came of it on the calibration seeds.

    Attributes:
        places: the evaluations that are computed.
        mean: of the metric.
        score: mean - standard deviation / 2, by which choices are compared. The places of the highest mean are too
            often those that happen to suit a few of the seeds.
        predictions: how the other evaluations are predicted.
    """

    places: Places
    mean: float
    score: float
    predictions: dict[int, Prediction]


class Search:
    """Searches places on the calibration seeds.

    Attributes:
        team: who runs trials.
        full: the tape of the full run.
        spent: network calls so far, in full runs of the calibration seeds.
        budget: the most that may be spent.
    """

    def __init__(
        self,
        team: Team,
        full: Tape,
        sampler: str,
        steps: int,
        seeds: Sequence[int],
        metric: Metric,
        budget: float,
        notebook: Notebook,
        say: Callable[[str, float], None] = lambda sentence, spent: None,
        learn: bool = True,
    ) -> None:
        self.team, self.full, self.sampler, self.steps, self.seeds = team, full, sampler, steps, tuple(seeds)
        self.metric, self.budget, self.notebook, self.say, self.learn = metric, budget, notebook, say, learn
        self.spent = float(notebook.get("spent") or 0.0)
        self._recordings: dict[Places, Any] = {}
        self.spend(full.calls)
        self._refuse_another_model()
        self.placement = Placement(full, self._growth())

    def spend(self, calls: float) -> None:
        """Counts calls of the calibration batch."""
        self.spent += calls / self.full.evaluations
        self.notebook.add("spent", self.spent)

    def _tried(self, jobs: Sequence[Job]) -> Iterator[tuple[Outcome, Any]]:
        """Runs trials and counts their calls."""
        for outcome, recording in self.team.tried(jobs):
            self.spend(outcome.calls)
            yield outcome, recording

    def orders_alone(self, places: Places) -> dict[int, Prediction]:
        """How the other evaluations are predicted without learned weights."""
        ((outcome, _),) = self._tried([Job(places, learn=False)])
        return outcome.chosen

    def _refuse_another_model(self) -> None:
        """OptionError if the notebook's findings are of a model that draws other images."""
        flat = self.full.images.flatten()
        trait = [round(float(value), 4) for value in flat[:: max(1, len(flat) // 8)][:8]]
        known = self.notebook.get("trait")
        if known and any(abs(a - b) > 0.02 for a, b in zip(known, trait, strict=False)):
            raise OptionError("state: its findings were made with another model: give another file")
        self.notebook.add("trait", trait)

    def _growth(self) -> list[float]:
        """How much an error made at each evaluation has grown by the end: each is skipped once, alone.

        The evaluations before it are answered from the full run's tape, so that this costs half as many full runs as
        there are evaluations, a quarter in long runs.
        """
        count = self.full.evaluations
        if known := self.notebook.get("growth"):
            return list(known)
        growth: dict[int, float] = {count: 1.0}
        every = range(1, count - 1, 1 if count <= FINE else 2)
        for n, (grown, calls) in zip(every, self.team.grown(every), strict=True):
            self.spend(calls)
            self.say(f"growth of an error at evaluation {n + 1} of {count}", self.spent)
            if grown is not None:
                growth[n + 1] = grown
        found = [_between(growth, n) for n in range(count + 1)]
        self.notebook.add("growth", found)
        return found

    def score(self, places: Places) -> Found:
        """A trial of these places, or what the notebook knows of them."""
        return self._scored([places])[0]

    def _scored(self, choices: Sequence[Places], around: Found | None = None) -> list[Found]:
        """Trials of each of these, or what the notebook knows of them.

        The beginning that places share with those of `around` is answered from its recording.
        """
        found: dict[Places, Found] = {}
        new = [places for places in choices if self.notebook.get(_name(places)) is None]
        jobs = [Job(places, self.learn) for places in new]
        for k, places in enumerate(new):
            if around is not None and (since := min({*places} ^ {*around.places}) - 1) > 0:
                jobs[k] = Job(places, self.learn, self._recording(around.places), since)
        for places, (outcome, recording) in zip(new, self._tried(jobs), strict=True):
            self._recordings[places] = recording
            mean = statistics.fmean(outcome.scores)
            skipped = {n: how.written() for n, how in outcome.chosen.items()}
            score = mean - statistics.pstdev(outcome.scores) / 2
            self.notebook.add(_name(places), {"mean": mean, "score": score, "skipped": skipped})
            found[places] = Found(places, mean, score, outcome.chosen)
        return [found.get(places) or self._known(places) for places in choices]

    def _known(self, places: Places) -> Found:
        """What the notebook knows of these places."""
        known = self.notebook.get(_name(places))
        predictions = {int(n): Prediction.read(n, how) for n, how in known["skipped"].items()}
        return Found(places, known["mean"], known["score"], predictions)

    def _recording(self, places: Places) -> Any:
        """The recording of these places; made once more if it was not kept."""
        if places not in self._recordings:
            ((_, self._recordings[places]),) = self._tried([Job(places, self.learn)])
        return self._recordings[places]

    def climb(self, start: Places, budget: float | None = None, enough: float | None = None) -> Found:
        """The best places that trials find from these on, until the budget ends or the mean is `enough`.

        Each round tries neighbours of one choice, usually the best so far. Each round that finds nothing better lowers
        the rank of its choice, so that the search moves on to another one. It ends after `QUIET` such rounds in a row.
        """
        cost = len(start) / self.full.evaluations  # of one trial, at most
        limit = self.budget - 1 - 4 * cost  # the held-out seeds are measured afterwards
        limit = limit if budget is None else min(limit, self.spent + budget)
        best = self.score(start)
        known: dict[Places, Found] = {start: best}
        rounds, quiet = {start: self._rounds(start, {start})}, 0
        tried = {start: 0}
        while quiet < QUIET and rounds and (enough is None or best.mean < enough):
            step = PATIENCE * (best.score - statistics.median(found.score for found in known.values()))
            around = known[max(rounds, key=lambda places: (known[places].score - step * tried[places], places))]
            tried[around.places] += 1
            chunk = [places for places in next(rounds[around.places], ()) if places not in known]
            chunk = self._affordable(chunk, int((limit - self.spent) / cost))
            if not chunk:
                del rounds[around.places]
                continue
            kept = around.places
            self._recordings = {kept: self._recordings[kept]} if kept in self._recordings else {}
            for found in self._scored(chunk, around):
                known[found.places], tried[found.places] = found, 0
                rounds[found.places] = self._rounds(found.places, known)
            tops = [known[places] for places in chunk]
            top: Found = max(tops, key=lambda found: found.score)
            quiet = 0 if top.score > best.score else quiet + 1
            best = max(best, top, key=lambda found: found.score)
            self.say(f"{len(start)} calls: {best.mean:.2f}", self.spent)
        return best

    def _affordable(self, choices: Sequence[Places], trials: int) -> list[Places]:
        """Those that so many trials are enough for; what the notebook knows needs none."""
        new = [places for places in choices if self.notebook.get(_name(places)) is None]
        return [places for places in choices if places not in new[max(0, trials) :]]

    def _rounds(self, places: Places, known: Container[Places]) -> Iterator[list[Places]]:
        """The trials around one choice, the most promising first."""
        moves = (move for move in self._moves(places) if move not in known)
        while chunk := list(islice(moves, ROUND)):
            yield chunk

    def _moves(self, places: Places) -> Iterator[Places]:
        """Places that differ in one, or in two neighbours moved together; the most promising first."""
        count, chosen = self.full.evaluations, set(places)
        free = [n for n in range(1, count) if n not in chosen]
        moved = {tuple(sorted(chosen - {old} | {new})) for old in places[1:] for new in free}
        for a, b in pairwise(places[1:]):
            for step in (-1, 1):
                pair = chosen - {a, b} | {a + step, b + step}
                if len(pair) == len(places) and 0 in pair and max(pair) < count:
                    moved.add(tuple(sorted(pair)))
        yield from sorted(moved - {places}, key=lambda one: (self.placement.cost(one), one))


def _name(places: Places) -> str:
    """Of a finding in the notebook."""
    return ",".join(map(str, places))


def _between(known: dict[int, float], n: int) -> float:
    """The value at n, on the line between its neighbours."""
    below, above = [k for k in known if k <= n], [k for k in known if k >= n]
    if not below or not above:
        return known[min(known) if not below else max(known)]
    a, b = max(below), min(above)
    return known[a] if a == b else known[a] + (known[b] - known[a]) * (n - a) / (b - a)
