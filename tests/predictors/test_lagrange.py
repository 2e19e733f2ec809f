"""Lagrange: polynomials are reproduced, in log sigma and in a run's own coordinate."""

from __future__ import annotations

import math

import pytest
import torch
from predictions import number, predict, walk
from torch import Tensor
from toys import cached, decisions, drive, heun

from stepcache import Method
from stepcache.extend import (
    Lagrange,
    Reuse,
    RunInfo,
)


@pytest.mark.parametrize("baseline", ["input", "zero"])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_lagrange_reproduces_a_polynomial_in_log_sigma_of_its_order(order, baseline):
    """Unequal gaps; x moves at random, which the residual carries over and the output leaves out."""
    torch.manual_seed(order)
    coefficients = torch.randn(order + 1, 2, 3, 4, dtype=torch.float64)
    x = torch.randn(7, 2, 3, 4, dtype=torch.float64)
    sigmas = [14.6, 9.0, 7.7, 3.1, 2.9, 0.8, 0.3]

    def out(i: int) -> Tensor:
        polynomial = sum(c * math.log(sigmas[i]) ** k for k, c in enumerate(coefficients))
        return polynomial + x[i] if baseline == "input" else polynomial

    known = [((i, sigmas[i]), x[i], out(i)) for i in range(6)]
    predicted = predict(Lagrange(order, baseline), known, (6, sigmas[6]), x[6])
    torch.testing.assert_close(predicted, out(6), rtol=1e-9, atol=1e-9)


def test_lagrange_reproduces_a_polynomial_in_the_runs_own_coordinate():
    """t^2 - t at t = 0.9, 0.7, 0.4 goes on to 0.04 - 0.2 at 0.2, in t; in log t it does not."""
    known = [((i, t), t * t - t) for i, t in enumerate((0.9, 0.7, 0.4))]
    assert number(Lagrange(2), known, (3, 0.2), RunInfo(coordinate=float)) == pytest.approx(-0.16)
    assert number(Lagrange(2), known, (3, 0.2)) != pytest.approx(-0.16, rel=0.01)


def test_lagrange_of_order_0_is_reuse_to_the_last_bit():
    torch.manual_seed(0)
    x, past, out = torch.randn(3, 4, 5, 6)
    known = [((0, 3.0), past, out)]
    assert torch.equal(predict(Lagrange(0), known, (1, 2.0), x), predict(Reuse(), known, (1, 2.0), x))
    assert torch.equal(predict(Lagrange(2), known, (1, 2.0), x), predict(Reuse(), known, (1, 2.0), x))


def test_lagrange_takes_a_lower_order_while_little_is_known():
    """Octaves: after 5: 5. After 5, 7: 9. After 5, 7, 10: 14, the second difference being 1."""
    assert number(Lagrange(2), walk([5]), (1, 0.5)) == 5
    assert number(Lagrange(2), walk([5, 7]), (2, 0.25)) == pytest.approx(9)
    assert number(Lagrange(2), walk([5, 7, 10]), (3, 0.125)) == pytest.approx(14)
    assert number(Lagrange(2), walk([5, 7, 10]), (4, 0.0625)) == pytest.approx(19)


def test_lagrange_keeps_the_newest_of_equal_sigmas_and_all_of_its_order():
    """Heun asks twice at 0.5 and at 0.25; float32 rounding does not make one sigma two."""
    places = [(0, 1.0), (1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25 * (1 + 1e-7))]
    known = list(zip(places, [5, 100, 7, 100, 10], strict=True))
    assert number(Lagrange(2), known, (5, 0.125)) == pytest.approx(14, rel=1e-5)


def test_lagrange_at_a_sigma_it_knows_returns_what_was_computed_there():
    assert number(Lagrange(2), walk([5, 7, 10]), (3, 0.25)) == 10


def test_lagrange_survives_a_coordinate_that_does_not_tell_sigmas_apart():
    assert number(Lagrange(2), walk([5, 7, 10]), (3, 0.125), RunInfo(coordinate=lambda sigma: 1.0)) == 10


def test_lagrange_leaves_out_what_has_no_coordinate():
    """sigma = 0 has no logarithm; at sigma = 0 nothing can be extrapolated to, so the last residual is reused."""
    known = [((0, 1.0), 5), ((1, 0.5), 7), ((2, 0.0), 100)]
    assert number(Lagrange(2), known, (3, 0.25)) == pytest.approx(9)
    assert number(Lagrange(2), walk([5, 7]), (2, 0.0)) == 7
    assert number(Lagrange(2), [((0, 0.0), 3)], (1, 0.5)) == 3
    assert number(Lagrange(1), [((0, math.inf), 100), ((1, 1.0), 5), ((2, 0.5), 7)], (3, 0.25)) == pytest.approx(9)


def test_lagrange_knows_all_of_its_order_under_heun():
    """Asked are 64 32 32 16 16 8 8 4 4 2, computed, and 2 1 1, skipped. The network answers log2(sigma)^2."""
    octaves = tuple(2.0**k for k in range(6, -1, -1))
    method = Method(predictor=Lagrange(2, "zero"), warmup=5)
    model = cached(lambda x, sigma: x * sigma.log2().reshape(-1, 1, 1, 1) ** 2, method)
    with model.run((*octaves, 0.0), stages=2):
        answers = drive(model, heun((*octaves, 0.0)), 1.0)
    assert decisions(model) == "C" * 10 + "SSS"
    assert answers[10:] == pytest.approx([1, 0, 0], abs=1e-5)
