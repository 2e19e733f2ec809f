"""Where an evaluation stands, from hand-written sequences of sigmas. Places are (run, evaluation, step, stage)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toys import SIX, heun, level

from stepcache import OptionError
from stepcache.clock import CHURN, RISE, as_schedule
from stepcache.extend import Clock, Position

PLAIN_STEPS = [(step, 0) for step in range(6)]
TWO_A_STEP = [(step, stage) for step in range(5) for stage in (0, 1)] + [(5, 0)]


def walk(clock: Clock, sigmas, notes=None) -> list[Position]:
    """The places themselves, so that what a later evaluation teaches about an earlier one shows."""
    places = []
    for k, sigma in enumerate(sigmas):
        places.append(clock.locate(sigma if isinstance(sigma, torch.Tensor) else level(sigma)))
        if notes is not None and notes[k] is not None:
            clock.set_step(notes[k])
    return places


def steps(places: list[Position]) -> list[tuple[int | None, int]]:
    return [(position.step, position.stage) for position in places]


def runs(places: list[Position]) -> list[int]:
    return [position.run for position in places]


def evaluations(places: list[Position]) -> list[int]:
    return [position.evaluation for position in places]


class OnAccelerator(torch.Tensor):
    """A tensor that says it is on a GPU, and can be read."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def test_euler_walks_the_schedule():
    clock = Clock(SIX)
    places = walk(clock, SIX[:-1])
    assert steps(places) == PLAIN_STEPS
    assert evaluations(places) == [0, 1, 2, 3, 4, 5]
    assert runs(places) == [0] * 6
    assert [clock.is_last(position) for position in places] == [False] * 5 + [True]
    assert [position.sigma for position in places] == list(SIX[:-1])


def test_a_known_number_of_stages_names_heuns_corrector_at_once():
    clock = Clock()
    clock.announce(SIX, stages=2)
    seen = []
    for sigma in heun(SIX):
        position = clock.locate(level(sigma))
        seen.append((position.step, position.stage))
    assert seen == TWO_A_STEP


def test_heuns_first_corrector_is_relabelled_when_its_sigma_comes_again():
    clock = Clock(SIX)
    first, corrector = walk(clock, [10, 8])
    assert (corrector.step, corrector.stage) == (1, 0)
    again = clock.locate(level(8))
    assert steps([first, corrector, again]) == [(0, 0), (0, 1), (1, 0)]


def test_heuns_later_correctors_are_named_at_once():
    clock = Clock(SIX)
    walk(clock, [10, 8, 8])
    seen = []
    for sigma in heun(SIX)[3:]:
        position = clock.locate(level(sigma))
        seen.append((position.step, position.stage))
    assert seen == TWO_A_STEP[3:]


def test_each_run_learns_anew_whether_it_has_correctors():
    places = walk(Clock(SIX), [*heun(SIX), *SIX[:-1]])
    assert steps(places) == TWO_A_STEP + PLAIN_STEPS
    assert runs(places) == [0] * 11 + [1] * 6


def dpm2(sigmas) -> list[float]:
    asked = []
    for high, low in itertools.pairwise(sigmas):
        asked += [high, math.exp((math.log(high) + math.log(low)) / 2)] if low > 0 else [high]
    return asked


def test_dpm2_midpoints_are_the_second_stage():
    clock = Clock(SIX)
    places = walk(clock, dpm2(SIX))
    assert steps(places) == TWO_A_STEP
    assert places[1].sigma == pytest.approx(math.sqrt(80))


def test_dpm2_midpoints_with_a_plan():
    clock = Clock()
    clock.announce(SIX, stages=2)
    assert steps(walk(clock, dpm2(SIX))) == TWO_A_STEP


def test_churn_with_a_plan_keeps_its_steps():
    clock = Clock()
    clock.announce(SIX, stages=1)
    places = walk(clock, [sigma * CHURN for sigma in SIX[:-1]])
    assert steps(places) == PLAIN_STEPS
    assert runs(places) == [0] * 6


def test_churned_heun_with_a_plan_keeps_its_steps():
    clock = Clock()
    clock.announce(SIX, stages=2)
    asked = []
    for high, low in itertools.pairwise(SIX):
        asked += [high * 1.4, low] if low > 0 else [high * 1.4]
    assert steps(walk(clock, asked)) == TWO_A_STEP


