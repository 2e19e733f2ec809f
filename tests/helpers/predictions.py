"""What a predictor answers from evaluations worked out by hand."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stepcache.extend import (
    Branch,
    CacheEntry,
    DeferredScalars,
    Position,
    Predictor,
    RunInfo,
)

Place = tuple[int, float]
"""The index of an evaluation and its sigma."""


def predict(
    predictor: Predictor,
    known: Iterable[tuple[Place, Tensor, Tensor]],
    place: Place,
    x: Tensor,
    run: RunInfo | None = None,
) -> Tensor | None:
    """The prediction at a place, from computed evaluations (place, x, out), oldest first, of which it keeps its own."""
    deferred, run = DeferredScalars(), run or RunInfo()
    history: deque[CacheEntry] = deque(maxlen=predictor.history_size)

    def branch(place: Place, x: Tensor) -> Branch:
        return Branch(Position(0, place[0], place[1]), run, x, history, predictor.predict, deferred)

    for at, past, out in known:
        computed = branch(at, past)
        computed.out = out
        predictor.remember(history, computed.entry(past.dtype))
    wide = x if x.dtype == torch.float64 else x.float()
    return branch(place, wide).prediction


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def number(
    predictor: Predictor, known: Sequence[tuple[Place, float]], place: Place, run: RunInfo | None = None
) -> float:
    """The predicted output where every x is 0, so that output and residual are the same."""
    predicted = predict(predictor, [(at, one(0), one(out)) for at, out in known], place, one(0), run)
    return float(predicted)


def walk(outs: Sequence[float], gap: int = 1) -> list[tuple[Place, float]]:
    """Outputs at evaluations `gap` apart; sigma is 2 to the power of minus the evaluation's index."""
    return [((gap * i, 2.0 ** -(gap * i)), out) for i, out in enumerate(outs)]


def smooth(count: int, shape: tuple[int, ...]) -> list[tuple[Place, Tensor, Tensor]]:
    """Computed evaluations of a smooth network, the indices two apart, sigma falling unevenly; and the next one."""
    torch.manual_seed(1)
    a, b, c = torch.randn(3, *shape, dtype=torch.float64)
    known = []
    for i in range(count):
        s = 8.0 * 0.7**i + 0.1
        known.append(((2 * i, s), (a * s + b).float(), (a * math.sin(s / 5) + b * math.exp(-s / 9) + c).float()))
    return known
