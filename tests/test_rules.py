"""Gates, criteria and predictors on toy networks, every decision and every number worked out by hand.

Fates are one letter an evaluation: C computed, S skipped. With out = 2 x a computed evaluation answers 2 x, a skipped
one x + x' with x' the input of the last remembered evaluation.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from toys import SIX, Forgetful, LogSigmaLine, SkipOdd, Toy, cached, drive, fates, filled, heun, level, reasons, twice

from stepcache import EasyCache, Method, OptionError, Static, StepMask, UCache
from stepcache.extend import (
    Always,
    Branch,
    ComputeReason,
    Criterion,
    EasyCacheRule,
    Gate,
    LastStep,
    MaxCached,
    MaxConsecutive,
    Predictor,
    UCacheRule,
    Verdict,
    Warmup,
    Window,
)

TEN = (*range(10, 0, -1), 0)


def fates_of(method: Method, sigmas=TEN, **keywords) -> str:
    model = cached(twice, method, sigmas=sigmas, **keywords)
    drive(model, sigmas[:-1], 1.0)
    return fates(model)


# The fates of `Always` under one gate: S wherever the gate lets it.


def test_without_gates_always_skips_all_but_the_first():
    assert fates_of(Method()) == "CSSSSSSSSS"


def test_window_in_steps_is_open_from_its_first_sigma_down_to_above_its_last():
    model = cached(twice, Method(start=0.2, end=0.8), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert fates(model) == "CCSSSSSSCC"
    assert reasons(model) == ["before window"] * 2 + ["criterion"] * 6 + ["after window"] * 2
    assert model.report.notes == ["window 0.2 to 0.8 as shares of this run's 10 steps: 8 >= sigma > 2"]


def test_window_in_steps_leaves_out_the_last_step_even_at_end_1():
    assert fates_of(Method(window="steps")) == "CSSSSSSSSC"
    assert fates_of(Method(gates=(Window(),))) == "CSSSSSSSSC"


def test_window_multiplies_in_float32():
    """0.58 * 50 is 28.999999999999996 in float64 and 29 in float32."""
    sigmas = (*range(50, 0, -1), 0)
    assert fates_of(Method(start=0.58), sigmas) == "C" * 29 + "S" * 20 + "C"


def test_window_in_steps_without_a_schedule_falls_back_to_the_training_timetable():
    model = cached(Forgetful(t_to_sigma=lambda t: 10 * t), Method(start=0.25, end=0.75, window="steps"))
    drive(model, TEN[:-1], 1.0)
    assert fates(model) == "CCCSSSSSCC"
    said = "window 0.25 to 0.75 as shares of the training timetable (no schedule): 7.5 >= sigma > 2.5"
    assert said in model.report.notes


def test_window_in_training_shares_goes_by_the_models_own_timetable():
    method = Method(start=0.25, end=0.75, window="training")
    model = cached(Forgetful(t_to_sigma=lambda t: 10 * t), method, sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert fates(model) == "CCCSSSSSCC"
    assert model.report.notes == ["window 0.25 to 0.75 as shares of the training timetable: 7.5 >= sigma > 2.5"]


def test_window_in_training_shares_counts_timesteps_where_the_model_has_them():
    """5 timesteps: share p is timestep 4 (1 - p), so p = 0.25 is sigmas[3] and p = 0.5 is sigmas[2]."""
    table = torch.tensor([0.5, 1.5, 2.5, 6.5, 9.5])
    network = Forgetful(sigmas=table, get_sigmas=None, t_to_sigma=lambda t: table[t.long()])
    network.get_sigmas = lambda n: table.flip(0)
    model = cached(network, Method(start=0.25, end=0.5, window="training"), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert fates(model) == "CCCCSSSSCC"


def test_window_in_training_shares_is_already_open_in_img2img():
    method = Method(start=0.25, end=0.75, window="training")
    model = cached(Forgetful(t_to_sigma=lambda t: 10 * t), method, sigmas=TEN[5:])
    drive(model, TEN[5:-1], 1.0)
    assert fates(model) == "CSSCC"


def test_window_in_training_shares_from_0_to_1_has_no_edges():
    """Sigmas above the timetable's highest and below its lowest are inside."""
    model = cached(Forgetful(t_to_sigma=lambda t: 2 + 3 * t), Method(window="training"), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert fates(model) == "CSSSSSSSSS"


def test_window_in_training_shares_without_a_timetable_falls_back_to_steps():
    model = cached(twice, Method(start=0.2, end=0.8, window="training"), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert fates(model) == "CCSSSSSSCC"
    assert "as shares of this run's 10 steps (no sigma table)" in model.report.notes[0]


def test_window_with_neither_schedule_nor_timetable_is_open_and_says_so():
    model = cached(twice, Method(start=0.2, end=0.8))
    drive(model, TEN[:-1], 1.0)
    assert fates(model) == "CSSSSSSSSS"
    said = "window 0.2 to 0.8 open throughout: neither a schedule nor a sigma table is known"
    assert said in model.report.notes


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.9, 0.1), (-0.1, 1), (0, 1.1), (0, math.nan)])
def test_an_empty_window_is_an_error(start, end):
    with pytest.raises(OptionError):
        Method(start=start, end=end)
    with pytest.raises(OptionError):
        Window(start, end)