def test_churn_without_a_plan_takes_its_steps_from_the_callback():
    places = walk(Clock(SIX), [sigma * 1.2 for sigma in SIX[:-1]], notes=range(6))
    assert steps(places) == PLAIN_STEPS
    assert runs(places) == [0] * 6


def test_churn_on_the_first_sigma_is_the_first_step():
    assert steps(walk(Clock(SIX), [10 * CHURN])) == [(0, 0)]
    assert steps(walk(Clock(SIX), [10 * CHURN * 1.01])) == [(None, 0)]


def test_a_restart_schedule_given_whole_is_walked_in_order():
    restart = (10.0, 5.0, 1.0, 5.0, 1.0, 0.5, 0.0)
    for announced, asked, expected in (
        (False, restart[:-1], PLAIN_STEPS),
        (True, restart[:-1], PLAIN_STEPS),
        (False, heun(restart), TWO_A_STEP),
    ):
        clock = Clock(restart)
        if announced:
            clock.announce(stages=1)
        places = walk(clock, asked)
        assert steps(places) == expected
        assert set(runs(places)) == {0}


def test_a_restart_interval_inside_a_known_schedule_goes_back_to_its_step():
    places = walk(Clock(SIX), [10, 8, 6, 4, 8, 6, 4, 2, 1])
    assert steps(places) == [(step, 0) for step in (0, 1, 2, 3, 1, 2, 3, 4, 5)]
    assert evaluations(places) == list(range(9))


def test_a_restart_interval_without_a_schedule_begins_a_run_only_above_what_churn_can_do():
    assert runs(walk(Clock(), [10, 4, 4 * CHURN, 2])) == [0, 0, 0, 0]
    assert runs(walk(Clock(), [10, 4, 4 * RISE * 1.01, 2])) == [0, 0, 1, 1]


def test_the_same_schedule_again_is_a_new_run():
    places = walk(Clock(SIX), [*SIX[:-1], *SIX[:-1]])
    assert runs(places) == [0] * 6 + [1] * 6
    assert steps(places) == PLAIN_STEPS * 2
    assert evaluations(places) == [0, 1, 2, 3, 4, 5] * 2


def test_an_interrupted_run_ends_where_the_next_begins():
    places = walk(Clock(SIX), [10, 8, 6, *SIX[:-1]])
    assert runs(places) == [0, 0, 0] + [1] * 6


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_an_interrupted_run_that_began_inside_the_schedule_ends_where_the_next_begins(stop):
    """img2img twice, the first one stopped."""
    places = walk(Clock(SIX), [*SIX[1 : 1 + stop], *SIX[1:-1]])
    assert runs(places) == [0] * stop + [1] * 5
    assert steps(places)[stop:] == PLAIN_STEPS[1:]


def test_an_interrupted_churned_run_ends_where_the_next_begins():
    places = walk(Clock(SIX), [12, 8, 6, 12, 8, 6])
    assert runs(places) == [0, 0, 0, 1, 1, 1]


def test_another_schedule_that_starts_higher_is_a_new_run():
    places = walk(Clock(SIX), [*SIX[:-1], 40, 20, 10])
    assert runs(places) == [0] * 6 + [1] * 3
    assert steps(places)[6:8] == [(None, 0), (None, 0)]


def test_another_schedule_that_starts_lower_is_a_new_run():
    assert runs(walk(Clock(SIX), [*SIX[:-1], 7, 3, 0.5])) == [0] * 6 + [1] * 3


def test_another_schedule_that_starts_below_where_the_last_run_ended_is_a_new_run():
    assert runs(walk(Clock(SIX), [*SIX[:-1], 0.7, 0.3])) == [0] * 6 + [1] * 2


@pytest.mark.parametrize("start", [9, 13, 40])
def test_after_an_interruption_a_rise_that_does_not_fit_the_schedule_is_a_new_run(start):
    assert runs(walk(Clock(SIX), [10, 8, 6, 4, start, start / 2]))[:5] == [0] * 4 + [1]


def test_one_step_schedules_are_a_run_each():
    places = walk(Clock((10.0, 0.0)), [10, 10, 10])
    assert runs(places) == [0, 1, 2]
    assert steps(places) == [(0, 0)] * 3
    assert runs(walk(Clock(), [10, 10, 10])) == [0, 1, 2]


def test_without_a_schedule_steps_are_not_known_and_a_rise_is_a_new_run():
    places = walk(Clock(), [10, 5, 1, 10, 5, 1, 30, 2, 9])
    assert runs(places) == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert {(position.step, position.stage) for position in places} == {(None, 0)}
    assert evaluations(places) == [0, 1, 2, 0, 1, 2, 0, 1, 0]


