"""Dynamic programming finds what trying everything finds, and its costs are what least squares says."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from mixture import mixture

from stepcache.tuning.placement import Placement
from stepcache.tuning.trial import Trial

SEEDS = range(3)


@pytest.fixture(scope="module", params=["euler", "euler_ancestral"])
def full(request):
    return Trial().run(mixture(True), request.param, 8, SEEDS).tape


@pytest.fixture
def placement(full):
    return Placement(full, [0.1 * (n + 1) for n in range(9)])


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 7])
def test_no_other_places_cost_less(placement, calls):
    every = [(0, *others) for others in combinations(range(1, 8), calls - 1)]
    assert placement.best(8)[calls] == min(every, key=placement.cost)


def test_computing_everything_costs_nothing(placement):
    assert placement.best(8)[8] == tuple(range(8))
    assert placement.cost(range(8)) == 0


def test_one_more_call_never_costs_more(placement):
    costs = [placement.cost(places) for _, places in sorted(placement.best(8).items())]
    assert costs == sorted(costs, reverse=True)


def test_a_cost_is_what_least_squares_leaves():
    """Euler: between 1 and 4 the latent moves from x_2 to x_4; d_0, d_1, x_0, x_1 and x_2 are known."""
    full = Trial().run(mixture(), "euler", 8, SEEDS).tape
    placement = Placement(full, [1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    size = full.sizes[:, None].double()
    known = [full.slope(0), full.slope(1), full.latent(0), full.latent(1), full.latent(2)]
    matrix = torch.stack([(one.flatten(1).double() / size).flatten() for one in known], 1)
    goal = ((full.latent(4) - full.latent(2)).flatten(1).double() / size).flatten()[:, None]
    left = (goal - matrix @ torch.linalg.lstsq(matrix, goal).solution).square().sum()
    assert placement.costs[(0, 1, 4)] == pytest.approx(0.25 * float(left), rel=0.05)