def test_an_unknown_window_unit_is_an_error_with_the_nearest_one():
    with pytest.raises(OptionError, match=r"unknown window unit 'step'. Did you mean 'steps'"):
        Method(window="step")


def test_warmup_computes_the_first_steps():
    assert fates_of(Method(warmup=3)) == "CCCSSSSSSS"


def test_warmup_counts_steps_not_evaluations_under_heun():
    model = cached(twice, Method(warmup=2))
    with model.run(SIX, stages=2):
        drive(model, heun(SIX), range(11))
    assert fates(model) == "CCCC" + "SSSSSSS"


def test_warmup_without_a_schedule_counts_evaluations():
    model = cached(twice, Method(warmup=3))
    drive(model, SIX[:-1], 1.0)
    assert fates(model) == "CCCSSS"
    assert reasons(model) == ["warm-up"] * 3 + ["criterion"] * 3


def test_a_dynamic_mask_asks_the_criterion_on_its_zeros():
    """The criterion would skip 1, 3, 5; the mask holds 0, 1, 5."""
    model = cached(twice, Method(criterion=SkipOdd(), mask="110001"), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert fates(model) == "CCCSCC"
    assert reasons(model) == ["mask", "mask", "criterion", "criterion", "criterion", "mask"]


def test_a_static_mask_skips_all_its_zeros_without_asking():
    class Unasked(Criterion):
        def decide(self, branch: Branch) -> Verdict:
            raise AssertionError("asked")

    model = cached(twice, Method(criterion=Unasked(), mask=StepMask("110001", "static")), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert fates(model) == "CCSSSC"
    assert reasons(model) == ["mask"] * 6


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (UCache(mask=StepMask("110001", "static")), True),
        (EasyCache(mask=StepMask("fast", "static")), True),
        (Method(criterion=SkipOdd(), mask=StepMask("110001", "static"), name="mine"), True),
        (UCache(mask="110001"), False),
        (Static("110001"), False),
        (Method(mask=StepMask("110001", "static")), False),
    ],
)
def test_a_criterion_that_a_static_mask_silences_is_named_in_the_report(method, said):
    model = cached(twice, method, sigmas=SIX)
    for run in range(2):
        drive(model, SIX[:-1], 1.0)
        sentence = f"mask policy static: {method.name}'s own criterion is not asked"
        assert model.report.run == run
        assert model.report.notes.count(sentence) == said
        assert any("is not asked" in note for note in model.report.notes) == said


