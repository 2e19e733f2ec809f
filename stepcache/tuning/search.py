"""The search: which choice to try next, from the places of least expected error on."""

from __future__ import annotations

import statistics
from collections.abc import Container, Iterator, Sequence
from itertools import islice, pairwise

from .choice import Choice, Found, Places, Rule
from .placement import even, spread
from .study import Study

ROUND = 8
"""So many trials are made before the best of them is taken: independent of each other, so that workers can share."""

PATIENCE = 0.1
"""The penalty of a round without success, as a share of the best score minus the median one."""

QUIET = 12
"""After so many rounds without a better choice the search ends."""

RULES: tuple[Rule, ...] = ((1, 0.25), (2, 0.25), (1, 0.0), (2, 0.0), (0, 0.0), (0, 0.25))
"""Order and share of the denoised image that even places are tried with, beside fitted predictions."""

SPREAD = 6
"""So many places at even distances inside the run are begun with."""

STRENGTHS = 0.7, 1.4
"""The factors that are tried on how far a gap's last prediction returns to the full run."""


class Search:
    """Searches the best choice for a number of calls.

    Attributes:
        study: where choices are tried.
        budget: the most that may be spent, in full runs of the calibration seeds.
    """

    def __init__(self, study: Study, budget: float) -> None:
        self.study, self.budget = study, budget

    def starts(self, calls: int) -> list[Choice]:
        """Where a search begins, with fitted predictions but for the last ones: even places with every rule.

        First the places of least expected error, then even ones, then those of least expected error among places at
        even distances from one evaluation to another: the best ones are often of that kind.
        """
        count, cost = self.study.full.evaluations, self.study.placement.cost
        evens = [even(count, calls, first) for first in (1, 2) if first == 1 or first < calls]
        inside = sorted(spread(count, calls), key=lambda places: (cost(places), places))[:SPREAD]
        fitted = [self.study.placement.best(calls)[calls], *evens, *inside]
        rules = [Choice(places, rule) for rule in RULES for places in evens]
        return list(dict.fromkeys([*map(Choice, fitted), *rules]))

    def climb(self, starts: Sequence[Choice], budget: float | None = None, enough: float | None = None) -> Found:
        """The best choice that trials find from these on, until the budget ends or the mean is `enough`.

        Each round tries neighbours of one choice with fitted predictions, usually the best so far. Each round that
        finds nothing better lowers the rank of its choice, so that the search moves on to another one. It ends after
        `QUIET` such rounds in a row. Choices with a rule are starts alone: around them it would only get stuck.
        """
        cost = len(starts[0].places) / self.study.full.evaluations  # of one trial, at most
        limit = self.budget - 1 - 5 * cost  # the held-out seeds are measured afterwards
        begun = self.study.begun(starts[0])
        limit = limit if budget is None else min(limit, begun + budget)
        left = limit - begun
        first = [starts[0], *self._affordable(starts[1:], int(left / cost / 3))]
        known = {found.choice: found for found in self.study.scored(first)}
        best = max(known.values(), key=lambda found: found.score)
        rounds, quiet = {choice: self._rounds(choice, known) for choice in known if choice.rule is None}, 0
        tried = dict.fromkeys(known, 0)
        last, limit = limit, limit - left / 6  # what is left after the rounds is for the strengths
        while quiet < QUIET and rounds and (enough is None or best.mean < enough):
            step = PATIENCE * (best.score - statistics.median(found.score for found in known.values()))
            around = max(rounds, key=lambda choice: (known[choice].score - step * tried[choice], choice.name))
            tried[around] += 1
            chunk = [choice for choice in next(rounds[around], ()) if choice not in known]
            chunk = self._affordable(chunk, int((limit - self.study.spent) / cost))
            if not chunk:
                del rounds[around]
                continue
            for found in self.study.scored(chunk, around):
                known[found.choice], tried[found.choice] = found, 0
                rounds[found.choice] = self._rounds(found.choice, known)
            top: Found = max((known[choice] for choice in chunk), key=lambda found: found.score)
            quiet = 0 if top.score > best.score else quiet + 1
            best = max(best, top, key=lambda found: found.score)
            self.study.say(f"{len(best.places)} calls: {best.mean:.2f}")
        return best if best.choice.rule or (enough is not None and best.mean >= enough) else self._refined(best, last)

    def _refined(self, best: Found, limit: float) -> Found:
        """The same places with other strengths of the return to the full run, gap by gap."""
        cost = len(best.places) / self.study.full.evaluations
        for begin, end in pairwise([*best.places, self.study.full.evaluations]):
            gap = range(begin + 1, end)
            known = dict(best.choice.returns)
            others = [known | {gap[-1]: strength} for strength in STRENGTHS] if gap else []
            others += [known | dict.fromkeys(gap[:-1], 0.0)] if len(gap) > 1 else []
            choices = [best.choice._replace(returns=tuple(sorted(one.items()))) for one in others]
            choices = self._affordable(choices, int((limit - self.study.spent) / cost))
            if choices:
                best = max(best, *self.study.scored(choices, best.choice), key=lambda found: found.score)
                self.study.say(f"{len(best.places)} calls: {best.mean:.2f}")
        return best

    def _affordable(self, choices: Sequence[Choice], trials: int) -> list[Choice]:
        """Those that so many trials are enough for; what the notebook knows needs none."""
        new = self.study.unknown(choices)
        return [choice for choice in choices if choice not in new[max(0, trials) :]]

    def _rounds(self, choice: Choice, known: Container[Choice]) -> Iterator[list[Choice]]:
        """The trials around one choice, the most promising first."""
        near = (Choice(places, choice.rule) for places in self._moves(choice.places))
        moves = (move for move in near if move not in known)
        while chunk := list(islice(moves, ROUND)):
            yield chunk

    def _moves(self, places: Places) -> Iterator[Places]:
        """Places that differ in one, or in two neighbours moved together; the most promising first."""
        count, chosen = self.study.full.evaluations, set(places)
        free = [n for n in range(1, count) if n not in chosen]
        moved = {tuple(sorted(chosen - {old} | {new})) for old in places[1:] for new in free}
        for a, b in pairwise(places[1:]):
            for step in (-1, 1):
                pair = chosen - {a, b} | {a + step, b + step}
                if len(pair) == len(places) and 0 in pair and max(pair) < count:
                    moved.add(tuple(sorted(pair)))
        yield from sorted(moved - {places}, key=lambda one: (self.study.placement.cost(one), one))
