"""The published formulas of the criteria on out = 2 x, every decision and every number worked out by hand.

Fates are one letter an evaluation: C computed, S skipped. A computed evaluation answers 2 x, a skipped one x + x' with
x' the input of the last remembered evaluation.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from toys import SIX, cached, decisions, drive, filled, heun, level, reasons, twice

from stepcache import EasyCache, Method, OptionError, UCache
from stepcache.extend import (
    EasyCacheRule,
    UCacheRule,
)

TEN = (*range(10, 0, -1), 0)


def estimates(model) -> list[float | None]:
    return [event.estimate for event in model.report.events]


def thresholds(model) -> list[float | None]:
    return [event.threshold for event in model.report.events]


def offs(model) -> list[float | None]:
    return [None if event.prediction_error is None else float(event.prediction_error) for event in model.report.events]


def sizes(model) -> list[float | None]:
    return [None if event.size is None else float(event.size) for event in model.report.events]


def test_easycache_accumulates_the_relative_change_until_the_threshold():
    """k = |16 - 20| / |8 - 10| = 2, norm 16: the estimates grow by 2 |x - 8| / 16.

    x      10    8     7.5           7             6.5          6
    E      -     -     0.0625        0.1875        0.375        2 * 0.5 / 13
    letter C     C     S 7.5 + 8     S 7 + 8       C            S 6 + 6.5
    """
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1), sigmas=SIX)
    answers = drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    assert decisions(model) == "CCSSCS"
    assert answers == [20, 16, 15.5, 15, 13, 12.5]
    assert estimates(model) == [None, None, 0.0625, 0.1875, 0.375, 1 / 13]
    assert thresholds(model) == [None, 0.2, 0.2, 0.2, 0.2, 0.2]


def test_easycache_skips_only_strictly_below_the_threshold():
    model = cached(twice, EasyCache(0.1875, window=None, start=0, end=1), sigmas=SIX)
    drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    assert decisions(model) == "CCSCSC"
    assert estimates(model)[2:4] == [0.0625, 0.1875]


def test_easycache_forgets_its_error_when_a_gate_computes():
    """x = 7.5 and 7 are skipped; the mask computes 6.75 (norm 13.5, k 2); E at 6.5 is 2 * 0.25 / 13.5 alone."""
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1, mask="000010"), sigmas=SIX)
    drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.75, 6.5])
    assert decisions(model) == "CCSSCS"
    assert estimates(model) == [None, None, 0.0625, 0.1875, None, pytest.approx(0.5 / 13.5)]


def test_easycache_keeps_its_rate_where_the_network_did_not_move():
    """x 10, 8 give k = 2; at x = 8 again nothing has moved: no estimate, computed, k and norm stay."""
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1), sigmas=SIX)
    drive(model, SIX[:-1], [10, 8, 8, 7.5, 7, 6.5])
    assert decisions(model) == "CCCSSC"
    assert estimates(model) == [None, None, None, 0.0625, 0.1875, 0.375]


def test_easycache_cannot_tell_where_the_network_answers_zero():
    model = cached(lambda x, sigma: 0 * x, EasyCache(5.0, window=None, start=0, end=1), sigmas=SIX)
    assert drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6]) == [0] * 6
    assert decisions(model) == "CCCCCC"


def ucache(threshold=1.0, **options):
    return UCache(threshold, **{"start": 0, "end": 1, "window": None, **options})


FIRST_TWO = [13.0, 8.0]
"""out 26, 16: k = 2, norm 16, average 10, so sqrt(16 * 1.6 * 10) = 16 and a = 2 |x - 8| / 16 = |x - 8| / 8."""


def test_ucache_relative_error_grows_faster_with_every_skip():
    """Without a schedule f = 1. a (1 + m / 2):

    x      7              6                        5.5
    a      0.125          0.25                     0.3125
    E      0.125          0.125 + 0.25 * 1.5       0.5 + 0.3125 * 2
    letter S 7 + 8        S 6 + 8                  C
    """
    model = cached(twice, ucache(1.0))
    answers = drive(model, SIX[:-2], [*FIRST_TWO, 7, 6, 5.5])
    assert decisions(model) == "CCSSC"
    assert answers == [26, 16, 15, 14, 11]
    assert estimates(model) == pytest.approx([None, None, 0.125, 0.5, 1.125])
    assert thresholds(model) == [None, 1, 1, 1, 1]


def test_ucache_average_is_smoothed_over_the_computed_changes():
    """After x = 5.5 (out 11, change 5): average 0.8 * 10 + 0.2 * 5 = 9, norm 11, k 2.

    At 5: a = 2 * 0.5 / sqrt(11 * 1.6 * 9), with m back at 0 and E forgotten.
    """
    model = cached(twice, ucache(1.0))
    drive(model, SIX[:-1], [*FIRST_TWO, 7, 6, 5.5, 5])
    assert decisions(model) == "CCSSCS"
    assert estimates(model)[-1] == pytest.approx(1 / math.sqrt(11 * 1.6 * 9), rel=1e-6)


def test_ucache_not_relative_compares_with_a_share_of_the_output():
    """a = 2 |x - 8|: 2, then 2 + 4 * 1.5 = 8, then 8 + 5 * 2 = 18, against 0.75 * 16 = 12.

    At x = 8 there is no rate yet and so no estimate, but a threshold all the same: 0.75 * 26.
    """
    model = cached(twice, ucache(0.75, relative=False))
    drive(model, SIX[:-2], [*FIRST_TWO, 7, 6, 5.5])
    assert decisions(model) == "CCSSC"
    assert estimates(model) == pytest.approx([None, None, 2, 8, 18])
    assert thresholds(model) == pytest.approx([None, 19.5, 12, 12, 12])


def test_ucache_decay_forgets_a_share_of_the_error_at_every_evaluation():
    """E: 0.125, then 0.5 * 0.125 + 0.25 * 1.5 = 0.4375, then 0.5 * 0.4375 + 0.3125 * 2 = 0.84375."""
    model = cached(twice, ucache(1.0, decay=0.5))
    drive(model, SIX[:-2], [*FIRST_TWO, 7, 6, 5.5])
    assert decisions(model) == "CCSSS"
    assert estimates(model) == pytest.approx([None, None, 0.125, 0.4375, 0.84375])


def test_ucache_without_reset_and_without_decay_never_skips_again_after_a_failed_test():
    """From E = 1.125 on it can only grow, however little the input moves."""
    with pytest.warns(
        UserWarning, match="^UCache with reset=0 and decay=1: the error only grows, so after the first failed test"
    ):
        method = ucache(1.0, reset=False)
    model = cached(twice, method)
    drive(model, TEN[:-1], [*FIRST_TWO, 7, 6, 5.5, 5.49, 5.48, 5.47, 5.46, 5.45])
    assert decisions(model) == "CCSS" + "CCCCCC"
    assert all(estimate >= 1.125 for estimate in estimates(model)[4:])


def test_ucache_without_reset_but_with_decay_recovers():
    """The failed test at x = 0 leaves E = 0.125 * 0.1 + 1 * 1.5 = 1.5125 (m = 1); next 0.15125 + a small step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = ucache(1.0, reset=False, decay=0.1)
    model = cached(twice, method)
    drive(model, SIX[:-2], [*FIRST_TWO, 7, 16, 15.99])
    assert decisions(model) == "CCSCS"
    assert estimates(model)[2:4] == pytest.approx([0.125, 1.5125])
    assert 0.15125 < estimates(model)[4] < 0.16