def test_a_static_mask_computes_a_zero_that_has_no_memory():
    model = cached(twice, Static("001001"), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert fates(model) == "CSCSSC"
    assert reasons(model)[0] == "no memory yet"


def test_a_mask_holds_steps_not_evaluations_under_heun():
    model = cached(twice, Static("101001"))
    with model.run(SIX, stages=2):
        drive(model, heun(SIX), range(11))
    assert fates(model) == "CC" + "SS" + "CC" + "SS" + "SS" + "C"


def test_a_preset_takes_the_runs_own_number_of_steps():
    sigmas = (*range(28, 0, -1), 0)
    expected = "1111110100010000100000100001".replace("1", "C").replace("0", "S")
    assert fates_of(Static("fast"), sigmas) == expected
    model = cached(twice, Static("fast"))
    for n in (28, 5):
        with model.run(sigmas[-n - 1 :]):
            drive(model, sigmas[-n - 1 : -1], 1.0)
        digits = StepMask("fast").for_steps(n)
        assert fates(model) == "".join("SC"[digit] for digit in digits)


def test_a_mask_without_a_schedule_computes_everything_and_says_so_once():
    model = cached(twice, Static("fast"))
    with pytest.warns(UserWarning, match="the mask cannot act: this run's schedule is not known") as caught:
        drive(model, [*SIX[:-1], *SIX[:-1]], 1.0)
    assert len(caught) == 1
    assert fates(model) == "CCCCCC"
    assert reasons(model) == ["mask: no schedule"] * 6
    assert any("the mask cannot act" in note for note in model.report.notes)


def test_a_mask_computes_a_sigma_that_is_off_the_schedule():
    model = cached(twice, Static("100000"))
    with model.run(SIX):
        drive(model, [10, 8, 3, 2, 1], 1.0)
    assert fates(model) == "CSCSS"
    assert reasons(model)[2] == "mask: off the schedule"


def test_a_mask_of_the_wrong_length_is_an_error_before_the_first_evaluation():
    with pytest.raises(OptionError, match="the mask has 3 entries, the run has 6 steps"):
        cached(twice, Static("101"), sigmas=SIX)
    model = cached(twice, Static("101"))
    with pytest.raises(OptionError, match="the mask has 3 entries, the run has 6 steps"), model.run(SIX):
        pass


def test_the_last_step_can_be_protected():
    assert fates_of(Method(last_step=True)) == "CSSSSSSSSC"
    assert fates_of(Method(gates=(LastStep(),))) == "CSSSSSSSSC"


def test_a_last_step_that_is_not_known_is_said_once_and_holds_nothing():
    model = cached(twice, Method(last_step=True))
    with pytest.warns(
        UserWarning, match=r"the last step cannot be protected: .*pass sigmas=, or use sample\(\)"
    ) as caught:
        drive(model, [*SIX[:-1], *SIX[:-1]], 1.0)
    assert len(caught) == 1
    assert fates(model) == "CSSSSS"


@pytest.mark.parametrize(
    ("limit", "expected"), [(-1, "CSSSSSSSSS"), (2, "CSSCCCCCCC"), (9, "CSSSSSSSSS"), (0, "CCCCCCCCCC")]
)
def test_max_cached_limits_the_skips_of_a_run(limit, expected):
    assert fates_of(Method(max_cached=limit)) == expected
    assert fates_of(Method(gates=(MaxCached(limit),))) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [(-1, "CSSSSSSSSS"), (1, "CSCSCSCSCS"), (2, "CSSCSSCSSC"), (0, "CCCCCCCCCC")]
)
def test_max_consecutive_limits_the_skips_in_a_row(limit, expected):
    assert fates_of(Method(max_consecutive=limit)) == expected
    assert fates_of(Method(gates=(MaxConsecutive(limit),))) == expected


