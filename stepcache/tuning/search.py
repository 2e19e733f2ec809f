"""The search: a recorded run, the growth of errors, the best places by dynamic programming, and trials around them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from torch import Tensor

from stepcache.bench.metrics import Metric
from stepcache.bench.subjects import Subject
from stepcache.options import OptionError
from stepcache.profile import Prediction

from .notebook import Notebook
from .placement import Placement
from .tape import Tape
from .trial import Trial

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
        full: the tape of the full run.
        spent: network calls so far, in full runs of the calibration seeds.
        budget: the most that may be spent.
    """

    def __init__(
        self,
        subject: Subject,
        sampler: str,
        steps: int,
        seeds: Sequence[int],
        metric: Metric,
        budget: float,
        notebook: Notebook,
        say: Callable[[str, float], None] = lambda sentence, spent: None,
        learn: bool = True,
    ) -> None:
        self.subject, self.sampler, self.steps, self.seeds = subject, sampler, steps, tuple(seeds)
        self.metric, self.budget, self.notebook, self.say, self.learn = metric, budget, notebook, say, learn
        self.spent = float(notebook.get("spent") or 0.0)
        self._trials: dict[Places, Trial] = {}
        self.full: Tape = self.run(Trial()).tape
        self._refuse_another_model()
        self.placement = Placement(self.full, self._growth())

    def run(self, trial: Trial) -> Trial:
        """Runs a trial on the calibration seeds and counts its calls."""
        trial.run(self.subject, self.sampler, self.steps, self.seeds)
        self.spent += trial.tape.calls / trial.tape.evaluations
        self.notebook.add("spent", self.spent)
        return trial

    def spend(self, calls: float) -> None:
        """Counts calls of the calibration batch."""
        self.spent += calls / self.full.evaluations
        self.notebook.add("spent", self.spent)

    def orders_alone(self, places: Places) -> dict[int, Prediction]:
        """How the other evaluations are predicted without learned weights."""
        return self.run(Trial(self.full, places, learn=False)).chosen

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
        full = Trial()
        full.tape = self.full
        growth: dict[int, float] = {count: 1.0}
        for n in range(1, count - 1, 1 if count <= FINE else 2):
            self.say(f"growth of an error at evaluation {n + 1} of {count}", self.spent)
            tape = self.run(Trial(self.full, {*range(count)} - {n}, False, full, n)).tape
            made, left = (self._distance(tape, place) for place in (n + 1, count))
            if bool((made > 0).all() and (left > 0).all()):
                growth[n + 1] = float((left / made).log().mean().exp())
        found = [_between(growth, n) for n in range(count + 1)]
        self.notebook.add("growth", found)
        return found

    def _distance(self, tape: Tape, n: int) -> Tensor:
        """How far a run's latent is from the full run's at evaluation n (B,)."""
        tape.guidance, tape.scaled = self.full.guidance, self.full.scaled
        return (tape.latent(n) - self.full.latent(n)).flatten(1).norm(dim=1)

    def score(self, places: Places, around: Found | None = None) -> Found:
        """A trial of these places, or what the notebook knows of them.

        The beginning that these places share with those of `around` is answered from its tape.
        """
        name = ",".join(map(str, places))
        if known := self.notebook.get(name):
            predictions = {int(n): Prediction.read(n, how) for n, how in known["skipped"].items()}
            return Found(places, known["mean"], known["score"], predictions)
        trial = Trial(self.full, places, self.learn)
        if around is not None and (since := min({*places} ^ {*around.places}) - 1) > 0:
            trial = Trial(self.full, places, self.learn, self._trial(around.places), since)
        self._trials[places] = self.run(trial)
        scores = [float(score) for score in self.metric(trial.tape.images, self.full.images, self.seeds)]
        mean = statistics.fmean(scores)
        found = Found(places, mean, mean - statistics.pstdev(scores) / 2, dict(trial.chosen))
        skipped = {n: how.written() for n, how in found.predictions.items()}
        self.notebook.add(name, {"mean": mean, "score": found.score, "skipped": skipped})
        return found

    def _trial(self, places: Places) -> Trial:
        """The trial of these places; run once more if its tape was not kept."""
        if places not in self._trials:
            self._trials[places] = self.run(Trial(self.full, places, self.learn))
        return self._trials[places]

    def climb(self, start: Places, budget: float | None = None, enough: float | None = None) -> Found:
        """The best places that trials find from these on, until the budget ends or the mean is `enough`.

        Each round tries neighbours of one choice, usually the best so far. Each round that finds nothing better lowers
        the rank of its choice, so that the search moves on to another one. It ends after `QUIET` such rounds in a row.
        """
        cost = len(start) / self.full.evaluations  # of one trial, at most
        limit = self.budget - 1 - 4 * cost  # the held-out seeds are measured afterwards
        limit = limit if budget is None else min(limit, self.spent + budget)
        best = self.score(start)
        known, rounds, quiet = {start: best}, {start: self._rounds(start, {start})}, 0
        tried = {start: 0}
        while self.spent + cost <= limit and quiet < QUIET and rounds and (enough is None or best.mean < enough):
            step = PATIENCE * (best.score - statistics.median(found.score for found in known.values()))
            around = known[max(rounds, key=lambda places: (known[places].score - step * tried[places], places))]
            tried[around.places] += 1
            chunk = [places for places in next(rounds[around.places], ()) if places not in known]
            chunk = chunk[: int((limit - self.spent) / cost)]
            if not chunk:
                del rounds[around.places]
                continue
            self._trials = {places: trial for places, trial in self._trials.items() if places == around.places}
            for places in chunk:
                known[places], tried[places] = self.score(places, around), 0
                rounds[places] = self._rounds(places, known)
            top = max((known[places] for places in chunk), key=lambda found: found.score)
            quiet = 0 if top.score > best.score else quiet + 1
            best = max(best, top, key=lambda found: found.score)
            self.say(f"{len(start)} calls: {best.mean:.2f}", self.spent)
        return best

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


def _between(known: dict[int, float], n: int) -> float:
    """The value at n, on the line between its neighbours."""
    below, above = [k for k in known if k <= n], [k for k in known if k >= n]
    if not below or not above:
        return known[min(known) if not below else max(known)]
    a, b = max(below), min(above)
    return known[a] if a == b else known[a] + (known[b] - known[a]) * (n - a) / (b - a)
