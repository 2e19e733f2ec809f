"""TaylorSeer by hand."""

from __future__ import annotations

import pytest
from predictions import number, walk

from stepcache.extend import (
    TaylorSeer,
)


def test_taylorseer_by_hand():
    """Outputs 3, 5, 9 at evaluations 0, 1, 2. D1 = 4, and 2 before; D2 = 2.

    One further: order 0: 9; order 1: 9 + 4; order 2: 13 + 2 / 2. Three further: 9 + 12 + 2 * 9 / 2.
    """
    assert [number(TaylorSeer(k), walk([3, 5, 9]), (3, 0.1)) for k in (0, 1, 2, 3)] == [9, 13, 14, 14]
    assert number(TaylorSeer(2), walk([3, 5, 9]), (5, 0.1)) == 30


def test_taylorseer_divides_every_difference_by_the_last_gap():
    """Outputs 3, 5, 9 at evaluations 0, 4, 6: D1 = 2, and 0.5 before; D2 = 1.5 / 2. At 7: 9 + 2 + 0.75 / 2."""
    known = [((0, 3.0), 3), ((4, 2.0), 5), ((6, 1.0), 9)]
    assert number(TaylorSeer(2), known, (7, 0.5)) == 9 + 2 + 0.375


@pytest.mark.parametrize("gap", [1, 3])
def test_taylorseer_reproduces_a_line_and_not_a_parabola(gap):
    line, parabola = [2 + 3 * i for i in range(4)], [i * i for i in range(4)]
    ahead = 2 / gap
    assert number(TaylorSeer(3), walk(line, gap), (3 * gap + 2, 0.1)) == pytest.approx(11 + 3 * ahead)
    assert number(TaylorSeer(2), walk(parabola, gap), (3 * gap + 2, 0.1)) == pytest.approx(9 + 5 * ahead + ahead**2)


def test_taylorseer_takes_a_lower_order_while_little_is_known():
    assert number(TaylorSeer(2), walk([3]), (1, 0.1)) == 3
    assert number(TaylorSeer(2), walk([3, 5]), (2, 0.1)) == 7