def test_caps_count_evaluations_not_calls_and_not_steps():
    model = cached(twice, Method(max_cached=3), branches=("cond", "uncond"))
    with model.run(SIX, stages=2):
        for k, sigma in enumerate(heun(SIX)):
            model(filled(k, rows=2), level(sigma, rows=2))
    assert fates(model, "cond") == fates(model, "uncond") == "CSSSCCCCCCC"


def test_caps_begin_anew_in_every_run():
    model = cached(twice, Method(max_cached=2), sigmas=SIX)
    for _ in range(2):
        drive(model, SIX[:-1], 1.0)
        assert fates(model) == "CSSCCC"


@pytest.mark.parametrize("bad", [-2, 1.5, math.nan, math.inf, "3"])
@pytest.mark.parametrize("make", [MaxCached, MaxConsecutive, Warmup])
def test_counts_are_whole_numbers(make, bad):
    with pytest.raises(OptionError, match="accepted is a whole number"):
        make(bad)


def test_second_of_two_neither_reads_nor_writes_at_the_first_evaluation_of_a_step():
    """Skipped at (1, 1), from x' = 4 of (0, 1): 7 + 4. The firsts of steps 0 and 1, at 3 and 5, are not remembered."""
    model = cached(twice, Method(evaluations="second"))
    with model.run(SIX[-4:], stages=2):
        answers = drive(model, heun(SIX[-4:]), [3, 4, 5, 7, 9])
    assert fates(model) == "CCCSC"
    assert answers == [6, 8, 10, 7 + 4, 18]
    assert reasons(model) == ["first of two", "no memory yet", "first of two", "criterion", "first of two"]


def test_second_of_two_lets_samplers_of_one_evaluation_through():
    model = cached(twice, Method(evaluations="second"))
    with model.run(SIX, stages=1):
        drive(model, SIX[:-1], 1.0)
    assert fates(model) == "CSSSSS"


def test_second_of_two_says_once_that_it_cannot_act():
    model = cached(twice, Method(evaluations="second"), sigmas=SIX)
    with pytest.warns(UserWarning, match=r"evaluations='second' cannot act: .*sample\(\), or pass stages=") as caught:
        drive(model, [*SIX[:-1], *SIX[:-1]], 1.0)
    assert len(caught) == 1
    assert fates(model) == "CSSSSS"


def test_gates_are_asked_in_order_and_one_hold_is_enough():
    model = cached(twice, Method(start=0.2, warmup=3, last_step=True, max_consecutive=2), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert fates(model) == "CCCSSCSSCC"
    assert reasons(model) == [
        *["before window"] * 2,
        "warm-up",
        *["criterion"] * 2,
        "max_consecutive",
        *["criterion"] * 2,
        "max_consecutive",
        "after window",
    ]


class Memo(Gate):
    """Lets everything through and keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int, int]] = []

    def begin(self, run):
        def answer(position, counts) -> ComputeReason | None:
            self.told.append((position.evaluation, counts.computed, counts.skipped, counts.consecutive))
            return None

        return answer


@pytest.mark.parametrize("batched", [True, False])
def test_gates_are_told_what_happened_to_the_reference_in_evaluations(batched):
    """Two branches, window from step 2 of 6, every odd evaluation inside it skipped."""
    memo = Memo()
    method = Method(criterion=SkipOdd(), start=0.34, gates=(memo,), window=None)
    names = ("cond", "uncond")
    model = cached(twice, method, sigmas=SIX, branches=names if batched else lambda x, s, name: name)
    for sigma in SIX[:-1]:
        if batched:
            model(filled(1.0, rows=2), level(sigma, rows=2))
        else:
            for name in names:
                model(filled(1.0), level(sigma), name=name)
    assert fates(model, "cond") == "CCCSCC"
    assert memo.told == [(2, 2, 0, 0), (3, 3, 0, 0), (4, 3, 1, 1)]


# Reuse and the criteria: their published formulas on out = 2 x.


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
    fate   C     C     S 7.5 + 8     S 7 + 8       C            S 6 + 6.5
    """
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1), sigmas=SIX)
    answers = drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    assert fates(model) == "CCSSCS"
    assert answers == [20, 16, 15.5, 15, 13, 12.5]
    assert estimates(model) == [None, None, 0.0625, 0.1875, 0.375, 1 / 13]
    assert thresholds(model) == [None, 0.2, 0.2, 0.2, 0.2, 0.2]