def test_without_a_schedule_the_first_sigma_again_is_a_new_run_however_small_the_rise():
    assert runs(walk(Clock(), [10, 9, 8, 10, 9, 8])) == [0, 0, 0, 1, 1, 1]


def test_a_run_whose_first_sigma_is_not_on_the_schedule_has_no_steps():
    assert steps(walk(Clock(SIX), [7, 5])) == [(None, 0), (None, 0)]


def test_one_sigma_off_the_schedule_loses_the_step_and_the_next_one_on_it_finds_it():
    clock = Clock()
    clock.announce(SIX)
    places = walk(clock, [10, 8, 3, 2, 1])
    assert steps(places) == [(0, 0), (1, 0), (None, 0), (4, 0), (5, 0)]
    assert runs(places) == [0] * 5


def test_a_step_has_no_third_evaluation():
    places = walk(Clock(SIX), [10, 9, 8.5, 8])
    assert steps(places) == [(0, 0), (0, 1), (None, 0), (1, 0)]


def test_a_first_sigma_inside_the_schedule_begins_at_its_step():
    places = walk(Clock(SIX), [4, 2, 1, 4, 2, 1])
    assert steps(places) == [(3, 0), (4, 0), (5, 0)] * 2
    assert runs(places) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("asked", [[10, 5, 2, 1.5], [10, 5, 5, 2, 2, 1.5], [10, 5, 2, 10]])
def test_evaluations_at_and_below_a_last_sigma_above_zero_have_no_step_beyond_the_schedule(asked):
    """UniPC evaluates once more, at the schedule's last sigma."""
    places = walk(Clock((10.0, 5.0, 2.0)), asked)
    assert {position.step for position in places} <= {None, 0, 1}


def test_heun_on_one_step_that_ends_above_zero_stays_in_that_step():
    places = walk(Clock((10.0, 5.0)), [10, 5, 10, 5])
    assert steps(places) == [(0, 0), (0, 1)] * 2
    assert runs(places) == [0, 0, 1, 1]


@pytest.mark.parametrize("noted", [6, 99, -1])
def test_a_callback_that_names_no_step_of_the_schedule_breaks_nothing(noted):
    clock = Clock(SIX)
    places = walk(clock, SIX[:-1], notes=[None, noted, None, None, None, None])
    assert steps(places)[2:] == PLAIN_STEPS[2:]
    assert runs(places) == [0] * 6


def karras(n: int) -> torch.Tensor:
    ramp = torch.linspace(0, 1, n)
    return torch.cat([(14.6 ** (1 / 7) + ramp * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7, torch.zeros(1)])


@pytest.mark.parametrize("sigmas", [karras(50), torch.linspace(1, 0, 51)], ids=["karras", "flow"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sigmas_keep_their_steps_over_50_steps(sigmas, dtype):
    places = walk(Clock(sigmas), [sigma.to(dtype).expand(2) for sigma in sigmas[:-1]] * 2)
    assert steps(places) == [(step, 0) for step in range(50)] * 2
    assert runs(places) == [0] * 50 + [1] * 50
    assert [position.sigma for position in places[:50]] == sigmas[:-1].tolist()


def test_half_precision_sigmas_begin_at_the_nearest_step_of_a_dense_schedule():
    sigmas = torch.linspace(1, 0, 201)
    assert steps(walk(Clock(sigmas), [sigmas[100].bfloat16()])) == [(100, 0)]
    assert steps(walk(Clock(sigmas), [sigmas[30].bfloat16()])) == [(30, 0)]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1, 1, 1)])
def test_sigma_may_have_any_shape_with_equal_elements(shape):
    assert walk(Clock(SIX), [torch.full(shape, 10.0), torch.full(shape, 8.0)])[1].step == 1


def test_sigmas_that_differ_within_a_batch_have_no_step():
    places = walk(Clock(SIX), [10, torch.tensor([8.0, 5.0]), 6, 4])
    assert steps(places) == [(0, 0), (None, 0), (2, 0), (3, 0)]
    assert [position.mixed for position in places] == [False, True, False, False]
    assert places[1].sigma == 8
    assert runs(places) == [0] * 4


def test_the_callback_numbers_the_steps_of_a_run_without_a_schedule():
    places = walk(Clock(), [10, 5, 1], notes=[0, 1, 2])
    assert steps(places) == [(0, 0), (1, 0), (2, 0)]


