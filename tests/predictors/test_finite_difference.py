"""FSampler's finite differences by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from predictions import Place, number, one, predict

from stepcache.extend import (
    FiniteDifference,
)


def in_sigma(outs: Sequence[float], sigmas: Sequence[float]) -> list[tuple[Place, float]]:
    return [((i, sigma), out) for i, (out, sigma) in enumerate(zip(outs, sigmas, strict=True))]


def test_finite_differences_by_hand():
    """denoised - x = -sigma out is -8, -6, -3, -1 at sigma 8, 4, 2, 1; here sigma = 0.5.

    h2: -2 + 3 = 1; h3: -3 + 9 - 6 = 0; h4: -4 + 18 - 24 + 8 = -2. Over -0.5: -2, 0, 4.
    """
    known = in_sigma([1, 1.5, 1.5, 1], [8, 4, 2, 1])
    assert [number(FiniteDifference(k), known, (4, 0.5)) for k in (1, 2, 3)] == [-2, 0, 4]


def test_finite_differences_take_a_lower_order_while_little_is_known():
    """h2 of -8, -6 is -4, over -2; h3 needs three and is h2 with two; h2 needs two."""
    known = in_sigma([1, 1.5], [8, 4])
    assert [number(FiniteDifference(k), known, (2, 2.0)) for k in (1, 2, 3)] == [2, 2, 2]
    assert predict(FiniteDifference(1), [((0, 8.0), one(0), one(1))], (1, 4.0), one(0)) is None


@pytest.mark.parametrize("order", [1, 2, 3])
def test_finite_differences_reproduce_sigma_out_as_a_polynomial_of_the_index(order):
    sigmas = [9.0, 7.0, 4.5, 2.0, 0.7]
    change = [sum((i - 1.5) ** k for k in range(order + 1)) for i in range(5)]
    outs = [c / s for c, s in zip(change, sigmas, strict=True)]
    assert number(FiniteDifference(order), in_sigma(outs[:4], sigmas[:4]), (4, 0.7)) == pytest.approx(outs[4])


def test_finite_differences_reproduce_a_constant_only_where_sigma_falls_evenly():
    """2 * 3 - 4 = 2 at sigma 2, but 2 * 2 - 4 = 0 at sigma 1."""
    assert number(FiniteDifference(1), in_sigma([5, 5], [4, 3]), (2, 2.0)) == 5
    assert number(FiniteDifference(1), in_sigma([5, 5], [4, 2]), (2, 1.0)) == 0


def test_finite_differences_tell_nothing_at_sigma_0():
    assert predict(FiniteDifference(1), [((i, 2.0 - i), one(0), one(1)) for i in (0, 1)], (2, 0.0), one(0)) is None