def test_easycache_skips_only_strictly_below_the_threshold():
    model = cached(twice, EasyCache(0.1875, window=None, start=0, end=1), sigmas=SIX)
    drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    assert fates(model) == "CCSCSC"
    assert estimates(model)[2:4] == [0.0625, 0.1875]


def test_easycache_forgets_its_error_when_a_gate_computes():
    """x = 7.5 and 7 are skipped; the mask computes 6.75 (norm 13.5, k 2); E at 6.5 is 2 * 0.25 / 13.5 alone."""
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1, mask="000010"), sigmas=SIX)
    drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.75, 6.5])
    assert fates(model) == "CCSSCS"
    assert estimates(model) == [None, None, 0.0625, 0.1875, None, pytest.approx(0.5 / 13.5)]


def test_easycache_keeps_its_rate_where_the_network_did_not_move():
    """x 10, 8 give k = 2; at x = 8 again nothing has moved: no estimate, computed, k and norm stay."""
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1), sigmas=SIX)
    drive(model, SIX[:-1], [10, 8, 8, 7.5, 7, 6.5])
    assert fates(model) == "CCCSSC"
    assert estimates(model) == [None, None, None, 0.0625, 0.1875, 0.375]


def test_easycache_cannot_tell_where_the_network_answers_zero():
    model = cached(lambda x, sigma: 0 * x, EasyCache(5.0, window=None, start=0, end=1), sigmas=SIX)
    assert drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6]) == [0] * 6
    assert fates(model) == "CCCCCC"


def ucache(threshold=1.0, **options):
    return UCache(threshold, **{"start": 0, "end": 1, "window": None, **options})


FIRST_TWO = [13.0, 8.0]
"""out 26, 16: k = 2, norm 16, average 10, so sqrt(16 * 1.6 * 10) = 16 and a = 2 |x - 8| / 16 = |x - 8| / 8."""


def test_ucache_relative_error_grows_faster_with_every_skip():
    """Without a schedule f = 1. a (1 + m / 2):

    x      7              6                        5.5
    a      0.125          0.25                     0.3125
    E      0.125          0.125 + 0.25 * 1.5       0.5 + 0.3125 * 2
    fate   S 7 + 8        S 6 + 8                  C
    """
    model = cached(twice, ucache(1.0))
    answers = drive(model, SIX[:-2], [*FIRST_TWO, 7, 6, 5.5])
    assert fates(model) == "CCSSC"
    assert answers == [26, 16, 15, 14, 11]
    assert estimates(model) == pytest.approx([None, None, 0.125, 0.5, 1.125])
    assert thresholds(model) == [None, 1, 1, 1, 1]


def test_ucache_average_is_smoothed_over_the_computed_changes():
    """After x = 5.5 (out 11, change 5): average 0.8 * 10 + 0.2 * 5 = 9, norm 11, k 2.

    At 5: a = 2 * 0.5 / sqrt(11 * 1.6 * 9), with m back at 0 and E forgotten.
    """
    model = cached(twice, ucache(1.0))
    drive(model, SIX[:-1], [*FIRST_TWO, 7, 6, 5.5, 5])
    assert fates(model) == "CCSSCS"
    assert estimates(model)[-1] == pytest.approx(1 / math.sqrt(11 * 1.6 * 9), rel=1e-6)