def test_the_callback_tells_the_stages_of_a_run_without_a_schedule():
    places = walk(Clock(), [10, 5, 5, 1, 1], notes=[0, None, 1, None, 2])
    assert steps(places) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_the_callback_before_any_evaluation_says_nothing():
    clock = Clock(SIX)
    clock.set_step(3)
    assert steps(walk(clock, [10])) == [(0, 0)]


def test_an_announced_run_ends_with_its_announcement():
    clock = Clock()
    clock.announce(SIX, stages=1)
    places = walk(clock, [10, 8])
    assert clock.steps == 6
    clock.end()
    assert clock.steps is None
    places += walk(clock, [6, 4])
    assert runs(places) == [0, 0, 1, 1]
    assert steps(places) == [(0, 0), (1, 0), (None, 0), (None, 0)]


@pytest.mark.parametrize(("stages", "again"), [(None, SIX[:-1]), (1, SIX[:-1]), (None, heun(SIX)), (2, heun(SIX))])
def test_a_second_loop_within_an_announced_run_is_another_run(stages, again):
    clock = Clock()
    clock.announce(SIX, stages)
    places = walk(clock, [*again, *again])
    assert runs(places) == [0] * len(again) + [1] * len(again)
    assert evaluations(places) == [*range(len(again))] * 2
    assert steps(places) == (PLAIN_STEPS if len(again) == 6 else TWO_A_STEP) * 2
    clock.end()
    assert clock.steps is None


@pytest.mark.parametrize("stages", [None, 1])
def test_a_second_loop_within_an_announced_run_may_begin_inside_the_schedule(stages):
    clock = Clock()
    clock.announce(SIX, stages)
    places = walk(clock, [*SIX[:-1], *SIX[2:-1], *SIX[2:-1]])
    assert runs(places) == [0] * 6 + [1] * 4 + [2] * 4
    assert steps(places)[6:] == PLAIN_STEPS[2:] * 2


def test_the_plan_holds_for_the_second_loop_at_once():
    """Heun's first corrector is named before its sigma comes again, in either loop."""
    clock = Clock()
    clock.announce(SIX, stages=2)
    seen = []
    for sigma in heun(SIX) * 2:
        position = clock.locate(level(sigma))
        seen.append((position.step, position.stage))
    assert seen == TWO_A_STEP * 2


@pytest.mark.parametrize(("stages", "expected"), [(1, PLAIN_STEPS), (2, TWO_A_STEP)])
def test_of_a_second_loop_on_an_accelerator_only_the_first_sigma_is_read(stages, expected):
    unreadable = torch.full((2,), 3.0, device="meta")
    clock = Clock()
    clock.announce(SIX, stages, on_schedule=True)
    asked = [unreadable] * len(expected) + [level(10).as_subclass(OnAccelerator)] + [unreadable] * (len(expected) - 1)
    places = walk(clock, asked)
    assert runs(places) == [0] * len(expected) + [1] * len(expected)
    assert steps(places) == expected * 2


@pytest.mark.parametrize("stages", [None, 1])
@pytest.mark.parametrize("loops", [True, False])
def test_an_announced_loop_begun_again_at_the_first_sigma_is_another_run_if_the_sampler_may_loop(stages, loops):
    clock = Clock()
    clock.announce(SIX, stages, loops=loops)
    places = walk(clock, [*SIX[:-2], *SIX[:-2]])
    assert runs(places) == [0] * 5 + [int(loops)] * 5
    assert evaluations(places) == [*range(5), *range(5)] if loops else list(range(10))


@pytest.mark.parametrize("stages", [None, 1])
def test_a_plan_that_returns_to_its_first_sigma_stays_one_run(stages):
    clock = Clock()
    clock.announce((10.0, 5.0, 10.0, 5.0, 0.0), stages)
    places = walk(clock, [10, 5, 10, 5])
    assert runs(places) == [0] * 4
    assert steps(places) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_an_announced_run_that_ends_above_zero_has_no_last_evaluation_and_goes_on():
    clock = Clock()
    clock.announce((10.0, 5.0, 2.0))
    assert runs(walk(clock, [10, 5, 2, 10, 5, 2])) == [0] * 6


def test_an_announcement_begins_a_run_without_any_rise():
    clock = Clock(SIX)
    places = walk(clock, [10, 8])
    clock.announce((6.0, 4.0, 0.0), stages=1)
    places += walk(clock, [6, 4])
    assert runs(places) == [0, 0, 1, 1]
    assert steps(places) == [(0, 0), (1, 0), (0, 0), (1, 0)]


