"""The search: a recorded run, the growth of errors, the best places by dynamic programming, and trials around them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

from stepcache.bench.metrics import Metric
from stepcache.options import OptionError
from stepcache.profile import Prediction

from .notebook import Notebook
from .placement import Placement, even
from .tape import Tape
from .team import Job, Outcome, Team

Places = tuple[int, ...]
Rule = tuple[int, float]

ROUND = 8
"""So many trials are made before the best of them is taken: independent of each other, so that workers can share."""

PATIENCE = 0.1
"""The penalty of a round without success, as a share of the best score minus the median one."""

QUIET = 12
"""After so many rounds without a better choice the search ends."""

FINE = 30
"""Up to so many evaluations the growth is measured at each, beyond at every second."""


RULES: tuple[Rule, ...] = ((1, 0.25), (2, 0.25), (1, 0.0), (2, 0.0), (0, 0.0), (0, 0.25))
"""Order and share of the denoised image that even places are tried with, beside fitted predictions."""

STRENGTHS = 0.7, 1.4
"""The factors that are tried on how far a gap's last prediction returns to the full run."""


class Choice(NamedTuple):
    """What a trial tries.

    Attributes:
        places: the evaluations that are computed.
        rule: order and share of every prediction; None: each is fitted.
        returns: factors on how far predictions return to the full run, by evaluation; 1 if not named.
    """

    places: Places
    rule: Rule | None = None
    returns: tuple[tuple[int, float], ...] = ()

    @property
    def name(self) -> str:
        """Of its finding in the notebook."""
        rule = "" if self.rule is None else " order {} share {}".format(*self.rule)
        return ",".join(map(str, self.places)) + rule + "".join(f" return {n} {f:g}" for n, f in self.returns)

    def since(self, other: Choice) -> int:
        """Evaluations before this one are the same in both."""
        if self.rule != other.rule:
            return 0
        moved = [n - 1 for n in {*self.places} ^ {*other.places}]
        return min([*moved, *(n for n, _ in {*self.returns} ^ {*other.returns})])