def test_ucache_not_relative_compares_with_a_share_of_the_output():
    """a = 2 |x - 8|: 2, then 2 + 4 * 1.5 = 8, then 8 + 5 * 2 = 18, against 0.75 * 16 = 12.

    At x = 8 there is no rate yet and so no estimate, but a threshold all the same: 0.75 * 26.
    """
    model = cached(twice, ucache(0.75, relative=False))
    drive(model, SIX[:-2], [*FIRST_TWO, 7, 6, 5.5])
    assert fates(model) == "CCSSC"
    assert estimates(model) == pytest.approx([None, None, 2, 8, 18])
    assert thresholds(model) == pytest.approx([None, 19.5, 12, 12, 12])


def test_ucache_decay_forgets_a_share_of_the_error_at_every_evaluation():
    """E: 0.125, then 0.5 * 0.125 + 0.25 * 1.5 = 0.4375, then 0.5 * 0.4375 + 0.3125 * 2 = 0.84375."""
    model = cached(twice, ucache(1.0, decay=0.5))
    drive(model, SIX[:-2], [*FIRST_TWO, 7, 6, 5.5])
    assert fates(model) == "CCSSS"
    assert estimates(model) == pytest.approx([None, None, 0.125, 0.4375, 0.84375])


def test_ucache_without_reset_and_without_decay_never_skips_again_after_a_failed_test():
    """From E = 1.125 on it can only grow, however little the input moves."""
    with pytest.warns(
        UserWarning, match="^UCache with reset=0 and decay=1: the error only grows, so after the first failed test"
    ):
        method = ucache(1.0, reset=False)
    model = cached(twice, method)
    drive(model, TEN[:-1], [*FIRST_TWO, 7, 6, 5.5, 5.49, 5.48, 5.47, 5.46, 5.45])
    assert fates(model) == "CCSS" + "CCCCCC"
    assert all(estimate >= 1.125 for estimate in estimates(model)[4:])


def test_ucache_without_reset_but_with_decay_recovers():
    """The failed test at x = 0 leaves E = 0.125 * 0.1 + 1 * 1.5 = 1.5125 (m = 1); next 0.15125 + a small step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = ucache(1.0, reset=False, decay=0.1)
    model = cached(twice, method)
    drive(model, SIX[:-2], [*FIRST_TWO, 7, 16, 15.99])
    assert fates(model) == "CCSCS"
    assert estimates(model)[2:4] == pytest.approx([0.125, 1.5125])
    assert 0.15125 < estimates(model)[4] < 0.16


def test_ucache_forgets_its_error_when_a_gate_computes_only_with_reset():
    """The mask computes x = 6 (out 12, change 4): average 8.8, norm 12. Then at 5.5 a = 1 / sqrt(12 * 1.6 * 8.8)."""
    step = 1 / math.sqrt(12 * 1.6 * 8.8)
    for reset, before in ((True, 0.0), (False, 0.9 * 0.125)):
        model = cached(twice, ucache(1.0, reset=reset, decay=0.9, mask="000100"), sigmas=SIX)
        drive(model, SIX[:-1], [*FIRST_TWO, 7, 6, 5.5, 5.4])
        assert fates(model)[:5] == "CCSCS"
        assert estimates(model)[4] == pytest.approx(before + step, rel=1e-6)


def test_ucache_halves_its_threshold_early_and_raises_it_late():
    """f = 0.5 below 2 of 10 computed, 1.5 above 8 of 10. Everything moves too much to be skipped."""
    model = cached(twice, ucache(0.5), sigmas=TEN)
    drive(model, TEN[:-1], [2.0**k for k in range(1, 11)])
    assert fates(model) == "C" * 10
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
    assert fates(model) == "C" * len(asked)
    return [threshold for threshold in thresholds(model) if threshold is not None]


def test_ucache_progress_is_a_share_of_all_evaluations_that_the_method_sees():
    """After k of n: 0.5 below n / 5, 1.5 above 4 n / 5. k counts from 1: the very first evaluation has no memory.

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
    assert fates(model) == "CCCCSC"
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
    ("shape", "rows"), [((1, 1, 9, 2), (0, 4, 8)), ((2, 9, 3), (0, 4, 8)), ((1, 9), range(9)), ((9,), range(9))]
)
def test_how_far_a_skip_would_have_been_off_is_measured_on_every_fourth_row_of_images(shape, rows):
    """x' = 0: a prediction is x, the output 2 x, so off by |x|. Rows hold 1, 2, 4, ... to tell which are measured."""
    powers = 2.0 ** torch.arange(9)
    x = (powers[:, None] if len(shape) > 2 else powers).expand(shape).contiguous()
    model = cached(twice, Method(warmup=2), sigmas=SIX)
    model(torch.zeros(shape), torch.tensor(10.0))
    model(x, torch.tensor(8.0))
    assert offs(model)[1] == pytest.approx(sum(2.0**row for row in rows) / len(rows), rel=1e-6)
    assert sizes(model)[1] == pytest.approx(2 * 511 / 9, rel=1e-6)


