"""A trial: one run that computes some evaluations, and chooses during the run how to predict the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepcache.bench.subjects import Subject
from stepcache.branch import Branch
from stepcache.clock import Position, near
from stepcache.criteria.base import Criterion
from stepcache.fingerprint import Fingerprint
from stepcache.gates.base import Gate, GateCheck
from stepcache.methods import Method
from stepcache.plan import ComputeReason, Verdict
from stepcache.predictors.base import Predictor
from stepcache.predictors.profiled import output, scale
from stepcache.profile import HISTORY, Prediction
from stepcache.run_info import RunInfo, SkipCounts

from .tape import Seen, Tape, products_of

if TYPE_CHECKING:
    from typing_extensions import Self

SHARES = 0.0, 0.25, 0.5, 0.8, 1.0
"""The shares of the denoised image that are tried."""

RIDGE = 1e-4
"""How strongly learned weights are pulled to those of the best order, relative to each one's own curvature."""

COMPUTE = ComputeReason("tune")


@dataclass(frozen=True)
class Recording:
    """What is kept of a trial: its tape, and how each skipped evaluation was predicted."""

    tape: Tape
    chosen: Mapping[int, Prediction]


class Trial:
    """One run of the calibration seeds, whose predictions are fitted while it goes on.

    At a skipped evaluation the derivative d is chosen so that the latent comes back to the full run's x*:

        d = d* + k (x - x*) / s,   k = s / -h at the last skipped evaluation before a computed one, else 1

    h is how far the sampler moves the latent along d (`Tape.responses`): with this k the next evaluation is at x*.
    Order and share that come nearest to it in least squares are taken; if `learn`, weights by ridge regression around
    them. That needs the full run's tape and no further call. A fit to the network's own output here costs calls and is
    worse: least squares makes every prediction a little too small, and over a gap that adds up.

    Args:
        full: the tape of the full run; None: this is the full run, and everything is computed.
        places: the evaluations that are computed.
        learn: whether weights are learned.
        prefix, since: another trial, or its recording. Evaluations before `since` are answered from its tape, without
            calls.
        rule: order and share of every prediction; None: they are fitted.
        returns: factors on k, by evaluation.
    """

    def __init__(
        self,
        full: Tape | None = None,
        places: Collection[int] = (),
        learn: bool = True,
        prefix: Recording | Trial | None = None,
        since: int = 0,
        rule: tuple[int, float] | None = None,
        returns: Mapping[int, float] | None = None,
    ) -> None:
        self.full, self.places, self.learn = full, frozenset(places), learn
        self.prefix, self.since = prefix, since if prefix is not None else 0
        self.rule, self.returns = rule, returns or {}
        self.tape = Tape()
        self.chosen: dict[int, Prediction] = {}
        if prefix is not None:
            self.chosen = {n: how for n, how in prefix.chosen.items() if n < since}

    def run(self, subject: Subject, sampler: str, steps: int, seeds: Sequence[int]) -> Trial:
        """Samples; the tape is then full."""
        method = Method(criterion=_Watch(self), predictor=_Answer(self), gates=(_Compute(self),), name="tune")
        result = subject.sample(sampler, steps, method, seeds)
        self.tape.images, self.tape.calls = result.images, result.calls
        return self

    def computes(self, evaluation: int) -> bool:
        """Whether the network is called at an evaluation."""
        return evaluation >= self.since and (self.full is None or evaluation in self.places)

    def predict(self, branch: Branch) -> Tensor | None:
        """The network's output for one branch, from the prefix or predicted; None at a computed evaluation."""
        n = branch.position.evaluation
        if self.computes(n):
            return None
        if n < self.since and self.prefix is not None:
            known = self.prefix.tape.seen[n].derivatives[branch.name]
            self.tape.note(branch, known)
            return output(branch.x, known, branch.parametrization)
        history = self._history(n)
        s, c = scale(branch.parametrization)
        x = branch.x * c
        if n not in self.chosen:
            self.chosen[n] = self._choose(n, x, s, branch.index, history)
        how = self.chosen[n]
        weights = zip(how.derivative, how.denoised, strict=True) if how.evaluations else self._plain(how, n, branch)
        d = torch.zeros_like(x)
        used = history[-len(how.evaluations) :] if how.evaluations else history
        for seen, (a, b) in zip(used, weights, strict=True):
            own = seen.derivatives[branch.name]
            d.add_(own, alpha=a + b * seen.s / s).add_(x - seen.x, alpha=b / s)
        self.tape.note(branch, d)
        return output(branch.x, d, branch.parametrization)

    def _plain(self, how: Prediction, n: int, branch: Branch) -> list[tuple[float, float]]:
        history = self._history(n)
        weights = polynomial(branch.index, history, min(how.order, len(history) - 1))
        return [((1 - how.share) * w, how.share * w) for w in weights]

    def _history(self, n: int) -> list[Seen]:
        """The last computed evaluations before n, of several at one sigma the newest."""
        kept: list[Seen] = []
        for seen in self.tape.seen[:n]:
            if seen.position.evaluation in self.places:
                kept = [old for old in kept if not near(old.position.sigma, seen.position.sigma)] + [seen]
        return kept[-HISTORY:]

    def _choose(self, n: int, x: Tensor, s: float, index: float | None, history: list[Seen]) -> Prediction:
        full = self.full
        if full is None:
            raise RuntimeError("a full run predicts nothing")
        if self.rule is not None:
            return Prediction(*self.rule)
        guidance, goal = full.guidance, full.seen[n]
        target = goal.guided(guidance) + self._return(n, s) / s * (x - goal.x)
        own = [seen.guided(guidance) for seen in history]
        images = [(x - seen.x + seen.s * d) / s for seen, d in zip(history, own, strict=True)]
        gram = products_of([*own, *images, target], full.sizes)
        products, goals = gram[:-1, :-1], gram[:-1, -1]
        tried = []
        for order in range(len(history)):
            line = torch.tensor(polynomial(index, history, order), dtype=torch.float64)
            for share in SHARES:
                weights = torch.cat([(1 - share) * line, share * line])
                tried.append((float(weights @ products @ weights - 2 * weights @ goals), order, share, weights))
        _, order, share, weights = min(tried, key=lambda one: one[0])
        if not self.learn:
            return Prediction(order, share)
        curvature = products + RIDGE * torch.diag(products.diagonal())
        weights = weights + torch.linalg.lstsq(curvature, (goals - products @ weights)[:, None]).solution[:, 0]
        a, b = weights.tolist()[: len(history)], weights.tolist()[len(history) :]
        evaluations = tuple(seen.position.evaluation for seen in history)
        return Prediction(order, share, evaluations, tuple(a), tuple(b))

    def _return(self, n: int, s: float) -> float:
        """k: how much of the way back to the full run is asked for."""
        full, factor = self.full, self.returns.get(n, 1.0)
        if full is None or (n + 1 not in self.places and n + 1 < full.evaluations):
            return factor
        sigma, h = full.sigma(n), full.responses[n]
        k = sigma / -h if 0.02 * sigma < -h <= sigma else 1.0
        return factor * ((k - s) / (1 - s) if full.scaled else k)


