"""Where to compute: the best places by dynamic programming over one recorded run, without any further call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from .tape import Tape, products_of

RIDGE = 1e-7
LONG = 64
"""Runs of more evaluations are looked at with the last two computed ones instead of three."""

CHUNK = 10_000
NONE = -1


def even(evaluations: int, calls: int, first: int = 1) -> tuple[int, ...]:
    """The first evaluations, and the others at even distances, up to the last one.

    Example:
        >>> from stepcache.tuning.placement import even
        >>> even(10, 4), even(10, 4, 2)
        ((0, 3, 6, 9), (0, 1, 5, 9))
    """
    gap = (evaluations - first) / max(1, calls - first)
    return (*range(first), *(round(first - 1 + gap * (k + 1)) for k in range(calls - first)))


def spread(evaluations: int, calls: int) -> set[tuple[int, ...]]:
    """The first evaluation, and the others at even distances from one to another, for every pair of these.

    Example:
        >>> from stepcache.tuning.placement import spread
        >>> sorted(spread(6, 3))[:3]
        [(0, 1, 3), (0, 1, 4), (0, 1, 5)]
    """
    last = calls - 2  # distances
    return {
        (0, *(round(begin + (end - begin) / last * k) for k in range(calls - 1)))
        for begin in range(1, evaluations - last)
        for end in range(max(begin + last, evaluations // 2), evaluations)
        if last > 0
    }


class Placement:
    """The expected error of every choice of places, from the inner products of a full run's latents and slopes.

    Evaluations i+1 to k-1 between two computed ones move the latent by the sum of h_n d_n. What is predicted for them
    is made of the slopes d_a, d_b, d_i and latents x_a, x_b, x_i of the last computed evaluations, and of the latents
    in between as they are known by then: x_(i+1), and the fresh noise since. The residual of the best weights is the
    error that the gap leaves at k, and

        cost(a, b, i, k) = growth_k^2 min over weights of |sum of h_n d_n - weighted sum|^2

    Costs of the stretches between computed evaluations add up. The state is the last three computed evaluations,
    because a prediction uses three (two in runs of more than `LONG` evaluations, to save time).

    Args:
        full: the tape of the full run.
        growth: growth[n] is the error at the end over the error in the latent at evaluation n; 1 at the end itself.
    """

    def __init__(self, full: Tape, growth: Sequence[float]) -> None:
        self.count = full.evaluations
        self.depth = 3 if self.count <= LONG else 2
        self.growth = torch.tensor(growth, dtype=torch.float64)
        self._h = torch.tensor(full.responses, dtype=torch.float64)
        self._levels = 1 / torch.tensor([full.sigma(n) for n in range(self.count)], dtype=torch.float64)
        rows = [full.latent(n) for n in range(self.count)] + [full.slope(n) for n in range(self.count)]
        self._gram = self._extended(products_of(rows, full.sizes), full)

    def _extended(self, gram: Tensor, full: Tape) -> Tensor:
        """The inner products of latents x, slopes d, and of the vectors made of them: v, sums of z, sums of h_n d_n.

        z_n is the fresh noise in x_n, which a prediction sees there, and v_n = x_n - z_n.
        """
        count = self.count
        h = self._h
        eye, none = torch.eye(count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
        sums = torch.ones(count + 1, count, dtype=torch.float64).tril(-1)
        moved = torch.cat([torch.zeros_like(sums), sums * h], 1)
        noise = torch.cat([eye, none], 1) - torch.cat([eye[:1].expand(count, count), none], 1) - moved[:-1]
        noise = noise * full.noisy
        seen = (sums * (h * self._levels)) @ noise
        basis = torch.cat([torch.eye(2 * count, dtype=torch.float64), torch.cat([eye, none], 1) - noise, seen, moved])
        return basis @ gram @ basis.mT

    @cached_property
    def costs(self) -> dict[tuple[int, ...], float]:
        """cost(..., k) by the last computed evaluations and k; k = count is the end of the run."""
        states = [
            state
            for size in range(1, self.depth + 1)
            for state in combinations(range(self.count), size)
            if size == self.depth or state[0] == 0
        ]
        keys = [(*state, k) for state in states for k in range(state[-1] + 2, self.count + 1)]
        found: dict[tuple[int, ...], float] = {}
        for begin in range(0, len(keys), CHUNK):
            part = keys[begin : begin + CHUNK]
            found |= dict(zip(part, self._costs(part), strict=True))
        return found

    def _costs(self, keys: Sequence[tuple[int, ...]]) -> list[float]:
        count, depth = self.count, self.depth
        states = torch.tensor([(NONE,) * (depth + 1 - len(key)) + key for key in keys])
        computed, begin, end = states[:, :-1], states[:, -2] + 1, states[:, -1]
        own = computed.clamp(min=0)
        v, seen, moved = 2 * count + begin, 3 * count, 4 * count + 1
        rows = torch.cat(
            [own, own + count, torch.stack([v, seen + end, seen + begin, moved + end, moved + begin], 1)], 1
        )
        # The features: latents and slopes of the computed evaluations, the latents in between, and what is sought.
        many = 2 * depth
        parts = torch.zeros(len(keys), many + 2, many + 5, dtype=torch.float64)
        parts[:, range(many), range(many)] = (computed != NONE).double().repeat(1, 2)
        levels = torch.cat([torch.zeros(1, dtype=torch.float64), (self._h * self._levels).cumsum(0)])
        parts[:, many, many] = levels[end] - levels[begin]
        parts[:, many, many + 1 : many + 3] = parts[:, many + 1, many + 3 :] = torch.tensor([1.0, -1.0]).double()
        products = parts @ self._gram[rows[:, :, None], rows[:, None, :]] @ parts.mT
        sizes = products.diagonal(dim1=1, dim2=2).clamp(min=1e-300).sqrt()
        products = products / sizes[:, :, None] / sizes[:, None, :]
        matrix = products[:, :-1, :-1] + RIDGE * torch.eye(many + 1, dtype=torch.float64)
        goals = products[:, :-1, -1]
        explained = (goals * torch.linalg.solve(matrix, goals)).sum(1)
        return ((1 - explained).clamp(min=0) * (sizes[:, -1] * self.growth[end]) ** 2).tolist()

    def cost(self, places: Collection[int]) -> float:
        """The expected squared error of these places, summed over samples, in units of their ranges."""
        ordered = [*sorted(places), self.count]
        return sum(self._step(tuple(ordered[max(0, n - self.depth) : n]), ordered[n]) for n in range(1, len(ordered)))

    def _step(self, state: tuple[int, ...], k: int) -> float:
        return 0.0 if k == state[-1] + 1 else self.costs[(*state, k)]

    def best(self, most: int) -> dict[int, tuple[int, ...]]:
        """The places of least cost for every number of calls up to `most`."""
        layer: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
        found = {}
        for calls in range(1, most + 1):
            ends = ((cost + self._step(state, self.count), places) for state, (cost, places) in layer.items())
            found[calls] = min(ends)[1]
            following: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
            for state, (cost, places) in layer.items():
                for k in range(state[-1] + 1, self.count):
                    key = (*state, k)[-self.depth :]
                    total = cost + self._step(state, k)
                    if key not in following or total < following[key][0]:
                        following[key] = (total, (*places, k))
            layer = following
            if not layer:
                break
        return found
