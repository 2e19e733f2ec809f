"""The reuse of a residual on toy networks, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from toys import SIX, cached, drive, twice

from stepcache import Method, Static


def test_reuse_adds_the_last_computed_residual():
    """x' = 3 has the residual 2 * 3 - 3 = 3."""
    model = cached(twice, Static("100101"), sigmas=SIX)
    assert drive(model, SIX[:-1], [3, 5, 6, 4, 9, 1]) == [6, 5 + 3, 6 + 3, 8, 9 + 4, 2]


def test_reuse_is_exact_where_the_network_is_the_identity_plus_a_constant():
    model = cached(lambda x, sigma: x + 7, Static("100000"), sigmas=SIX)
    assert drive(model, SIX[:-1], [3, 5, 6, 4, 9, 1]) == [10, 12, 13, 11, 16, 8]


def test_reuse_works_in_network_space():
    """eps scaling at sigma = sqrt(3): c_in = 1/2, denoised = x - sigma eps(x / 2).

    Computed at x = 4 with eps(y) = 2 y: eps = 4, residual 4 - 2 = 2. Skipped at x = 6: eps = 3 + 2.
    """
    sigma = math.sqrt(3)
    model = cached(lambda x, s: x - s.reshape(-1, 1, 1, 1) * 2 * (x / 2), Method(), sigmas=(sigma, sigma * 0.999, 0))
    model._scalings = lambda s: (torch.ones_like(s), -s, (s**2 + 1) ** -0.5)
    low = sigma * 0.999
    first, second = drive(model, (sigma, low), (4, 6))
    c_in = (low**2 + 1) ** -0.5
    assert first == pytest.approx(4 - sigma * 4, rel=1e-6)
    assert second == pytest.approx(6 - low * (6 * c_in + 2), rel=1e-6)