def test_ucache_forgets_its_error_when_a_gate_computes_only_with_reset():
    """The mask computes x = 6 (out 12, change 4): average 8.8, norm 12. Then at 5.5 a = 1 / sqrt(12 * 1.6 * 8.8)."""
    step = 1 / math.sqrt(12 * 1.6 * 8.8)
    for reset, before in ((True, 0.0), (False, 0.9 * 0.125)):
        model = cached(twice, ucache(1.0, reset=reset, decay=0.9, mask="000100"), sigmas=SIX)
        drive(model, SIX[:-1], [*FIRST_TWO, 7, 6, 5.5, 5.4])
        assert decisions(model)[:5] == "CCSCS"
        assert estimates(model)[4] == pytest.approx(before + step, rel=1e-6)


def test_ucache_halves_its_threshold_early_and_raises_it_late():
    """f = 0.5 below 2 of 10 computed, 1.5 above 8 of 10. Everything moves too much to be skipped."""
    model = cached(twice, ucache(0.5), sigmas=TEN)
    drive(model, TEN[:-1], [2.0**k for k in range(1, 11)])
    assert decisions(model) == "C" * 10
    assert thresholds(model) == [None, 0.25, *[0.5] * 7, 0.75]


def test_ucache_progress_counts_computed_evaluations_inside_the_window_only():
    """10 steps, window from step 4: at step 5 one evaluation was computed inside it, at step 6 two."""
    model = cached(twice, ucache(0.5, start=0.4), sigmas=TEN)
    drive(model, TEN[:-1], [2.0**k for k in range(1, 11)])
    assert thresholds(model) == [*[None] * 4, 0.25, 0.25, *[0.5] * 3, None]
    assert reasons(model)[:4] == ["before window"] * 4


def progress(schedule, stages, evaluations="all") -> list[float]:
    """UCache's factor at every evaluation that it is asked about. Everything moves too much to be skipped."""
    model = cached(twice, ucache(1.0, evaluations=evaluations))
    asked = heun(schedule) if stages == 2 else schedule[:-1]
    with model.run(schedule, stages):
        drive(model, asked, [2.0**k for k in range(len(asked))])
    assert decisions(model) == "C" * len(asked)
    return [threshold for threshold in thresholds(model) if threshold is not None]


