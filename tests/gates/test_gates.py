"""Gates on toy networks, every decision worked out by hand.

Fates are one letter an evaluation: C computed, S skipped. With out = 2 x a computed evaluation answers 2 x, a skipped
one x + x' with x' the input of the last remembered evaluation.
"""

from __future__ import annotations

import math

import pytest
import torch
from toys import SIX, Forgetful, SkipOdd, cached, decisions, drive, filled, heun, level, reasons, twice

from stepcache import EasyCache, Method, OptionError, Static, StepMask, UCache
from stepcache.extend import (
    Branch,
    ComputeReason,
    Criterion,
    Gate,
    LastStep,
    MaxCached,
    MaxConsecutive,
    Verdict,
    Warmup,
    Window,
)

TEN = (*range(10, 0, -1), 0)


def decisions_of(method: Method, sigmas=TEN, **keywords) -> str:
    model = cached(twice, method, sigmas=sigmas, **keywords)
    drive(model, sigmas[:-1], 1.0)
    return decisions(model)


# The decisions of `Always` under one gate: S wherever the gate lets it.


def test_without_gates_always_skips_all_but_the_first():
    assert decisions_of(Method()) == "CSSSSSSSSS"


def test_window_in_steps_is_open_from_its_first_sigma_down_to_above_its_last():
    model = cached(twice, Method(start=0.2, end=0.8), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CCSSSSSSCC"
    assert reasons(model) == ["before window"] * 2 + ["no reason to compute"] * 6 + ["after window"] * 2
    assert model.report.notes == ["window 0.2 to 0.8 as shares of this run's 10 steps: 8 >= sigma > 2"]


def test_window_in_steps_leaves_out_the_last_step_even_at_end_1():
    assert decisions_of(Method(window="steps")) == "CSSSSSSSSC"
    assert decisions_of(Method(gates=(Window(),))) == "CSSSSSSSSC"


def test_window_multiplies_in_float32():
    """0.58 * 50 is 28.999999999999996 in float64 and 29 in float32."""
    sigmas = (*range(50, 0, -1), 0)
    assert decisions_of(Method(start=0.58), sigmas) == "C" * 29 + "S" * 20 + "C"


def test_window_in_steps_without_a_schedule_falls_back_to_the_training_timetable():
    model = cached(Forgetful(t_to_sigma=lambda t: 10 * t), Method(start=0.25, end=0.75, window="steps"))
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CCCSSSSSCC"
    said = "window 0.25 to 0.75 as shares of the training timetable (no schedule): 7.5 >= sigma > 2.5"
    assert said in model.report.notes


def test_window_in_training_shares_goes_by_the_models_own_timetable():
    method = Method(start=0.25, end=0.75, window="training")
    model = cached(Forgetful(t_to_sigma=lambda t: 10 * t), method, sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CCCSSSSSCC"
    assert model.report.notes == ["window 0.25 to 0.75 as shares of the training timetable: 7.5 >= sigma > 2.5"]


def test_window_in_training_shares_counts_timesteps_where_the_model_has_them():
    """5 timesteps: share p is timestep 4 (1 - p), so p = 0.25 is sigmas[3] and p = 0.5 is sigmas[2]."""
    table = torch.tensor([0.5, 1.5, 2.5, 6.5, 9.5])
    network = Forgetful(sigmas=table, get_sigmas=None, t_to_sigma=lambda t: table[t.long()])
    network.get_sigmas = lambda n: table.flip(0)
    model = cached(network, Method(start=0.25, end=0.5, window="training"), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CCCCSSSSCC"


def test_window_in_training_shares_is_already_open_in_img2img():
    method = Method(start=0.25, end=0.75, window="training")
    model = cached(Forgetful(t_to_sigma=lambda t: 10 * t), method, sigmas=TEN[5:])
    drive(model, TEN[5:-1], 1.0)
    assert decisions(model) == "CSSCC"


def test_window_in_training_shares_from_0_to_1_has_no_edges():
    """Sigmas above the timetable's highest and below its lowest are inside."""
    model = cached(Forgetful(t_to_sigma=lambda t: 2 + 3 * t), Method(window="training"), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CSSSSSSSSS"


def test_window_in_training_shares_without_a_timetable_falls_back_to_steps():
    model = cached(twice, Method(start=0.2, end=0.8, window="training"), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CCSSSSSSCC"
    assert "as shares of this run's 10 steps (no sigma table)" in model.report.notes[0]


def test_window_with_neither_schedule_nor_timetable_is_open_and_says_so():
    model = cached(twice, Method(start=0.2, end=0.8))
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CSSSSSSSSS"
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
    assert decisions_of(Method(warmup=3)) == "CCCSSSSSSS"


def test_warmup_counts_steps_not_evaluations_under_heun():
    model = cached(twice, Method(warmup=2))
    with model.run(SIX, stages=2):
        drive(model, heun(SIX), 1.0)
    assert decisions(model) == "CCCC" + "SSSSSSS"


def test_warmup_without_a_schedule_counts_evaluations():
    model = cached(twice, Method(warmup=3))
    drive(model, SIX[:-1], 1.0)
    assert decisions(model) == "CCCSSS"
    assert reasons(model) == ["warm-up"] * 3 + ["no reason to compute"] * 3


def test_a_dynamic_mask_asks_the_criterion_on_its_zeros():
    """The criterion would skip 1, 3, 5; the mask holds 0, 1, 5."""
    model = cached(twice, Method(criterion=SkipOdd(), mask="110001"), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert decisions(model) == "CCCSCC"
    assert reasons(model) == ["mask", "mask", "criterion", "no reason to compute", "criterion", "mask"]


def test_a_static_mask_skips_all_its_zeros_without_asking():
    class Unasked(Criterion):
        def decide(self, branch: Branch) -> Verdict:
            raise AssertionError("asked")

    model = cached(twice, Method(criterion=Unasked(), mask=StepMask("110001", "static")), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert decisions(model) == "CCSSSC"
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


def test_a_static_mask_computes_a_zero_that_has_no_cache():
    model = cached(twice, Static("001001"), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert decisions(model) == "CSCSSC"
    assert reasons(model)[0] == "no cache yet"


def test_a_mask_holds_steps_not_evaluations_under_heun():
    model = cached(twice, Static("101001"))
    with model.run(SIX, stages=2):
        drive(model, heun(SIX), 1.0)
    assert decisions(model) == "CC" + "SS" + "CC" + "SS" + "SS" + "C"


def test_a_preset_takes_the_runs_own_number_of_steps():
    sigmas = (*range(28, 0, -1), 0)
    expected = "1111110100010000100000100001".replace("1", "C").replace("0", "S")
    assert decisions_of(Static("fast"), sigmas) == expected
    model = cached(twice, Static("fast"))
    for n in (28, 5):
        with model.run(sigmas[-n - 1 :]):
            drive(model, sigmas[-n - 1 : -1], 1.0)
        digits = StepMask("fast").for_steps(n)
        assert decisions(model) == "".join("SC"[digit] for digit in digits)


def test_a_mask_without_a_schedule_computes_everything_and_says_so_once():
    model = cached(twice, Static("fast"))
    with pytest.warns(UserWarning, match="the mask cannot act: this run's schedule is not known") as caught:
        drive(model, [*SIX[:-1], *SIX[:-1]], 1.0)
    assert len(caught) == 1
    assert decisions(model) == "CCCCCC"
    assert reasons(model) == ["mask: no schedule"] * 6
    assert any("the mask cannot act" in note for note in model.report.notes)


def test_a_mask_computes_a_sigma_that_is_off_the_schedule():
    model = cached(twice, Static("100000"))
    with model.run(SIX):
        drive(model, [10, 8, 3, 2, 1], 1.0)
    assert decisions(model) == "CSCSS"
    assert reasons(model)[2] == "mask: off the schedule"


def test_a_mask_of_the_wrong_length_is_an_error_before_the_first_evaluation():
    with pytest.raises(OptionError, match="the mask has 3 entries, the run has 6 steps"):
        cached(twice, Static("101"), sigmas=SIX)
    model = cached(twice, Static("101"))
    with pytest.raises(OptionError, match="the mask has 3 entries, the run has 6 steps"), model.run(SIX):
        pass


def test_the_last_step_can_be_protected():
    assert decisions_of(Method(last_step=True)) == "CSSSSSSSSC"
    assert decisions_of(Method(gates=(LastStep(),))) == "CSSSSSSSSC"


def test_a_last_step_that_is_not_known_is_said_once_and_holds_nothing():
    model = cached(twice, Method(last_step=True))
    with pytest.warns(
        UserWarning, match=r"the last step cannot be protected: .*pass sigmas=, or use sample\(\)"
    ) as caught:
        drive(model, [*SIX[:-1], *SIX[:-1]], 1.0)
    assert len(caught) == 1
    assert decisions(model) == "CSSSSS"


@pytest.mark.parametrize(
    ("limit", "expected"), [(-1, "CSSSSSSSSS"), (2, "CSSCCCCCCC"), (9, "CSSSSSSSSS"), (0, "CCCCCCCCCC")]
)
def test_max_cached_limits_the_skips_of_a_run(limit, expected):
    assert decisions_of(Method(max_cached=limit)) == expected
    assert decisions_of(Method(gates=(MaxCached(limit),))) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [(-1, "CSSSSSSSSS"), (1, "CSCSCSCSCS"), (2, "CSSCSSCSSC"), (0, "CCCCCCCCCC")]
)
def test_max_consecutive_limits_the_skips_in_a_row(limit, expected):
    assert decisions_of(Method(max_consecutive=limit)) == expected
    assert decisions_of(Method(gates=(MaxConsecutive(limit),))) == expected


def test_caps_count_evaluations_not_calls_and_not_steps():
    model = cached(twice, Method(max_cached=3), branches=("cond", "uncond"))
    with model.run(SIX, stages=2):
        for sigma in heun(SIX):
            model(filled(1.0, rows=2), level(sigma, rows=2))
    assert decisions(model, "cond") == decisions(model, "uncond") == "CSSSCCCCCCC"


def test_caps_begin_anew_in_every_run():
    model = cached(twice, Method(max_cached=2), sigmas=SIX)
    for _ in range(2):
        drive(model, SIX[:-1], 1.0)
        assert decisions(model) == "CSSCCC"


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
    assert decisions(model) == "CCCSC"
    assert answers == [6, 8, 10, 7 + 4, 18]
    assert reasons(model) == ["first of two", "no cache yet", "first of two", "no reason to compute", "first of two"]


def test_second_of_two_lets_samplers_of_one_evaluation_through():
    model = cached(twice, Method(evaluations="second"))
    with model.run(SIX, stages=1):
        drive(model, SIX[:-1], 1.0)
    assert decisions(model) == "CSSSSS"


def test_second_of_two_says_once_that_it_cannot_act():
    model = cached(twice, Method(evaluations="second"), sigmas=SIX)
    with pytest.warns(UserWarning, match=r"evaluations='second' cannot act: .*sample\(\), or pass stages=") as caught:
        drive(model, [*SIX[:-1], *SIX[:-1]], 1.0)
    assert len(caught) == 1
    assert decisions(model) == "CSSSSS"


def test_gates_are_asked_in_order_and_one_hold_is_enough():
    model = cached(twice, Method(start=0.2, warmup=3, last_step=True, max_consecutive=2), sigmas=TEN)
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CCCSSCSSCC"
    assert reasons(model) == [
        *["before window"] * 2,
        "warm-up",
        *["no reason to compute"] * 2,
        "max_consecutive",
        *["no reason to compute"] * 2,
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
    assert decisions(model, "cond") == "CCCSCC"
    assert memo.told == [(2, 2, 0, 0), (3, 3, 0, 0), (4, 3, 1, 1)]