def polynomial(index: float | None, history: Sequence[Seen], order: int) -> list[float]:
    """The weight of each of these evaluations in the polynomial of this order, as `adaptive_order.lagrange` has it."""
    nodes = [seen.index for seen in history][-1 - order :]
    if index is None or None in nodes:
        nodes = nodes[-1:]
    weights = [0.0] * (len(history) - len(nodes))
    for k, node in enumerate(nodes):
        weight = 1.0
        for m, other in enumerate(nodes):
            if m != k:
                weight *= (index - other) / (node - other)  # type: ignore[operator]
        weights.append(weight)
    return weights


class _Watch(Criterion):
    """Skips what the gate lets through, and puts what was computed on the tape."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def begin(self, run: RunInfo) -> Self:
        return self  # one trial is one run

    def decide(self, branch: Branch) -> Verdict:
        return Verdict(True)

    def update_any(self, name: str, branch: Branch) -> None:
        self.trial.tape.note(branch)


class _Answer(Predictor):
    finite_if_cache_is = True
    parametrized = True
    needs_history = False

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def predict(self, branch: Branch) -> Tensor | None:
        return self.trial.predict(branch)


class _Compute(Gate):
    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def begin(self, run: RunInfo) -> GateCheck:
        model = None if run.network is None else Fingerprint.of(run.network)
        self.trial.tape = Tape(schedule=run.schedule or (), model=model)

        def answer(position: Position, counts: SkipCounts) -> ComputeReason | None:
            return COMPUTE if self.trial.computes(position.evaluation) else None

        return answer
