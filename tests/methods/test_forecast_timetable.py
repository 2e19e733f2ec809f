"""What Forecast computes: beside a mask, and in runs that are too short for it."""

from __future__ import annotations

import pytest
from toys import Toy, cached, decisions, drive, heun, reasons

from stepcache import Forecast, HiCache, Method, OptionError, StepMask, TaylorSeerCache
from stepcache.extend import Interval

TEN = (14.0, 9.0, 5.5, 3.4, 2.1, 1.3, 0.8, 0.45, 0.2, 0.05, 0.0)


def run(method: Method, sigmas: tuple[float, ...] = TEN):
    model = cached(Toy(), method, sigmas=sigmas)
    drive(model, sigmas[:-1], 1.0)
    return model


@pytest.mark.parametrize(
    "method",
    [
        Forecast(mask=StepMask("1000100001", "static")),
        Forecast().replace(mask=StepMask("1000100001", "static")),
        HiCache(warmup=0, mask=StepMask("1000100001", "static")),
        TaylorSeerCache(warmup=0, interval=2, mask=StepMask("1000100001", "static")),
        Method(gates=(Interval(2),), mask=StepMask("1000100001", "static")),
    ],
)
def test_a_static_mask_takes_the_place_of_the_interval(method):
    assert decisions(run(method)) == "CSSSCSSSSC"


def test_the_last_step_is_computed_beside_a_static_mask_too():
    mask = StepMask("1000100000", "static")
    assert decisions(run(Forecast(mask=mask))) == "CSSSCSSSSC"
    assert decisions(run(Forecast(mask=mask, last_step=False))) == "CSSSCSSSSS"


def test_the_ones_of_a_dynamic_mask_are_computed_in_addition_to_the_interval():
    assert decisions(run(Forecast())) == "CCSCSCSCSC"
    assert decisions(run(Forecast(mask="0011110000"))) == "CCCCCCSCSC"


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8])
def test_a_run_of_few_evaluations_is_computed_and_the_report_says_so(steps):
    model = run(Forecast(), TEN[-steps - 1 :])
    assert decisions(model) == "C" * steps
    assert set(reasons(model)[:-1]) <= {"short run"}
    count = "1 evaluation" if steps == 1 else f"{steps} evaluations"
    assert any(note.startswith(f"the run has only {count}: all are computed") for note in model.report.notes)


def test_nine_evaluations_are_enough():
    assert decisions(run(Forecast(), TEN[-10:])) == "CCSCSCSCC"
    model = cached(Toy(), Forecast(), sigmas=TEN[-6:])
    with model.run(TEN[-6:], 2):  # Heun: five steps, nine evaluations
        for sigma in heun(TEN[-6:]):
            drive(model, (sigma,), 1.0)
    assert "S" in decisions(model)


def test_the_least_number_of_evaluations_is_an_option():
    assert "S" in decisions(run(Forecast(min_evaluations=0), TEN[-5:]))
    assert "S" not in decisions(run(Forecast(min_evaluations=11)))
    with pytest.raises(OptionError, match="min_evaluations=-1: accepted is a whole number"):
        Forecast(min_evaluations=-1)


def test_a_static_mask_decides_in_a_short_run_too():
    assert decisions(run(Forecast(mask=StepMask("1101", "static")), TEN[-5:])) == "CCSC"


def test_a_wrong_interval_is_named_as_the_option_is():
    with pytest.raises(OptionError, match=r"^interval=0: accepted is a whole number of at least 1"):
        Forecast(0)