def test_an_announcement_without_a_schedule_takes_the_default_one():
    clock = Clock(SIX)
    clock.announce()
    assert steps(walk(clock, heun(SIX))) == TWO_A_STEP
    clock.announce((3.0, 0.0))
    clock.end()
    assert clock.schedule == SIX


def test_an_announcement_that_is_refused_changes_nothing():
    clock = Clock(SIX)
    with pytest.raises(OptionError, match="stages=3"):
        clock.announce((5.0, 0.0), stages=3)
    with pytest.raises(OptionError, match="two or more finite numbers"):
        clock.announce([5.0], stages=1)
    assert clock.schedule == SIX
    assert not clock.announced


def test_restart_makes_the_next_evaluation_the_first_of_a_run():
    clock = Clock(SIX)
    places = walk(clock, [10, 8])
    clock.restart()
    places += walk(clock, [6])
    assert [(w.run, w.evaluation, w.step) for w in places] == [(0, 0, 0), (0, 1, 1), (1, 0, 2)]


NO_SCHEDULES = [[1.0], [], [1.0, -1.0], [1.0, math.nan], [math.inf, 1.0], 5, "x", ["x", 0], [[]], [1j, 0], [10**400, 0]]


@pytest.mark.parametrize("bad", [*NO_SCHEDULES, [1e300, 0], object(), torch.ones(())])
def test_what_is_no_schedule_is_refused(bad):
    with pytest.raises(OptionError, match="two or more finite numbers >= 0, highest first"):
        as_schedule(bad)


def test_schedules_are_float32_numbers_from_tensors_and_lists_alike():
    assert as_schedule([0.1, 0.0]) == as_schedule(torch.tensor([0.1, 0.0])) == (float(torch.tensor(0.1)), 0.0)
    assert as_schedule(torch.tensor([[4.0, 2.0]], dtype=torch.float64, requires_grad=True)) == (4.0, 2.0)
    assert as_schedule(None) is None


@pytest.mark.parametrize(("stages", "expected"), [(1, PLAIN_STEPS), (2, TWO_A_STEP)])
def test_with_a_plan_nothing_is_read_off_an_accelerator(stages, expected):
    unreadable = torch.full((2,), 3.0, device="meta")
    clock = Clock()
    clock.announce(SIX, stages, on_schedule=True)
    places = walk(clock, [unreadable] * len(expected))
    assert steps(places) == expected
    assert evaluations(places) == list(range(len(expected)))
    assert [position.sigma for position in places if position.stage == 0] == list(SIX[:-1])
    assert all(SIX[w.step + 1] <= w.sigma < SIX[w.step] for w in places if w.stage == 1)


def test_a_plan_on_an_accelerator_begins_again_with_the_next_announcement():
    unreadable = torch.full((2,), 3.0, device="meta")
    clock = Clock()
    for _ in range(2):
        clock.announce((10.0, 5.0, 0.0), stages=1)
        places = walk(clock, [unreadable] * 2)
        clock.end()
        assert steps(places) == [(0, 0), (1, 0)]
    assert runs(places) == [1, 1]


def test_a_plan_that_was_interrupted_is_not_counted_on_without_looking():
    """An announced run goes on after an exception or a change of shape: its steps must not shift."""
    for sigma_type in (torch.Tensor, OnAccelerator):
        clock = Clock()
        clock.announce(SIX, stages=1)
        asked = [level(sigma).as_subclass(sigma_type) for sigma in SIX[:-1]]
        walk(clock, asked[:2])
        clock.restart()
        assert steps(walk(clock, asked[2:])) == PLAIN_STEPS[2:]


falling = st.builds(
    lambda start, ratios: tuple(itertools.accumulate(ratios, lambda a, b: a * b, initial=start)),
    st.floats(0.5, 500),
    st.lists(st.floats(0.3, 0.999), max_size=25),
)


@settings(deadline=None, max_examples=80)
@given(falling, st.booleans(), st.booleans())
def test_euler_visits_every_step_once_announced_or_not(sigmas, announced, stages_known):
    clock = Clock(None if announced else (*sigmas, 0.0))
    if announced:
        clock.announce((*sigmas, 0.0), 1 if stages_known else None)
    places = walk(clock, sigmas)
    assert steps(places) == [(step, 0) for step in range(len(sigmas))]
    assert evaluations(places) == list(range(len(sigmas)))
    assert set(runs(places)) == {0}