def test_ucache_progress_is_a_share_of_all_evaluations_that_the_method_sees():
    """After k of n: 0.5 below n / 5, 1.5 above 4 n / 5. k counts from 1: the very first evaluation has no cache.

    Euler: n = 10. Heun: n = 19, one evaluation in the last step, which ends at 0; 20 where it ends above. The seconds
    alone, as published: there are 9, and n is 10, the number of steps.
    """
    assert progress(TEN, stages=1) == [0.5] * 1 + [1] * 7 + [1.5] * 1
    assert progress(TEN, stages=2) == [0.5] * 3 + [1] * 12 + [1.5] * 3
    assert progress((*TEN[:-1], 0.5), stages=2) == [0.5] * 3 + [1] * 13 + [1.5] * 3
    assert progress(TEN, stages=2, evaluations="second") == [0.5] * 1 + [1] * 7


def test_a_criterion_learns_nothing_outside_its_window():
    """x 100 and 13 lie before the window, so 13 -> 8 is no change yet: the first change is 8 -> 3 (k 2, norm 6)."""
    model = cached(twice, EasyCache(0.5, start=0.34, window="steps"), sigmas=SIX)
    drive(model, SIX[:-1], [100, 13, 8, 3, 2.5, 1])
    assert decisions(model) == "CCCCSC"
    assert estimates(model)[4] == pytest.approx(2 * 0.5 / 6)


@pytest.mark.parametrize("rule", [EasyCacheRule, UCacheRule])
@pytest.mark.parametrize("bad", [-0.1, math.nan, "high"])
def test_thresholds_are_numbers_of_at_least_0(rule, bad):
    with pytest.raises(OptionError, match="threshold"):
        rule(bad)


def test_computed_evaluations_say_how_far_a_skip_would_have_been_off():
    """|x + x' - 2 x| = |x' - x|, of |2 x|."""
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1), sigmas=SIX)
    drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    assert offs(model) == [None, 2, None, None, 1.5, None]
    assert sizes(model) == [20, 16, None, None, 13, None]
    shares = [None, 2 / 16, None, None, pytest.approx(1.5 / 13), None]
    assert [event.error_share for event in model.report.events] == shares
    assert [event["prediction_error"] for event in model.report.to_dict()["events"]] == shares


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 1, 9, 2), range(9)),
        ((2, 9, 3), range(9)),
        ((1, 9), range(9)),
        ((9,), range(9)),
        ((1, 16, 72, 64), range(0, 72, 3)),  # 73,728 numbers, of which 16,384 are enough
    ],
)
def test_how_far_a_skip_would_have_been_off_is_measured_on_some_rows_of_large_latents(shape, rows):
    """x' = 0: a prediction is x, the output 2 x, so off by |x|. Row n holds n + 1."""
    count = max(rows.stop, 9)
    numbers = 1.0 + torch.arange(count)
    x = (numbers[:, None] if len(shape) > 2 else numbers).expand(shape).contiguous()
    model = cached(twice, Method(warmup=2), sigmas=SIX)
    model(torch.zeros(shape), torch.tensor(10.0))
    model(x, torch.tensor(8.0))
    assert offs(model)[1] == pytest.approx(sum(1.0 + row for row in rows) / len(rows), rel=1e-6)
    assert sizes(model)[1] == pytest.approx(count + 1, rel=1e-6)


def test_how_far_off_is_told_of_the_deciding_branch_on_every_computed_evaluation():
    """Also where a gate computed and the predictor was not needed; not of branches that follow."""
    model = cached(twice, Method(mask="101010"), sigmas=SIX, branches=("cond", "uncond"))
    for x, sigma in zip([10, 9, 7, 6, 5, 5], SIX[:-1], strict=True):
        model(filled(x, rows=2), level(sigma, rows=2))
    assert decisions(model, "cond") == "CSCSCS"
    assert offs(model)[0::2] == [None, None, 3, None, 2, None]
    assert sizes(model)[0::2] == [20, None, 14, None, 10, None]
    assert {*offs(model)[1::2], *sizes(model)[1::2]} == {None}


def test_what_a_criterion_learned_in_one_run_does_not_reach_the_next():
    method = EasyCache(0.2, window=None, start=0, end=1)
    model = cached(twice, method, sigmas=SIX)
    for _ in range(2):
        drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
        assert decisions(model) == "CCSSCS"
        assert estimates(model) == [None, None, 0.0625, 0.1875, 0.375, 1 / 13]
    assert method == EasyCache(0.2, window=None, start=0, end=1)
    assert method.criterion.error == 0
    assert method.criterion.response.rate is None
