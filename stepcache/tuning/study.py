"""The calibration: what trials show, and what they cost in network calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stepcache.bench.metrics import Metric
from stepcache.options import OptionError
from stepcache.profile import Prediction

from .choice import Choice, Found, Places
from .notebook import Notebook
from .placement import Placement
from .tape import Tape
from .team import Job, Outcome, Team

FINE = 30
"""Up to so many evaluations the growth is measured at each, beyond at every second."""


class Study:
    """Runs trials on the calibration seeds, counts their calls, and keeps what they show.

    Attributes:
        team: who runs trials.
        full: the tape of the full run.
        placement: the expected error of every choice of places.
        spent: network calls so far, in full runs of the calibration seeds.
    """

    def __init__(
        self,
        team: Team,
        full: Tape,
        sampler: str,
        steps: int,
        seeds: Sequence[int],
        metric: Metric,
        notebook: Notebook,
        say: Callable[[str, float], None] = lambda sentence, spent: None,
    ) -> None:
        self.team, self.full, self.sampler, self.steps, self.seeds = team, full, sampler, steps, tuple(seeds)
        self.metric, self.notebook, self._say = metric, notebook, say
        self.spent = float(notebook.get("spent") or 0.0)
        self._recordings: dict[Choice, Any] = {}
        self._found: dict[Choice, Found] = {}
        self.spend(full.calls)
        self._refuse_another_model()
        self.placement = Placement(full, self._growth())

    def say(self, sentence: str) -> None:
        """Shows progress."""
        self._say(sentence, self.spent)

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
            self.say(f"growth of an error at evaluation {n + 1} of {count}")
            if grown is not None:
                growth[n + 1] = grown
        found = [_between(growth, n) for n in range(count + 1)]
        self.notebook.add("growth", found)
        return found

    def score(self, choice: Choice) -> Found:
        """A trial of this choice, or what the notebook knows of it."""
        return self.scored([choice])[0]

    def _job(self, choice: Choice, around: Choice | None = None) -> Job:
        """The trial. What it shares with the one `around` is answered from that one's recording."""
        since = 0 if around is None else choice.since(around)
        prefix = self._recording(around) if around is not None and since > 0 else None
        return Job(choice.places, True, prefix, since, choice.rule, dict(choice.returns))

    def scored(self, choices: Sequence[Choice], around: Choice | None = None) -> list[Found]:
        """Trials of each of these, or what the notebook knows of them; other recordings than `around`'s are dropped."""
        if around is not None:
            self._recordings = {around: self._recordings[around]} if around in self._recordings else {}
        found = self._found
        new = self.unknown(choices)
        jobs = [self._job(choice, around) for choice in new]
        for choice, (outcome, recording) in zip(new, self._tried(jobs), strict=True):
            self._recordings[choice] = recording
            mean = statistics.fmean(outcome.scores)
            skipped = {n: how.written() for n, how in outcome.chosen.items()}
            score = mean - statistics.pstdev(outcome.scores) / 2
            self.notebook.add(choice.name, {"mean": mean, "score": score, "skipped": skipped})
            found[choice] = Found(choice, mean, score, outcome.chosen)
        found |= {choice: self._known(choice) for choice in choices if choice not in found}
        return [found[choice] for choice in choices]

    def best_rule(self, calls: int) -> Found | None:
        """The best choice of so many calls that has a rule; None if none was tried."""
        known = [one for one in self._found.values() if one.choice.rule and len(one.places) == calls]
        return max(known, key=lambda found: found.score, default=None)

    def unknown(self, choices: Sequence[Choice]) -> list[Choice]:
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

    def begun(self, start: Choice) -> float:
        """What was spent when the search from this start began, before it was stopped and resumed."""
        name = f"begun {start.name}"
        if self.notebook.get(name) is None:
            self.notebook.add(name, self.spent)
        return float(self.notebook.get(name))


def _between(known: dict[int, float], n: int) -> float:
    """The value at n, on the line between its neighbours."""
    below, above = [k for k in known if k <= n], [k for k in known if k >= n]
    if not below or not above:
        return known[min(known) if not below else max(known)]
    a, b = max(below), min(above)
    return known[a] if a == b else known[a] + (known[b] - known[a]) * (n - a) / (b - a)
