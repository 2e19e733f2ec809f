"""HiCache's Hermite series by hand."""

from __future__ import annotations

import math

import pytest
import torch
from predictions import number, predict, smooth, walk

from stepcache.extend import Hermite, TaylorSeer


def test_hermite_by_hand():
    """After 3, 5, 9: D_1 = 4 and D_2 = 2. At sigma = 1/2 the polynomials are k / 2 and k^2 / 4 - 1 / 2."""
    assert [number(Hermite(m), walk([3, 5, 9]), (3, 0.1)) for m in (0, 1, 2)] == [9, 9 + 2, 11 - 0.25]
    assert number(Hermite(2), walk([3, 5, 9]), (5, 0.1)) == 9 + 6 + 1.75


def test_hermite_of_order_3_by_hand():
    """After 3, 5, 9, 18: D = 9, 5, 3. One ahead the polynomials are 1/2, -1/4 and (8 / 8 - 12 / 2) / 8 = -5/8."""
    assert number(Hermite(3), walk([3, 5, 9, 18]), (4, 0.1)) == 18 + 4.5 - 5 / 8 - 3 * 5 / 48


def test_hermite_divides_every_difference_by_the_last_gap():
    """3, 5, 8 at evaluations 0, 1, 4: D_1 = 1, before it 2, so D_2 = -1/3. Two ahead the polynomials are 1 and 1/2."""
    known = [((0, 8.0), 3), ((1, 4.0), 5), ((4, 2.0), 8)]
    assert number(Hermite(2), known, (6, 0.5)) == pytest.approx(8 + 1 - 1 / 12)


def test_hermite_takes_a_lower_order_while_little_is_known():
    assert number(Hermite(2), walk([3]), (1, 0.1)) == 3
    assert number(Hermite(2), walk([3, 5]), (2, 0.1)) == 6
    assert number(Hermite(5), walk([3, 5, 9]), (3, 0.1)) == number(Hermite(2), walk([3, 5, 9]), (3, 0.1))


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_hermite_of_order_1_is_taylorseer_times_2_sigma_squared(ahead):
    known, place = walk([3, 5, 9]), (2 + ahead, 0.1)
    whole = number(TaylorSeer(1), known, place) - 9
    for sigma in (0.0, 0.3, 0.5, math.sqrt(0.5), 1.0):
        assert number(Hermite(1, sigma), known, place) - 9 == pytest.approx(2 * sigma**2 * whole)


def test_hermite_of_the_residual_carries_what_is_new_in_the_input():
    *known, (place, x, _) = smooth(4, (2, 3, 4))
    series = predict(Hermite(2), [(at, torch.zeros_like(past), out - past) for at, past, out in known], place, x)
    assert torch.allclose(predict(Hermite(2, baseline="input"), known, place, x), x + series, atol=1e-6)


def test_hermite_keeps_one_evaluation_more_than_its_order():
    assert [Hermite(m).history_size for m in (0, 1, 3)] == [1, 2, 4]
