"""DMD: linear systems are recovered."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from predictions import predict
from torch import Tensor

from stepcache.extend import (
    DMD,
    TaylorSeer,
)


def linear_system(rates: Sequence[complex], steps: Sequence[float], size: int = 40, rows: int = 2) -> Tensor:
    """A sum of exponentials with random real directions, (len(steps), rows, size); every row has rates of its own."""
    torch.manual_seed(len(rates))
    phi = torch.randn(rows, size, len(rates), dtype=torch.complex128)
    powers = [[(rate * 0.97**row) ** step for rate in rates] for row in range(rows) for step in steps]
    powers = torch.tensor(powers, dtype=torch.complex128).reshape(rows, len(steps), len(rates))
    return torch.einsum("rsk,rtk->trs", phi, powers).real


@pytest.mark.parametrize("baseline", ["input", "zero"])
@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_dmd_recovers_a_linear_system(ahead, baseline):
    """A decaying and an oscillating mode: three real degrees of freedom, six snapshots three evaluations apart."""
    rates = (0.9, 0.8 * complex(math.cos(0.5), math.sin(0.5)))
    y = linear_system(rates, [0, 1, 2, 3, 4, 5, 5 + ahead / 3])
    x = torch.randn_like(y) if baseline == "input" else torch.zeros_like(y)
    known = [((3 * i, 9.0 - i), x[i], y[i] + x[i]) for i in range(6)]
    predicted = predict(DMD(baseline=baseline), known, (15 + ahead, 1.0), x[6])
    torch.testing.assert_close(predicted, y[6] + x[6], rtol=1e-5, atol=1e-5)


def test_dmd_is_taylorseer_below_four_evenly_spaced_evaluations():
    y = linear_system((0.9, 0.5), [0, 1, 2, 3, 4])
    for index in ((0, 1, 2), (0, 1, 2, 4), (0, 1, 3, 5)):
        known = [((n, 9.0 - n), torch.zeros_like(y[n]), y[n]) for n in index if n < 5] + (
            [((5, 3.0), torch.zeros_like(y[0]), y[4])] if 5 in index else []
        )
        arguments = known, (6, 1.0), torch.zeros_like(y[0])
        assert torch.equal(predict(DMD(order=2), *arguments), predict(TaylorSeer(2, "input"), *arguments))


def test_dmd_leaves_out_what_lies_before_the_evenly_spaced_evaluations():
    y = linear_system((0.9, 0.5), [0, 1, 2, 3, 4, 5])
    zero = torch.zeros_like(y[0])
    known = [((-1, 10.0), zero, zero + 100)] + [((2 * i, 9.0 - i), zero, y[i]) for i in range(5)]
    torch.testing.assert_close(predict(DMD(), known, (10, 1.0), zero), y[5], rtol=1e-6, atol=1e-6)


def test_dmd_keeps_at_most_the_modes_asked_for():
    """A strong mode and one of a thousandth; of rank 1 only the strong one is seen."""
    strong, weak = torch.eye(2, dtype=torch.float64)
    y = [(0.9**n * strong + 1e-3 * 0.1**n * weak)[None] for n in range(7)]
    known = [((n, 9.0 - n), torch.zeros_like(y[n]), y[n]) for n in range(6)]
    full, low = (predict(DMD(rank=rank), known, (6, 1.0), torch.zeros_like(y[0])) for rank in (0, 1))
    torch.testing.assert_close(full, y[6], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(low[0, 0], y[6][0, 0], rtol=1e-5, atol=1e-5)


def test_dmd_of_nothing_but_zeros_is_zero():
    zero = torch.zeros(1, 3)
    assert torch.equal(predict(DMD(), [((n, 9.0 - n), zero, zero) for n in range(6)], (6, 1.0), zero), zero)
