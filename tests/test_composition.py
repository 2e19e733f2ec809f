"""Any criterion with any predictor under any gate: a new one of each costs a few lines."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from toys import SIX, LogSigmaLine, SkipOdd, Toy, cached, decisions, drive, filled, heun, level, twice

from stepcache import Method, StepMask
from stepcache.extend import (
    Always,
    Branch,
    Criterion,
    EasyCacheRule,
    MaxCached,
    Predictor,
    UCacheRule,
    Verdict,
    Warmup,
)

TEN = (*range(10, 0, -1), 0)


# The seam: a criterion and a predictor of a few lines each (toys.SkipOdd, toys.LogSigmaLine) under every gate.

OCTAVES = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0)
"""The network answers sigma itself; the line over log2 sigma through a (earlier) and b goes on to b + (b - a) times the
octaves from b over the octaves between them."""

SEAM = {
    # 8: 16 - 16 = 0.  2: through 16 and 4 two octaves apart, 4 - 12 / 2.  0.5: through 4 and 1, 1 - 3 / 2.
    "none": ({}, "CCCSCSCS", [64, 32, 16, 0, 4, -2, 1, -0.5]),
    # Open for 16 >= sigma > 2. 8 as above.
    "window": ({"start": 0.25, "end": 0.625}, "CCCSCCCC", [64, 32, 16, 0, 4, 2, 1, 0.5]),
    # 2: through 8 and 4 one octave apart, 4 - 4 = 0.  0.5: through 4 and 1, 1 - 3 / 2.
    "warmup": ({"warmup": 4}, "CCCCCSCS", [64, 32, 16, 8, 4, 0, 1, -0.5]),
    # Computes 3; the zeros 5 and 7 ask. 2 from 8 and 4; 0.5 from 4 and 1.
    "mask": ({"mask": "00010000"}, "CCCCCSCS", [64, 32, 16, 8, 4, 0, 1, -0.5]),
    # Skips 2, 3, 5, 6 from 64, 32 (one octave apart): 32 - 32 = 0, 32 - 64; then from 32 and 4 (three apart).
    "static": (
        {"mask": StepMask("11001001", "static")},
        "CCSSCSSC",
        [64, 32, 0, -32, 4, 4 - 28 / 3, 4 - 56 / 3, 0.5],
    ),
    "last_step": ({"last_step": True}, "CCCSCSCC", [64, 32, 16, 0, 4, -2, 1, 0.5]),
    "max_cached": ({"max_cached": 1}, "CCCSCCCC", [64, 32, 16, 0, 4, 2, 1, 0.5]),
    # With `Always`: 2 from 64, 32; 4 computed after two; 5, 6 from 32 and 8 (two octaves): 8 - 12, 8 - 24.
    "max_consecutive": (
        {"criterion": Always(), "max_consecutive": 2},
        "CCSSCSSC",
        [64, 32, 0, -32, 4, 4 - 28 / 3, 4 - 56 / 3, 0.5],
    ),
    "another gate": ({"gates": (MaxCached(2), Warmup(1))}, "CCCSCSCC", [64, 32, 16, 0, 4, -2, 1, 0.5]),
}


@pytest.mark.parametrize("gate", SEAM)
def test_a_new_criterion_and_a_new_predictor_work_under_every_gate(gate):
    options, expected_decisions, expected = SEAM[gate]
    method = Method(**{"criterion": SkipOdd(), "predictor": LogSigmaLine(), **options})
    model = cached(lambda x, sigma: x * sigma.reshape(-1, 1, 1, 1), method, sigmas=OCTAVES)
    assert drive(model, OCTAVES[:-1], 1.0) == pytest.approx(expected, rel=1e-6)
    assert decisions(model) == expected_decisions


def test_a_new_criterion_and_a_new_predictor_work_on_second_evaluations_only():
    """Heun at 64, 32 | 32, 16 | 16, 8 | 8, 4 | 4: the seconds are evaluations 1, 3, 5, 7, all odd.

    1 and 3 are computed (32, 16; a line needs two); 5 is skipped to 0, 7 (sigma 4) to 16 - 32.
    """
    method = Method(criterion=SkipOdd(), predictor=LogSigmaLine(), evaluations="second")
    schedule = (64.0, 32.0, 16.0, 8.0, 4.0, 0.0)
    model = cached(lambda x, sigma: x * sigma.reshape(-1, 1, 1, 1), method)
    with model.run(schedule, stages=2):
        answers = drive(model, heun(schedule), 1.0)
    assert answers == [64, 32, 32, 16, 16, 0, 8, -16, 4]
    assert decisions(model) == "CCCCCSCSC"


@dataclass(frozen=True)
class Last(Predictor):
    """The last output, times a factor."""

    factor: float = 1.0

    def predict(self, branch):
        return branch.history[-1].out * self.factor


def test_every_criterion_goes_with_every_predictor():
    """out = 2 x at x = 10, 8 computed, 7.5 skipped: Reuse 7.5 + 8, Last 3 * 16."""
    for criterion in (EasyCacheRule(0.2), UCacheRule(0.4), Always()):
        for predictor, expected in ((None, 15.5), (Last(3.0), 48.0)):
            options = {} if predictor is None else {"predictor": predictor}
            model = cached(twice, Method(criterion=criterion, warmup=2, **options), sigmas=TEN)
            assert drive(model, TEN[:3], [10, 8, 7.5]) == [20, 16, expected]


def test_a_predictor_is_given_at_most_the_cache_it_asks_for_oldest_first():
    given = []

    class Listening(LogSigmaLine):
        history_size = 3

        def predict(self, branch):
            given.append([entry.position.sigma for entry in branch.history])
            return super().predict(branch)

    model = cached(twice, Method(predictor=Listening(), warmup=5), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert given[-1] == [6.0, 4.0, 2.0]
    assert max(map(len, given)) == 3


def test_a_predictor_is_told_the_place_the_input_and_how_far_it_moved():
    """x' is the input of the last computed evaluation, here 3 and 4, not of the one before."""
    told = []

    class Listening(Last):
        def predict(self, branch):
            places = [entry.position.sigma for entry in branch.history]
            values = [float(t.flatten()[0]) for t in (branch.x, branch.moved, *(n.x for n in branch.history))]
            told.append((branch.position.sigma, branch.position.step, places, values))
            return super().predict(branch) + branch.moved / 2

    model = cached(twice, Method(predictor=Listening(), max_consecutive=2), sigmas=SIX)
    assert drive(model, SIX[:-1], [3, 5, 6, 4, 9, 1]) == [6, 6 + 1, 6 + 1.5, 8, 8 + 2.5, 8 - 1.5]
    assert told == [
        (8, 1, [10], [5, 2, 3]),
        (6, 2, [10], [6, 3, 3]),
        (4, 3, [10], [4, 1, 3]),
        (2, 4, [4], [9, 5, 4]),
        (1, 5, [4], [1, -3, 4]),
    ]


def test_a_criterion_may_look_at_the_prediction_and_its_sum():
    told = []

    class Listening(Criterion):
        def decide(self, branch: Branch) -> Verdict:
            told.append((float(branch.prediction.flatten()[0]), float(branch.total), float(branch.input_change)))
            return Verdict(True)

    model = cached(twice, Method(criterion=Listening()), sigmas=SIX)
    drive(model, SIX[:2], [3, 5])
    assert told == [(5 + 3, 4 * 8, 2)]


def test_a_predictor_sees_the_networks_input_in_float32_whatever_the_latents_are():
    dtypes = []

    class Listening(Last):
        def predict(self, branch):
            entry = branch.history[-1]
            dtypes.append((branch.x.dtype, branch.moved.dtype, entry.x.dtype, entry.out.dtype))
            return entry.out.to(branch.x.dtype)

    network = Toy()
    model = cached(network, Method(predictor=Listening()), sigmas=SIX)
    for sigma in SIX[:2]:
        answer = model(filled(3.0).half(), level(sigma))
    assert answer.dtype == torch.float16
    assert dtypes == [(torch.float32, torch.float32, torch.float16, torch.float16)]