def test_how_far_off_is_told_of_the_deciding_branch_on_every_computed_evaluation():
    """Also where a gate computed and the predictor was not needed; not of branches that follow."""
    model = cached(twice, Method(mask="101010"), sigmas=SIX, branches=("cond", "uncond"))
    for x, sigma in zip([10, 9, 7, 6, 5, 5], SIX[:-1], strict=True):
        model(filled(x, rows=2), level(sigma, rows=2))
    assert fates(model, "cond") == "CSCSCS"
    assert offs(model)[0::2] == [None, None, 3, None, 2, None]
    assert sizes(model)[0::2] == [20, None, 14, None, 10, None]
    assert {*offs(model)[1::2], *sizes(model)[1::2]} == {None}


def test_what_a_criterion_learned_in_one_run_does_not_reach_the_next():
    method = EasyCache(0.2, window=None, start=0, end=1)
    model = cached(twice, method, sigmas=SIX)
    for _ in range(2):
        drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
        assert fates(model) == "CCSSCS"
        assert estimates(model) == [None, None, 0.0625, 0.1875, 0.375, 1 / 13]
    assert method == EasyCache(0.2, window=None, start=0, end=1)
    assert method.criterion.error == 0
    assert method.criterion.response.rate is None


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
    options, expected_fates, expected = SEAM[gate]
    method = Method(**{"criterion": SkipOdd(), "predictor": LogSigmaLine(), **options})
    model = cached(lambda x, sigma: x * sigma.reshape(-1, 1, 1, 1), method, sigmas=OCTAVES)
    assert drive(model, OCTAVES[:-1], 1.0) == pytest.approx(expected, rel=1e-6)
    assert fates(model) == expected_fates


def test_a_new_criterion_and_a_new_predictor_work_on_second_evaluations_only():
    """Heun at 64, 32 | 32, 16 | 16, 8 | 8, 4 | 4: the seconds are evaluations 1, 3, 5, 7, all odd.

    1 and 3 are computed (32, 16; a line needs two); 5 is skipped to 0, 7 (sigma 4) to 16 - 32.
    """
    method = Method(criterion=SkipOdd(), predictor=LogSigmaLine(), evaluations="second")
    schedule = (64.0, 32.0, 16.0, 8.0, 4.0, 0.0)
    model = cached(lambda x, sigma: torch.ones_like(x) * sigma.reshape(-1, 1, 1, 1), method)
    with model.run(schedule, stages=2):
        answers = drive(model, heun(schedule), range(9))
    assert answers == [64, 32, 32, 16, 16, 0, 8, -16, 4]
    assert fates(model) == "CCCCCSCSC"


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


def test_a_predictor_is_given_at_most_the_memory_it_asks_for_oldest_first():
    given = []

    class Listening(LogSigmaLine):
        memory = 3

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