@dataclass(frozen=True)
class Found:
    """One choice, and what came of it on the calibration seeds.

    Attributes:
        choice: what was tried.
        mean: of the metric.
        score: mean - standard deviation / 2, by which choices are compared. The places of the highest mean are too
            often those that happen to suit a few of the seeds.
        predictions: how the other evaluations are predicted.
    """

    choice: Choice
    mean: float
    score: float
    predictions: dict[int, Prediction]

    @property
    def places(self) -> Places:
        """The evaluations that are computed."""
        return self.choice.places


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
        self._recordings: dict[Choice, Any] = {}
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

    def score(self, choice: Choice) -> Found:
        """A trial of this choice, or what the notebook knows of it."""
        return self._scored([choice])[0]

    def _job(self, choice: Choice, around: Choice | None = None) -> Job:
        """The trial. What it shares with the one `around` is answered from that one's recording."""
        since = 0 if around is None else choice.since(around)
        prefix = self._recording(around) if around is not None and since > 0 else None
        return Job(choice.places, self.learn, prefix, since, choice.rule, dict(choice.returns))

    def _scored(self, choices: Sequence[Choice], around: Choice | None = None) -> list[Found]:
        """Trials of each of these, or what the notebook knows of them."""
        found: dict[Choice, Found] = {}
        new = self._unknown(choices)
        jobs = [self._job(choice, around) for choice in new]
        for choice, (outcome, recording) in zip(new, self._tried(jobs), strict=True):
            self._recordings[choice] = recording
            mean = statistics.fmean(outcome.scores)
            skipped = {n: how.written() for n, how in outcome.chosen.items()}
            score = mean - statistics.pstdev(outcome.scores) / 2
            self.notebook.add(choice.name, {"mean": mean, "score": score, "skipped": skipped})
            found[choice] = Found(choice, mean, score, outcome.chosen)
        return [found.get(choice) or self._known(choice) for choice in choices]

    def _unknown(self, choices: Sequence[Choice]) -> list[Choice]:
        """Those that the notebook does not know."""
        return [choice for choice in choices if self.notebook.get(choice.name) is None]

    def _known(self, choice: Choice) -> Found:
        """What the notebook knows of it."""
        known = self.notebook.get(choice.name)
        predictions = {int(n): Prediction.read(n, how) for n, how in known["skipped"].items()}
        return Found(choice, known["mean"], known["score"], predictions)

    def _recording(self, choice: Choice) -> Any:
        """Its recording; made once more if it was not kept."""
        if choice not in self._recordings:
            ((_, self._recordings[choice]),) = self._tried([self._job(choice)])
        return self._recordings[choice]

    def starts(self, calls: int) -> list[Choice]:
        """Where a search begins: the places of least expected error, and even ones, fitted and with every rule."""
        evens = [even(self.full.evaluations, calls, first) for first in (1, 2) if first == 1 or first < calls]
        rules = [Choice(places, rule) for rule in RULES for places in evens]
        return list(dict.fromkeys([Choice(self.placement.best(calls)[calls]), *map(Choice, evens), *rules]))

    def climb(self, starts: Sequence[Choice], budget: float | None = None, enough: float | None = None) -> Found:
        """The best choice that trials find from these on, until the budget ends or the mean is `enough`.

        Each round tries neighbours of one choice, usually the best so far. Each round that finds nothing better lowers
        the rank of its choice, so that the search moves on to another one. It ends after `QUIET` such rounds in a row.
        """
        cost = len(starts[0].places) / self.full.evaluations  # of one trial, at most
        limit = self.budget - 1 - 4 * cost  # the held-out seeds are measured afterwards
        begun = self._begun(starts[0])
        limit = limit if budget is None else min(limit, begun + budget)
        left = limit - begun
        first = [starts[0], *self._affordable(starts[1:], int(left / cost / 3))]
        known = {found.choice: found for found in self._scored(first)}
        best = max(known.values(), key=lambda found: found.score)
        rounds, quiet = {choice: self._rounds(choice, known) for choice in known}, 0
        tried = dict.fromkeys(known, 0)
        last, limit = limit, limit - left / 6  # what is left after the rounds is for the strengths
        while quiet < QUIET and rounds and (enough is None or best.mean < enough):
            step = PATIENCE * (best.score - statistics.median(found.score for found in known.values()))
            around = max(rounds, key=lambda choice: (known[choice].score - step * tried[choice], choice.name))
            tried[around] += 1
            chunk = [choice for choice in next(rounds[around], ()) if choice not in known]
            chunk = self._affordable(chunk, int((limit - self.spent) / cost))
            if not chunk:
                del rounds[around]
                continue
            self._recordings = {around: self._recordings[around]} if around in self._recordings else {}
            for found in self._scored(chunk, around):
                known[found.choice], tried[found.choice] = found, 0
                rounds[found.choice] = self._rounds(found.choice, known)
            top: Found = max((known[choice] for choice in chunk), key=lambda found: found.score)
            quiet = 0 if top.score > best.score else quiet + 1
            best = max(best, top, key=lambda found: found.score)
            self.say(f"{len(best.places)} calls: {best.mean:.2f}", self.spent)
        return best if best.choice.rule or (enough is not None and best.mean >= enough) else self._refined(best, last)

    def _begun(self, start: Choice) -> float:
        """What was spent when the search from this start began, before it was stopped and resumed."""
        name = f"begun {start.name}"
        if self.notebook.get(name) is None:
            self.notebook.add(name, self.spent)
        return float(self.notebook.get(name))

    def _refined(self, best: Found, limit: float) -> Found:
        """The same places with other strengths of the return to the full run, gap by gap."""
        cost = len(best.places) / self.full.evaluations
        for begin, end in pairwise([*best.places, self.full.evaluations]):
            gap = range(begin + 1, end)
            known = dict(best.choice.returns)
            others = [known | {gap[-1]: strength} for strength in STRENGTHS] if gap else []
            others += [known | dict.fromkeys(gap[:-1], 0.0)] if len(gap) > 1 else []
            choices = [best.choice._replace(returns=tuple(sorted(one.items()))) for one in others]
            choices = self._affordable(choices, int((limit - self.spent) / cost))
            if choices:
                best = max(best, *self._scored(choices, best.choice), key=lambda found: found.score)
                self.say(f"{len(best.places)} calls: {best.mean:.2f}", self.spent)
        return best

    def _affordable(self, choices: Sequence[Choice], trials: int) -> list[Choice]:
        """Those that so many trials are enough for; what the notebook knows needs none."""
        new = self._unknown(choices)
        return [choice for choice in choices if choice not in new[max(0, trials) :]]

    def _rounds(self, choice: Choice, known: Container[Choice]) -> Iterator[list[Choice]]:
        """The trials around one choice, the most promising first."""
        near = (Choice(places, choice.rule) for places in self._moves(choice.places))
        moves = (move for move in near if move not in known)
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
