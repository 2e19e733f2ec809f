"""Spectrum's Chebyshev fit by hand."""

from __future__ import annotations

import math

import pytest
from predictions import number, one, predict

from stepcache.extend import (
    Chebyshev,
    RunInfo,
)


def test_chebyshev_by_hand():
    """Evaluations 0 and 25 of 50 and now 50: tau = -1, 0, 1. m = 1, lam = 1: X'X + I = [[3, -1], [-1, 2]].

    Its inverse is [[2, 1], [1, 3]] / 5, which makes of (1, 1): (3, 4) / 5. Weights -1 / 5 and 3 / 5.
    The line: 1.5 times the last less half the one before. Outputs 10 and 20.
    """
    known = [((0, 2.0), 10), ((25, 1.0), 20)]
    assert number(Chebyshev(w=1, m=1), known, (50, 0.5)) == pytest.approx(10)
    assert number(Chebyshev(w=0, m=1), known, (50, 0.5)) == pytest.approx(25)
    assert number(Chebyshev(w=0.4, m=1), known, (50, 0.5)) == pytest.approx(0.4 * 10 + 0.6 * 25)
    assert predict(Chebyshev(), [((0, 2.0), one(0), one(10))], (1, 1.0), one(0)) is None


def test_chebyshev_is_scaled_to_the_run():
    """As above with a run of 20 evaluations: those at 0 and 10, and now 20. Under Heun 10 steps are 20 evaluations."""
    known = [((0, 2.0), 10), ((10, 1.0), 20)]
    for run in (RunInfo((1.0,) * 21), RunInfo((1.0,) * 11, stages=2)):
        assert number(Chebyshev(w=1, m=1), known, (20, 0.5), run) == pytest.approx(10)
        assert number(Chebyshev(w=1, m=1, steps=50), known, (20, 0.5), run) != pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("m", [0, 1, 2, 3])
def test_chebyshev_without_a_ridge_reproduces_a_polynomial_in_the_index(m):
    known = [((i, 9.0 - i), sum((i / 5) ** k for k in range(m + 1))) for i in (0, 1, 3, 4, 6, 9)]
    expected = sum((11 / 5) ** k for k in range(m + 1))
    assert number(Chebyshev(w=1, m=m, lam=0), known, (11, 0.5)) == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(number(Chebyshev(w=1, m=m, lam=0), known[:2], (11, 0.5)))
