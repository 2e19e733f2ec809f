"""HiCache: which evaluations are computed and what is predicted, by hand and as hicache-pp does it."""

from __future__ import annotations

import pytest
import torch
from toys import SIX, Toy, cached, decisions, drive, heun, level

from stepcache import HiCache, Method, OptionError, method
from stepcache.extend import TaylorSeer

TWELVE = (*range(12, 0, -1), 0)


# The method


def test_hicache_computes_its_warm_up_and_then_one_of_an_interval():
    for chosen, expected in [
        (HiCache(), "CCSSSCSSSCSS"),
        (HiCache(last_step=True), "CCSSSCSSSCSC"),
        (HiCache(interval=2, warmup=0), "CSCSCSCSCSCS"),
        (HiCache(3, warmup=4), "CCCCSSCSSCSS"),
        (HiCache(end=0.75), "CCSSSCSSSCCC"),
        (HiCache(interval=1), "C" * 12),
    ]:
        model = cached(Toy(), chosen, sigmas=TWELVE)
        drive(model, TWELVE[:-1], 1.0)
        assert decisions(model) == expected


def test_a_run_by_hand():
    """The network doubles 1, 2, 3, ... The slope is 2 and half of it is taken: from 4 on 5 6 7, from 12 on 13 14 15."""
    model = cached(Toy(), HiCache(), sigmas=TWELVE)
    assert drive(model, TWELVE[:-1], range(1, 13)) == [2, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22]


def test_of_a_step_with_two_evaluations_the_second_is_computed():
    model = cached(Toy(), HiCache(interval=2))
    with model.run(SIX, stages=2):
        drive(model, heun(SIX), 1.0)
    assert decisions(model) == "CCCC" + "SC" * 3 + "S"


def test_options_come_as_text_and_under_the_names_of_the_source():
    chosen = HiCache(3, 2, 0.7, 4)
    assert method("hicache", "interval=3,order=2,sigma=0.7,warmup=4") == chosen
    assert method("hicache", "interval=3,max_order=2,sigma=0.7,first_enhance=4") == chosen
    assert HiCache(3, max_order=2, sigma=0.7, first_enhance=4) == chosen
    assert method("hicache") == HiCache(interval=4, order=1, sigma=0.5, warmup=2)
    assert HiCache(predictor=TaylorSeer(2)).predictor == TaylorSeer(2)
    assert isinstance(chosen, Method)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"interval": 0}, "^interval=0: accepted is a whole number of at least 1"),
        ({"order": -1}, "^order=-1: accepted is a whole number"),
        ({"sigma": 1.5}, "^sigma=1.5: accepted is a number from 0 to 1"),
        ({"warmup": -1}, "^warmup=-1: "),
        ({"ordr": 1}, "^unknown option 'ordr'. Did you mean 'order'"),
        ({"order": 1, "max_order": 2}, "^max_order=2: order is given twice, under two names"),
        ({"gates": 5}, "^gates=5: accepted are objects of classes made from Gate"),
    ],
)
def test_options_are_checked_by_name(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        HiCache(**options)


# hicache-pp


@pytest.mark.parametrize("sigma", [0.5, 0.7071])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("interval", "warmup"), [(4, 2), (2, 1), (3, 4)])
def test_decisions_and_predictions_are_those_of_hicache_pp(interval, warmup, order, sigma):
    """Random outputs, twenty steps."""
    theirs = pytest.importorskip("hicache_pp")
    torch.manual_seed(0)
    outputs, steps = torch.randn(20, 2, 3, 4, 4), 20
    model = cached(lambda x, at: outputs[steps - int(at[0])], HiCache(interval, order, sigma, warmup))
    state = theirs.hicache_init(steps, interval, order, warmup, sigma=sigma)
    expected_decisions = ""
    with model.run(range(steps, -1, -1)):
        for i in range(steps):
            state["step"] = i
            full = theirs.hicache_decide(state) == "full"
            expected_decisions += "C" if full else "S"
            if full:
                theirs.hicache_update_derivatives(state, outputs[i])
            expected = outputs[i] if full else theirs.hicache_forecast(state)
            answer = model(torch.randn(2, 3, 4, 4), level(steps - i, rows=2))
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    assert decisions(model) == expected_decisions
    assert "S" in expected_decisions