@settings(deadline=None, max_examples=80)
@given(falling, st.booleans(), st.booleans())
def test_heun_makes_two_evaluations_a_step_but_for_the_last(sigmas, announced, stages_known):
    schedule, n = (*sigmas, 0.0), len(sigmas)
    clock = Clock(None if announced else schedule)
    if announced:
        clock.announce(schedule, 2 if stages_known else None)
    places = walk(clock, heun(schedule))
    assert len(places) == 2 * n - 1
    assert steps(places) == [(step, stage) for step in range(n - 1) for stage in (0, 1)] + [(n - 1, 0)]
    assert evaluations(places) == list(range(2 * n - 1))


@settings(deadline=None, max_examples=80)
@given(falling, st.sampled_from([lambda s: list(s[:-1]), heun, dpm2]), st.integers(1, 60))
def test_a_run_after_another_on_the_schedule_is_told_apart_even_if_the_first_was_stopped(sigmas, sampler, stop):
    schedule = (*sigmas, 0.0)
    asked = sampler(schedule)
    stopped = asked[:stop]
    places = walk(Clock(schedule), [*stopped, *asked])
    assert runs(places) == [0] * len(stopped) + [1] * len(asked)
    assert evaluations(places) == [*range(len(stopped)), *range(len(asked))]
    assert [position.step for position in places[len(stopped) :] if position.stage == 0] == list(range(len(sigmas)))


@settings(deadline=None, max_examples=80)
@given(falling, falling)
def test_a_run_on_another_schedule_is_told_apart_from_a_finished_one(known, other):
    assume(all(abs(a - b) > 1e-4 * b for a, b in itertools.product(other, known)))
    places = walk(Clock((*known, 0.0)), [*known, *other])
    assert runs(places)[: len(known)] == [0] * len(known)
    first, *_ = others = places[len(known) :]
    assert (first.run, first.evaluation) == (1, 0)
    assert min(runs(others)) == 1


@settings(deadline=None, max_examples=80)
@given(falling, st.integers(1, 30))
def test_without_a_schedule_the_same_run_again_is_told_apart_even_if_the_first_was_stopped(sigmas, stop):
    places = walk(Clock(), [*sigmas[:stop], *sigmas])
    assert runs(places) == [0] * len(sigmas[:stop]) + [1] * len(sigmas)


@settings(deadline=None, max_examples=80)
@given(
    st.none() | falling.map(lambda sigmas: (*sigmas, 0.0)),
    st.lists(st.floats(0.01, 600), min_size=1, max_size=40),
    st.booleans(),
)
def test_evaluations_count_up_by_one_within_a_run_and_runs_by_one(schedule, asked, repeat):
    asked = [sigma for sigma in asked for _ in range(1 + repeat)]
    places = walk(Clock(schedule), asked)
    assert (places[0].run, places[0].evaluation) == (0, 0)
    for before, after in itertools.pairwise(places):
        expected = [(before.run, before.evaluation + 1), (before.run + 1, 0)]
        assert (after.run, after.evaluation) in expected
    assert all(position.step is None or position.step < len(schedule) - 1 for position in places)


def test_a_loop_broken_off_and_begun_again_further_down_is_a_new_run():
    """A callback raised in step 3; the next loop begins at 1: reusing the old loop's cache would cost the image."""
    assert runs(walk(Clock(SIX), [10, 8, 6, 4, 1])) == [0] * 4 + [1]


def test_two_steps_begun_in_a_row_tell_that_there_is_one_evaluation_a_step():
    """Churn: from the third step on a sigma between two of the schedule's is the next step's, not a midpoint."""
    clock = Clock()
    clock.announce(SIX)
    places = []
    for step, sigma in enumerate([10, 9, 7, 5]):
        places.append(clock.locate(level(sigma)))
        if step == 3:
            break
        clock.set_step(step)
    assert steps(places) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_a_schedule_that_comes_back_to_a_sigma_goes_on_to_its_next_occurrence():
    restart = (8.0, 4.0, 2.0, 1.0, 3.0, 2.0, 1.0, 0.5, 0.0)
    clock = Clock()
    clock.announce(restart)
    assert [step for step, _ in steps(walk(clock, [8, 4, 2, 1, 2, 1, 0.5]))] == [0, 1, 2, 3, 5, 6, 7]
