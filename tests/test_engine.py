"""The contracts of the design, on toy networks."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import pickle
import re
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from several_ranks import together
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import (
    SIX,
    Forgetful,
    LogSigmaLine,
    SkipOdd,
    Toy,
    cached,
    decisions,
    drive,
    filled,
    heun,
    level,
    plain,
    reasons,
    twice,
)

from stepcache import EasyCache, Method, Off, OptionError, Report, Static, StepMask, UCache
from stepcache.extend import (
    Always,
    Branch,
    Call,
    Criterion,
    DeferredScalars,
    EasyCacheRule,
    Engine,
    Predictor,
    Reuse,
    Verdict,
)
from stepcache.samplers.k_diffusion import CachedDenoiser, DenoiserCall, InTurn, sample

# Off is off.

NOTHING_TO_SKIP = {
    "no method": None,
    "off": Off(),
    "none": "none",
    "ucache threshold 0": UCache(0),
    "easycache threshold 0": EasyCache(0),
    "threshold 0 with a dynamic mask": UCache(0, mask="110101"),
    "all-ones mask": UCache(mask="111111"),
    "all-ones static mask": Static("111111"),
    "max_cached 0": Method(max_cached=0),
    "max_consecutive 0": UCache(max_consecutive=0),
}


@pytest.mark.parametrize("method", NOTHING_TO_SKIP.values(), ids=NOTHING_TO_SKIP)
@pytest.mark.parametrize("known", [True, False])
def test_off_makes_the_same_calls_and_returns_the_models_own_tensors(method, known):
    network = Toy()
    model = cached(network, method, sigmas=SIX if known else None)
    mark = object()
    asked = [(torch.randn(2, 1, 2, 2), level(sigma, rows=2)) for sigma in SIX[:-1]]
    answers = [model(x, sigma, extra=mark) for x, sigma in asked]
    assert all(a is b for a, b in zip(answers, network.returned, strict=True))
    assert all(
        x is seen_x and sigma is seen_sigma and extra == {"extra": mark}
        for (x, sigma), (seen_x, seen_sigma, extra) in zip(asked, network.seen, strict=True)
    )
    assert set(reasons(model)) == {"off"}
    assert (model.report.calls, model.report.skipped, model.report.speedup) == (6, 0, 1.0)


def test_off_keeps_autograd():
    model = cached(twice, None)
    x = filled(3.0).requires_grad_()
    model(x, level(5.0)).sum().backward()
    assert (x.grad == 2).all()


def test_what_is_computed_is_the_models_own_tensor_and_sees_the_callers_own():
    network = Toy()
    model = cached(network, Method(criterion=SkipOdd()), sigmas=SIX)
    asked = [(filled(k), level(sigma)) for k, sigma in enumerate(SIX[:-1])]
    answers = [model(x, sigma) for x, sigma in asked]
    assert decisions(model) == "CSCSCS"
    for k in (0, 2, 4):
        assert answers[k] is network.returned[k // 2]
        assert asked[k][0] is network.seen[k // 2][0]
        assert asked[k][1] is network.seen[k // 2][1]


def test_what_is_remembered_does_not_change_with_the_samplers_own_tensors():
    """Samplers and hosts write into x and into what they were given."""
    kept = []

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append(x * 1 + 7)
        return kept[-1]

    model = CachedDenoiser(Toy(network), Static("100"), scalings=plain, sigmas=(3.0, 2.0, 1.0, 0.0))
    x = filled(5.0)
    model(x, level(3.0)).mul_(100)
    x.zero_()
    skipped = model(filled(6.0), level(2.0))
    assert (skipped == 13).all()
    skipped.mul_(100)
    assert (model(filled(6.0), level(1.0)) == 13).all()


# State ends with the run.


def begun(method: Method | None = None, **keywords) -> CachedDenoiser:
    """Two evaluations into a run of six; the next one, at sigma 6, would be skipped."""
    model = cached(twice, method or Method(), sigmas=SIX, **keywords)
    drive(model, (10, 8), (1, 2))
    assert decisions(model) == "CS"
    return model


def assert_clean(model: CachedDenoiser, run: int = 1) -> None:
    """The run in progress is another one, and its first evaluation was computed."""
    assert model.report.run == run
    assert model.report.events[0].position.evaluation == 0
    assert reasons(model)[0] == "no cache yet"


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.ones(1, 1, 4, 4), 2),
        (torch.ones(1, 2, 2, 2), 2),
        (torch.ones(3, 1, 2, 2), 2),
        (torch.ones(1, 1, 2, 2, dtype=torch.float16), 2),
        (torch.ones(1, 1, 2, 2, dtype=torch.float64), 2),
    ],
    ids=["size", "channels", "batch", "half", "double"],
)
def test_another_shape_batch_or_dtype_begins_a_new_run(x, expected):
    model = begun()
    answer = model(x, level(6, rows=x.shape[0]))
    assert (answer == expected).all()
    assert answer.dtype == x.dtype
    assert_clean(model)
    assert model.report.events[0].position.step == 2


def test_another_device_begins_a_new_run():
    model = begun()
    model(filled(1.0).to("meta"), level(6))
    assert_clean(model)


# In a run that the host announced, such a change costs the cache alone.

DROPPED = "shape, dtype, device, thread, task, prompt or model changed within the run: the cache was dropped"


@pytest.mark.parametrize("stages", [None, 1])
@pytest.mark.parametrize(
    "x",
    [
        torch.full((1, 1, 4, 4), 3.0),
        torch.full((1, 2, 2, 2), 3.0),
        torch.full((3, 1, 2, 2), 3.0),
        torch.full((1, 1, 2, 2), 3.0, dtype=torch.float16),
        torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64),
    ],
    ids=["size", "channels", "batch", "half", "double"],
)
def test_another_shape_batch_or_dtype_within_an_announced_run_begins_with_a_clean_cache(x, stages):
    model = cached(twice, Method(last_step=True))
    with model.run(SIX, stages):
        drive(model, (10, 8), (1, 2))
        answers = [model(x + k, level(sigma, rows=len(x))) for k, sigma in enumerate(SIX[2:-1])]
    report = model.report
    assert [float(answer.flatten()[0]) for answer in answers] == [6, 4 + 3, 5 + 3, 12]
    assert {(answer.shape, answer.dtype) for answer in answers} == {(x.shape, x.dtype)}
    assert decisions(model) == "CSCSSC"
    assert reasons(model) == ["no cache yet", "no reason to compute"] * 2 + ["no reason to compute", "last step"]
    assert [(e.position.run, e.position.evaluation, e.position.step) for e in report.events] == [
        (0, k, k) for k in range(6)
    ]
    assert (report.run, report.scheduled_steps, report.steps, report.evaluations) == (0, 6, 6, 6)
    assert report.notes.count(DROPPED) == 1


def test_a_change_within_an_announced_run_is_noted_once_and_nothing_else_twice():
    model = cached(twice, UCache())
    with model.run(SIX, 1):
        for x, sigma in zip((filled(1.0).half(), filled(1.0)) * 3, SIX[:-1], strict=True):
            model(x, level(sigma))
    assert decisions(model) == "CCCCCC"
    assert model.report.notes == ["window 0.15 to 0.95 as shares of this run's 6 steps: 10 >= sigma > 1", DROPPED]


def test_another_thread_or_device_within_an_announced_run_begins_with_a_clean_cache():
    engine = cached(twice, Method()).engine
    model = lambda x, sigma: engine(DenoiserCall(twice, plain, ("guided",), x, sigma, {}))  # noqa: E731
    engine.announce(SIX)
    drive(model, (10, 8), 1.0)
    thread = threading.Thread(target=drive, args=(model, (6, 4), 1.0))
    thread.start()
    thread.join()
    drive(model, (2,), 1.0)
    model(filled(1.0).to("meta"), level(1))
    assert decisions(engine) == "CSCSCC"
    assert reasons(engine)[0::2] == ["no cache yet"] * 3
    assert reasons(engine)[5] == "no cache yet"
    assert [event.position.step for event in engine.report.events] == [0, 1, 2, 3, 4, 5]
    assert engine.report.notes == [DROPPED]


def test_a_criterion_learns_anew_after_a_change_within_an_announced_run():
    """The walk of `walked`, in float64, then in float32: the same decisions and estimates again, two steps later."""
    eight = (12.0, 11.0, *SIX)
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1))
    with model.run(eight, 1):
        for k, sigma in enumerate(eight[:2]):
            model(filled(100.0 / (k + 1)).double(), level(sigma))
        drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    assert decisions(model) == "CC" + "CCSSCS"
    assert [e.estimate for e in model.report.events][2:] == [None, None, 0.0625, 0.1875, 0.375, 1 / 13]


def test_caps_count_on_through_a_change_within_an_announced_run():
    model = cached(twice, Method(max_cached=2))
    with model.run(SIX):
        for k, sigma in enumerate(SIX[:-1]):
            model(filled(1.0).half() if k < 2 else filled(1.0), level(sigma))
    assert decisions(model) == "CSCSCC"
    assert reasons(model)[4:] == ["max_cached"] * 2


@pytest.mark.parametrize("stages", [None, 1])
def test_branches_of_two_sizes_keep_the_steps_of_an_announced_run(stages):
    """One evaluation is asked for both, in separate calls: each has a cache of its own size."""
    close = (10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 0.0)
    model = cached(Toy(twice_named), Static("101010"), branches=by_name)
    with model.run(close, stages):
        for sigma in close[:-1]:
            model(filled(1.0), level(sigma), name="cond")
            answer = model(torch.ones(1, 1, 4, 4), level(sigma), name="uncond")
            assert answer.shape == (1, 1, 4, 4)
    places = [(event.position.step, event.branch) for event in model.report.events]
    assert places == [(step, name) for step in range(6) for name in ("cond", "uncond")]
    assert (model.report.run, model.report.evaluations) == (0, 6)
    assert decisions(model, "cond") == decisions(model, "uncond") == "CSCSCS"


KARRAS = (*((14.6 ** (1 / 7) + k / 19 * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7 for k in range(20)), 0.0)


@pytest.mark.parametrize(("sampler", "stages"), [("euler", 1), ("dpm_2", 2), ("heun", 2)])
@pytest.mark.parametrize("method", [Method(), Static("fast")], ids=lambda method: method.name)
def test_latents_that_a_sampler_widens_keep_their_run(sampler, stages, method):
    """These samplers divide by sigma, (1, 1, 1, 1) in float32: given x in half, every x but the first is float32."""
    network, reports = Toy(lambda x, sigma: (reports.append(model.report), x / 2)[1]), []
    model = cached(network, method)
    x = sample(sampler, model, torch.ones(2, 1, 4, 4).half() * KARRAS[0], torch.tensor(KARRAS), disable=True)
    assert [seen.dtype for seen, _, _ in network.seen] == [torch.float16] + [torch.float32] * (len(network.seen) - 1)
    assert x.dtype == torch.float32
    places = [(step, stage) for step in range(20) for stage in range(stages)][: 20 * stages - (stages - 1)]
    report = model.report
    assert {id(one) for one in reports} == {id(report)}
    assert [(event.position.step, event.position.stage) for event in report.events] == places
    assert (report.run, report.scheduled_steps, report.steps, report.evaluations) == (0, 20, 20, len(places))
    assert report.notes == [DROPPED]
    ones = StepMask("fast").for_steps(20) if method.static else (0,) * 20
    assert [event.computed for event in report.events] == [True, True] + [bool(ones[step]) for step, _ in places[2:]]
    if not method.static:
        assert reasons(model)[:2] == ["no cache yet"] * 2


# Two loops in one announced run are two runs.


@pytest.mark.parametrize("stages", [None, 1, 2])
def test_two_loops_within_one_announced_run_are_two_runs(stages):
    asked, expected = (heun(SIX), "CSCCCCSSSSC") if stages == 2 else (SIX[:-1], "CCCSSC")
    model = cached(twice, Static("011001", max_cached=expected.count("S")))
    reports = []
    with model.run(SIX, stages):
        for run in range(2):
            answers = drive(model, asked, [run + 1.0 + k for k in range(len(asked))])
            assert answers[0] == 2 * (run + 1)
            assert_clean(model, run)
            assert decisions(model) == expected
            assert [event.position.evaluation for event in model.report.events] == list(range(len(asked)))
            assert (model.report.scheduled_steps, model.report.steps) == (6, 6)
            reports.append(model.report)
    assert [report.run for report in reports] == [0, 1]
    assert reports[0] is not reports[1]
    assert [report.decisions("guided") for report in reports] == [expected] * 2


def test_nothing_a_criterion_learned_reaches_the_second_loop_of_an_announced_run():
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1))
    with model.run(SIX, 1):
        for run in range(2):
            drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
            assert_clean(model, run)
            assert decisions(model) == "CCSSCS"
            assert [e.estimate for e in model.report.events] == [None, None, 0.0625, 0.1875, 0.375, 1 / 13]


def test_two_loops_of_branches_in_turn_within_one_announced_run_are_two_runs():
    model = cached(twice, Method(), branches=InTurn("cond", "uncond"))
    with model.run(SIX, 1):
        for run in range(2):
            drive(model, [sigma for sigma in SIX[:-1] for _ in range(2)], 1.0)
            assert model.report.run == run
            assert decisions(model, "cond") == decisions(model, "uncond") == "CSSSSS"
            assert reasons(model, "cond")[0] == reasons(model, "uncond")[0] == "no cache yet"


def test_an_exception_in_the_model_ends_the_run():
    def breaks_at_6(x: Tensor, sigma: Tensor) -> Tensor:
        if sigma.max() == 6:
            raise RuntimeError("out of memory")
        return 2 * x

    model = cached(breaks_at_6, Static("111000"), sigmas=SIX)
    drive(model, (10, 8), 1.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(filled(1.0), level(6))
    assert drive(model, (4, 2), (3, 5)) == [6, 5 + 3]
    assert_clean(model)


def test_an_exception_in_the_predictor_ends_the_run():
    class Breaks(Reuse):
        def predict(self, branch):
            if branch.position.sigma == 6:
                raise ZeroDivisionError
            return super().predict(branch)

    model = begun(Method(predictor=Breaks()))
    with pytest.raises(ZeroDivisionError):
        model(filled(1.0), level(6))
    assert drive(model, (4, 2), (3, 5)) == [6, 5 + 3]
    assert_clean(model)


def test_an_exception_in_the_criterion_ends_the_run():
    class Breaks(Always):
        def decide(self, branch: Branch) -> Verdict:
            if branch.position.sigma == 6:
                raise KeyboardInterrupt
            return Verdict(True)

    model = begun(Method(criterion=Breaks()))
    with pytest.raises(KeyboardInterrupt):
        model(filled(1.0), level(6))
    assert drive(model, (4, 2), (3, 5)) == [6, 5 + 3]
    assert_clean(model)


def test_an_exception_lets_the_next_run_begin_with_the_first_branch_in_turn():
    broken = []

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        if len(broken) < 1 and sigma.max() == 8:
            broken.append(1)
            raise RuntimeError
        return 2 * x

    model = cached(network, Off(), sigmas=SIX, branches=InTurn("cond", "uncond"))
    drive(model, (10, 10), 1.0)
    with pytest.raises(RuntimeError):
        model(filled(1.0), level(8))
    drive(model, (10, 10), 1.0)
    assert model.report.branches == ["cond", "uncond"]


def test_another_thread_begins_a_new_run():
    model = begun()
    thread = threading.Thread(target=drive, args=(model, (6,), (3,)))
    thread.start()
    thread.join()
    assert_clean(model)
    assert drive(model, (4,), (3,)) == [6]
    assert_clean(model, run=2)


def test_an_interrupted_run_does_not_reach_the_next():
    model = begun()
    assert drive(model, SIX[:2], (5, 6)) == [10, 6 + 5]
    assert_clean(model)


@pytest.mark.parametrize("start", [9.0, 40.0])
def test_an_interrupted_run_does_not_reach_one_on_another_schedule_that_starts_higher(start):
    model = begun()
    drive(model, (6, 4), (2, 2))
    with pytest.warns(UserWarning, match=f"lacks the run's first sigma, {start:g}"):
        assert drive(model, (start,), (7,)) == [14]
    assert_clean(model)


def test_an_interrupted_run_does_not_reach_one_that_begins_with_churn():
    model = begun()
    assert drive(model, (13,), (7,)) == [14]
    assert_clean(model)


def test_an_interrupted_img2img_run_does_not_reach_the_next():
    model = cached(twice, Method(), sigmas=SIX)
    drive(model, (8, 6, 4), 1.0)
    assert drive(model, (8, 6), (5, 6)) == [10, 6 + 5]
    assert_clean(model)


def test_a_run_after_a_complete_one_is_a_new_run_even_if_it_begins_at_its_last_sigma():
    model = cached(twice, Method(), sigmas=SIX)
    drive(model, SIX[:-1], range(6))
    assert drive(model, (1,), (9,)) == [18]
    assert_clean(model)


def test_a_run_broken_off_and_begun_again_at_the_same_sigma_is_a_new_run():
    """After two steps with one evaluation each it cannot be Heun's corrector."""
    model = cached(twice, Method(), sigmas=SIX)
    drive(model, (10, 8, 6), range(3))
    assert drive(model, (6,), (9,)) == [18]
    assert_clean(model)


def test_without_a_schedule_a_run_is_complete_at_the_models_lowest_sigma():
    model = cached(Forgetful(sigma_min=1.0), Method())
    drive(model, (10, 4, 1), range(3))
    assert drive(model, (0.9,), (5,)) == [10]
    assert_clean(model)


def test_without_a_schedule_a_sigma_that_does_not_fall_begins_a_run():
    """Only Heun stays at a sigma, or rises by churn, and it does so from its second step on, in every step."""
    model = cached(twice, Method())
    drive(model, (10, 8, 6, 5, 4), range(5))
    assert drive(model, (4.0,), (9,)) == [18]
    assert_clean(model)
    drive(model, (3, 2, 1), range(3))
    assert drive(model, (1.2,), (9,)) == [18]
    assert_clean(model, 2)


@pytest.mark.parametrize("churn", [1.0, 1.2])
def test_without_a_schedule_heun_stays_in_its_run(churn):
    asked = [s * c for s, c in zip(heun(SIX), [churn, *(1.0, churn) * 5], strict=True)]
    model = cached(Forgetful(sigma_min=1.0), Method())
    drive(model, asked, range(11))
    assert (model.report.run, model.report.evaluations) == (0, 11)


@pytest.mark.parametrize("stages", [None, 1, 2])
def test_an_announced_loop_that_is_broken_off_and_begun_again_is_another_run(stages):
    model = cached(twice, Method())
    with model.run(SIX, stages):
        drive(model, (10, 8, 8, 6, 6) if stages == 2 else (10, 8, 6), range(5 if stages == 2 else 3))
        assert drive(model, (10, 8), (5, 6)) == [10, 6 + 5]
        assert_clean(model)
        assert model.report.events[1].position.step == (0 if stages == 2 else 1)


# One name for several branches.

TWICE = "guided was called twice in one evaluation"


def with_the_prompt(x: Tensor, sigma: Tensor, prompt: float) -> Tensor:
    return 2 * x + prompt


def called_twice(model: CachedDenoiser, sigmas, second: float = 0.0) -> list[tuple[float, float]]:
    """cond and uncond in calls of their own, with one x; or with another for uncond, larger by `second`."""
    answers = []
    for k, sigma in enumerate(sigmas):
        x = filled(1.0 + k)
        cond = model(x, level(sigma), prompt=0)
        uncond = model(x + second if second else x, level(sigma), prompt=100)
        answers.append((float(cond.mean()), float(uncond.mean())))
    return answers


@pytest.mark.parametrize("stages", [None, 1, 2])
@pytest.mark.parametrize("announced", [True, False])
def test_branches_that_share_a_name_are_never_predicted_from_each_other(stages, announced):
    sigmas = heun(SIX) if stages == 2 else SIX[:-1]
    model = cached(with_the_prompt, Method(), sigmas=SIX if stages else None)
    with model.run(SIX, stages) if announced else contextlib.nullcontext(), pytest.warns(UserWarning, match=TWICE):
        answers = called_twice(model, sigmas)
    assert answers[1] == (2 + 1 * 2 - 1 + 0, 2 * 2 + 100)
    assert [uncond for _, uncond in answers] == [2 * (1 + k) + 100 for k in range(len(sigmas))]
    assert any(TWICE in note for note in model.report.notes)
    assert decisions(model) == "CC" + "SC" * (len(sigmas) - 1)


@pytest.mark.parametrize("stages", [None, 1])
def test_parts_of_a_batch_in_calls_of_their_own_are_never_predicted_from_each_other(stages):
    model = cached(with_the_prompt, Method())
    with model.run(SIX, 1) if stages else contextlib.nullcontext(), pytest.warns(UserWarning, match=TWICE):
        answers = called_twice(model, SIX[:-2], second=50.0)
    assert answers == [(2 * (1 + k), 2 * (51 + k) + 100) for k in range(len(SIX[:-2]))]


def test_a_run_after_one_of_a_single_evaluation_at_the_same_sigma_is_cached_from_its_third_evaluation():
    model = cached(twice, Method())
    drive(model, (10,), (1,))
    assert drive(model, (10, 8, 6), (5, 6, 7)) == [10, 12, 7 + 5]


def test_reset_forgets_the_run():
    model = begun()
    model.reset()
    assert drive(model, (6, 4), (5, 6)) == [10, 6 + 5]
    assert_clean(model)


def test_announced_runs_do_not_reach_each_other():
    model = cached(twice, Method())
    for run in range(2):
        with model.run((6.0, 4.0, 2.0, 0.0)):
            assert drive(model, (6, 4), (1, 2)) == [2, 2 + 1]
        assert_clean(model, run)
    assert drive(model, (2,), (3,)) == [6]
    assert_clean(model, 2)


def test_a_refused_announcement_leaves_the_engine_as_it_was():
    model = cached(twice, Static("101010"), sigmas=SIX)
    with pytest.raises(OptionError, match="6 entries, the run has 2 steps"), model.run((5.0, 1.0, 0.0)):
        pass
    drive(model, SIX[:-1], 1.0)
    assert decisions(model) == "CSCSCS"
    drive(model, SIX[:-1], 1.0)
    assert model.report.run == 2  # the refused one has a number too
    assert decisions(model) == "CSCSCS"


def test_a_run_whose_first_sigma_is_not_on_the_schedule_is_taken_without_one_and_says_so():
    model = cached(twice, Method(last_step=True), sigmas=SIX)
    lacks, last = "the schedule given lacks the run's first sigma, 9", "the last step cannot be protected"
    with pytest.warns(UserWarning, match=lacks), pytest.warns(UserWarning, match=last):
        drive(model, (9, 7, 5), 1.0)
    assert decisions(model) == "CSS"
    assert model.report.scheduled_steps is None


# Nothing is kept alive after the run but its report.

ODD = (1, 1, 7, 111)
"""A latent of 777 elements, which nothing else here has."""


def alive() -> int:
    gc.collect()
    return sum(type(thing) is Tensor and thing.numel() == 777 for thing in gc.get_objects())


def evaluate_odd(model: CachedDenoiser, sigmas, growth: float = 0, **extra) -> None:
    for k, sigma in enumerate(sigmas):
        model(torch.full(ODD, 1.0 + k * growth), level(sigma), **extra)


def test_latents_are_remembered_during_a_run():
    """The control of the tests below: what they find gone is found while it is there."""
    model = cached(Forgetful(), Method(), sigmas=SIX)
    evaluate_odd(model, SIX[:-2])
    one = alive()
    assert one > 0
    model = cached(Forgetful(), Method(predictor=LogSigmaLine(), warmup=4), sigmas=SIX)
    evaluate_odd(model, SIX[:-2])
    assert alive() == 2 * one
    del model
    assert alive() == 0


@pytest.mark.parametrize("method", [Method(), UCache(), EasyCache(), Static("110101"), Method(warmup=6)])
def test_latents_are_freed_after_the_last_step_of_a_known_schedule(method):
    model = cached(Forgetful(), method, sigmas=SIX)
    evaluate_odd(model, SIX[:-1])
    assert alive() == 0
    assert model.report.evaluations == 6


def test_latents_are_freed_after_the_last_step_under_heun():
    model = cached(Forgetful(), Method())
    with model.run(SIX, stages=2):
        evaluate_odd(model, heun(SIX), growth=1)
        assert alive() == 0
    with model.run(SIX[:-1], stages=2):
        evaluate_odd(model, heun(SIX[:-1])[:-1], growth=1)
        assert alive() > 0
        evaluate_odd(model, heun(SIX[:-1])[-1:])
        assert alive() == 0


def test_latents_are_freed_when_an_announced_run_ends_before_its_last_step():
    model = cached(Forgetful(), Method())
    with model.run(SIX):
        evaluate_odd(model, SIX[:2])
        assert alive() > 0
    assert alive() == 0
    with contextlib.suppress(KeyboardInterrupt), model.run(SIX):
        evaluate_odd(model, SIX[:2])
        raise KeyboardInterrupt
    assert alive() == 0


def test_latents_are_freed_at_the_models_lowest_sigma_without_a_schedule():
    model = cached(Forgetful(sigma_min=torch.tensor(1.0)), Method())
    evaluate_odd(model, SIX[:-2])
    assert alive() > 0
    evaluate_odd(model, SIX[-2:-1])
    assert alive() == 0


def test_latents_are_freed_after_an_exception():
    def network(x: Tensor, sigma: Tensor) -> Tensor:
        if sigma.max() == 6:
            raise RuntimeError
        return 2 * x

    model = cached(Forgetful(network), Method(warmup=3), sigmas=SIX)
    with pytest.raises(RuntimeError):
        evaluate_odd(model, SIX[:-1])
    assert alive() == 0


def test_latents_are_freed_after_the_last_step_of_every_branch_in_turn():
    model = cached(Forgetful(), Method(), sigmas=SIX, branches=InTurn("cond", "uncond"))
    evaluate_odd(model, [sigma for sigma in SIX[:-1] for _ in range(2)][:-1])
    assert alive() > 0
    evaluate_odd(model, SIX[-2:-1])
    assert alive() == 0
    assert decisions(model, "cond") == decisions(model, "uncond") == "CSSSSS"


def test_an_references_output_that_the_others_lean_on_is_freed_with_the_run():
    method = Static("110101", skip="uncond")
    model = cached(Forgetful(), method, sigmas=SIX, branches=InTurn("cond", "uncond"))
    evaluate_odd(model, [sigma for sigma in SIX[:-1] for _ in range(2)])
    assert decisions(model, "uncond") == "CCSCSC"
    assert alive() == 0


def test_latents_of_a_branch_that_was_dropped_on_the_way_are_freed_with_the_run():
    """Hosts drop uncond in the last steps."""
    model = cached(Forgetful(lambda x, sigma, name: 2 * x), Static("110101"), sigmas=SIX, branches=by_name)
    for name in ("cond", "uncond"):
        evaluate_odd(model, SIX[:1], name=name)
    evaluate_odd(model, SIX[1:-1], name="cond")
    assert decisions(model, "cond") == "CCSCSC"
    assert alive() == 0


def test_latents_are_freed_when_the_last_step_is_taken_with_gradients():
    model = cached(Forgetful(), Method(), sigmas=SIX)
    evaluate_odd(model, SIX[:-2])
    model(torch.ones(ODD, requires_grad=True), level(SIX[-2]))
    assert alive() == 0


def test_a_engine_that_is_off_remembers_nothing():
    model = cached(Forgetful(), None, sigmas=SIX)
    evaluate_odd(model, SIX[:3])
    assert alive() == 0


def test_the_report_holds_no_tensor_with_more_than_one_element():
    model = cached(twice, UCache(2.0, window=None, start=0, end=1), sigmas=SIX, branches=("cond", "uncond"))
    for k, sigma in enumerate(SIX[:-1]):
        model(filled(10.0 - k, rows=2), level(sigma, rows=2))
    seen, todo = set(), [model.report]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, Tensor) or thing.numel() == 1
        assert not isinstance(thing, torch.nn.Module)
        todo += gc.get_referents(thing)
    assert len(seen) > 20


# One decision an evaluation.


def by_name(x: Tensor, sigma: Tensor, name: str, **extra) -> str:
    return name


@dataclass
class Near(Criterion):
    """Skips where the input moved by less than 1 since the last computed evaluation."""

    def decide(self, branch: Branch) -> Verdict:
        moved = float(branch.input_change)
        return Verdict(moved < 1, moved, 1.0)


COND = [1.0, 1.5, 9.0, 9.5, 9.6, 9.7]
"""Moves by 1 or more at evaluations 2: alone CSCSSS."""
UNCOND = [1.0, 1.5, 1.6, 1.7, 5.0, 5.1]
"""Moves by 1 or more at evaluation 4: alone CSSSCS."""


HOW = ["batched", "separate"]


def guide(how: str, method: Method, network=None, cond=COND, uncond=UNCOND, sigmas=SIX, **keywords):
    """A run with two branches, batched in one call or in separate ones; the model and the answers of both."""
    names = ("cond", "uncond")
    branches = names if how == "batched" else by_name
    model = cached(network or Toy(twice_named), method, sigmas=sigmas, branches=branches, **keywords)
    answers: dict[str, list[float]] = {name: [] for name in names}
    for a, b, sigma in zip(cond, uncond, SIX[:-1], strict=True):
        if how == "batched":
            both = model(torch.cat([filled(a), filled(b)]), level(sigma, rows=2), name=names)
            for name, one in zip(names, both, strict=True):
                answers[name].append(float(one.flatten()[0]))
        else:
            for name, x in (("cond", a), ("uncond", b)):
                answers[name].append(float(model(filled(x), level(sigma), name=name).flatten()[0]))
    return model, answers


def twice_named(x: Tensor, sigma: Tensor, name: str | tuple[str, ...]) -> Tensor:
    return 2 * x


@pytest.mark.parametrize("how", HOW)
def test_the_reference_decides_for_all_branches(how):
    model, answers = guide(how, Method(criterion=Near()))
    assert decisions(model, "cond") == decisions(model, "uncond") == "CSCSSS"
    assert answers["cond"] == pytest.approx([2, 1.5 + 1, 18, 9.5 + 9, 9.6 + 9, 9.7 + 9])
    assert answers["uncond"] == pytest.approx([2, 1.5 + 1, 3.2, 1.7 + 1.6, 5 + 1.6, 5.1 + 1.6])


@pytest.mark.parametrize("how", HOW)
def test_every_branch_is_told_the_same_reason(how):
    model, _ = guide(how, Method(criterion=Near(), max_cached=2))
    expected = ["no cache yet", "below threshold", "above threshold", "below threshold", *["max_cached"] * 2]
    assert reasons(model, "cond") == expected
    assert reasons(model, "uncond") == expected


@pytest.mark.parametrize("method", [UCache(1.0), EasyCache(0.3), Static("110100"), Method(max_consecutive=2)])
def test_batched_and_separate_calls_agree(method):
    (a, first), (b, second) = guide("batched", method), guide("separate", method)
    assert decisions(a, "cond") == decisions(b, "cond")
    assert decisions(a, "uncond") == decisions(b, "uncond")
    assert first == second
    assert [event.estimate for event in a.report.events] == [event.estimate for event in b.report.events]
    assert str(a.report) == str(b.report)


def test_estimates_stand_with_the_reference_alone():
    model, _ = guide("batched", Method(criterion=Near()))
    assert [e.estimate for e in model.report.events if e.branch == "cond"][1:] == pytest.approx([0.5, 8, 0.5, 0.6, 0.7])
    assert {e.estimate for e in model.report.events if e.branch == "uncond"} == {None}


def test_cond_is_the_reference_of_a_batch_unless_named_otherwise():
    for names, expected in ((("uncond", "cond"), "CSCSSS"), (("a", "b"), "CSSSCS")):
        model = cached(twice, Method(criterion=Near()), sigmas=SIX, branches=names)
        for first, second, sigma in zip(UNCOND, COND, SIX[:-1], strict=True):
            model(torch.cat([filled(first), filled(second)]), level(sigma, rows=2))
        assert decisions(model, names[0]) == decisions(model, names[1]) == expected


def test_a_named_reference_decides():
    model, _ = guide("batched", Method(criterion=Near()), reference="uncond")
    assert decisions(model, "cond") == decisions(model, "uncond") == "CSSSCS"


def test_an_unknown_reference_is_an_error_with_the_nearest_name():
    with pytest.raises(
        OptionError, match=r"unknown reference 'unconf'. Did you mean 'uncond'\? Accepted: cond, uncond"
    ):
        cached(twice, Method(), branches=("cond", "uncond"), reference="unconf")
    with pytest.raises(OptionError, match=r"unknown value of decide 'eech'. Did you mean 'each'"):
        cached(twice, Method(), decide="eech")


def test_an_reference_that_is_called_second_warns_once_and_what_comes_before_it_computes():
    method = Method(criterion=Near())
    with pytest.warns(UserWarning, match="'cond' is evaluated before the reference 'uncond'") as caught:
        model, answers = guide("separate", method, reference="uncond")
    assert len(caught) == 1
    assert decisions(model, "cond") == "CCCCCC"
    assert decisions(model, "uncond") == "CSSSCS"
    assert answers["cond"] == pytest.approx([2 * x for x in COND])
    assert answers["uncond"] == pytest.approx([2, 2.5, 2.6, 2.7, 10, 10.1])


def test_an_reference_that_never_comes_computes_everything():
    said = "evaluated before the reference 'nobody'"
    with pytest.warns(UserWarning, match=f"'cond' is {said}"), pytest.warns(UserWarning, match=f"'uncond' is {said}"):
        model, answers = guide("separate", Method(), reference="nobody")
    assert decisions(model, "cond") == decisions(model, "uncond") == "CCCCCC"
    assert answers["uncond"] == pytest.approx([2 * x for x in UNCOND])


def test_each_branch_can_decide_for_itself():
    model, answers = guide("separate", Method(criterion=Near()), decide="each")
    assert decisions(model, "cond") == "CSCSSS"
    assert decisions(model, "uncond") == "CSSSCS"
    assert answers["cond"][2] == 18
    assert answers["uncond"][2] == pytest.approx(1.6 + 1)


@pytest.mark.parametrize(
    ("limit", "expected"), [({"max_consecutive": 1}, "CSCSCS"), ({"max_cached": 2}, "CSSCCC"), ({}, "CSSSSS")]
)
def test_limits_hold_for_every_branch_that_decides_for_itself(limit, expected):
    model, _ = guide(
        "separate", Method(criterion=Near(), **limit), cond=[1, 9, 1, 9, 1, 9], uncond=[1] * 6, decide="each"
    )
    assert decisions(model, "cond") == "CCCCCC"
    assert decisions(model, "uncond") == expected


def test_a_branch_that_decides_for_itself_computes_when_it_was_away():
    """uncond stays away at 2 and 3: nothing says that what it did before still holds at 4."""
    model = cached(Toy(twice_named), Static("110000"), sigmas=SIX, branches=by_name, decide="each")
    for k, sigma in enumerate(SIX[:-1]):
        model(filled(1.0), level(sigma), name="cond")
        if k not in (2, 3):
            model(filled(1.0), level(sigma), name="uncond")
    assert decisions(model, "cond") == "CCSSSS"
    assert decisions(model, "uncond") == "CCCS"
    assert reasons(model, "uncond")[2] == "no cache yet"


def test_branches_that_decide_for_themselves_in_one_batch_are_skipped_when_all_agree():
    """Moved by 1 or more: cond at 2, uncond (from 1.6, computed with it at 2) at 4, cond (from 9.6) then nowhere."""
    model, _ = guide("batched", Method(criterion=Near()), decide="each")
    assert decisions(model, "cond") == decisions(model, "uncond") == "CSCSCS"


def test_a_branch_without_cache_computes_on_a_skipped_evaluation_and_is_then_remembered():
    model = cached(Toy(twice_named), Method(), sigmas=SIX, branches=by_name)
    answers = []
    for k, sigma in enumerate(SIX[:4]):
        model(filled(1.0), level(sigma), name="cond")
        if k >= 2:
            answers.append(float(model(filled(k), level(sigma), name="uncond").flatten()[0]))
    assert decisions(model, "cond") == "CSSS"
    assert decisions(model, "uncond") == "CS"
    assert reasons(model, "uncond") == ["no cache yet", "no reason to compute"]
    assert answers == [4, 3 + 2]


def test_a_branch_that_missed_a_computed_evaluation_computes_before_it_follows_again():
    """uncond stays away at 1 and 2; cond is computed at 2: what uncond knows is older than what the decision saw."""
    model = cached(Toy(twice_named), Static("101000"), sigmas=SIX, branches=by_name)
    for k, sigma in enumerate(SIX[:5]):
        model(filled(1.0), level(sigma), name="cond")
        if k not in (1, 2):
            model(filled(1.0), level(sigma), name="uncond")
    assert decisions(model, "cond") == "CSCSS"
    assert decisions(model, "uncond") == "CCS"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 8), st.floats(0, 8)), min_size=6, max_size=6),
    st.sampled_from([UCache(1.0, window=None, start=0, end=1), EasyCache(0.3), Method(criterion=Near(), warmup=1)]),
    st.sampled_from(["cond", None]),
)
def test_batched_and_separate_calls_agree_on_any_path(path, method, reference):
    cond, uncond = zip(*path, strict=True)
    (a, first), (b, second) = (guide(how, method, cond=cond, uncond=uncond, reference=reference) for how in HOW)
    assert first == second
    assert (decisions(a, "cond"), decisions(a, "uncond")) == (decisions(b, "cond"), decisions(b, "uncond"))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 1), min_size=6, max_size=6).filter(lambda mask: 0 in mask),
    st.lists(st.lists(st.sampled_from(["a", "b", "c"]), unique=True), min_size=5, max_size=5),
)
def test_followers_come_and_go_and_never_answer_from_before_the_references_last_computed_evaluation(mask, present):
    """A plain model of the rule: x = evaluation + 1, a skipped answer is x + x' of the branch's own last one."""
    model = cached(Toy(twice_named), Static(mask), sigmas=SIX, branches=by_name)
    last: dict[str, int] = {}
    for k, (digit, others) in enumerate(zip(mask[:5], present, strict=True)):
        skips = not digit and "reference" in last
        for name in ("reference", *others):
            sound = last.get(name, -1) >= last.get("reference", 0)
            answer = float(model(filled(k + 1), level(SIX[k]), name=name).flatten()[0])
            if skips and sound:
                assert answer == (k + 1) + (last[name] + 1)
            else:
                assert answer == 2 * (k + 1)
                last[name] = k
    assert model.report.evaluations == 5


def test_a_branch_that_stays_away_leaves_the_other_ones_decisions_alone():
    model = cached(Toy(twice_named), Method(criterion=Near()), sigmas=SIX, branches=by_name)
    for k, (x, sigma) in enumerate(zip(COND, SIX[:-1], strict=True)):
        model(filled(x), level(sigma), name="cond")
        if k < 2:
            model(filled(x), level(sigma), name="uncond")
    assert decisions(model, "cond") == "CSCSSS"


def test_one_branch_may_pass_sigma_per_row_and_the_other_as_a_number():
    model = cached(Toy(twice_named), Method(criterion=Near()), sigmas=SIX, branches=by_name)
    for x, sigma in zip(COND, SIX[:-1], strict=True):
        model(filled(x), level(sigma), name="cond")
        model(filled(x), torch.tensor(sigma), name="uncond")
    assert model.report.evaluations == 6
    assert decisions(model, "cond") == decisions(model, "uncond") == "CSCSSS"


def test_a_batch_that_does_not_divide_into_its_branches_is_an_error():
    model = cached(twice, Method(), branches=("cond", "uncond"))
    with pytest.raises(OptionError, match="a batch of 3 does not divide into the 2 branches cond, uncond"):
        model(filled(1.0, rows=3), level(5.0, rows=3))


@pytest.mark.parametrize("names", [("cond", "cond"), ()])
def test_branches_of_one_call_must_be_one_or_more_different_names(names):
    model = cached(twice, Method(), branches=lambda x, sigma: names)
    with pytest.raises(OptionError):
        model(filled(1.0, rows=2), level(5.0, rows=2))


# NaN and Inf.

BROKEN = [float("nan"), float("inf"), -float("inf")]


def broken_at_8(value: float):
    def network(x: Tensor, sigma: Tensor, name: str = "") -> Tensor:
        return x * value if sigma.max() == 8 else 2 * x

    return network


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize(
    ("method", "expected"),
    [(Static("110000"), "CCCSSS"), (Method(warmup=2), "CCCSSS"), (UCache(9, window=None, start=0, end=1), "CCCCSS")],
    ids=["static", "always", "ucache"],
)
def test_an_output_that_is_not_finite_is_never_reused(method, expected, value):
    """UCache needs one more computed evaluation: the changes to and from the broken output say nothing."""
    model = cached(broken_at_8(value), method, sigmas=SIX)
    answers = drive(model, SIX[:-1], [10, 8, 7, 6, 5, 4])
    assert decisions(model) == expected
    assert reasons(model)[2] == "prediction not finite"
    assert not torch.isfinite(torch.tensor(answers[1]))
    assert torch.isfinite(torch.tensor(answers[2:])).all()


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("method", [Static("110000"), UCache(9, window=None, start=0, end=1)], ids=["static", "ucache"])
def test_a_prediction_that_is_not_finite_is_computed_instead(method, value):
    class Breaks(Reuse):
        def predict(self, branch):
            out = super().predict(branch)
            broken = torch.where(torch.arange(4).reshape(1, 1, 2, 2) == 1, value, out)
            return broken if branch.position.step == 3 else out

    model = cached(twice, method.replace(predictor=Breaks()), sigmas=SIX)
    answers = drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    assert decisions(model) == "CCSCSS"
    assert reasons(model)[3] == "prediction not finite"
    assert answers[3] == 14


@pytest.mark.parametrize("how", HOW)
def test_a_followers_output_that_is_not_finite_is_not_reused(how):
    def network(x: Tensor, sigma: Tensor, name) -> Tensor:
        out = 2 * x
        if sigma.max() == 8 and "uncond" in name and name != "cond":
            out[-1] = float("nan")
        return out

    model, answers = guide(how, Static("110000"), Toy(network))
    assert decisions(model, "uncond") == "CCCSSS"
    assert reasons(model, "uncond")[2] == "prediction not finite"
    assert torch.isfinite(torch.tensor(answers["uncond"][2:])).all()


@pytest.mark.parametrize("how", HOW)
def test_no_node_of_a_longer_cache_may_be_broken_either(how):
    """uncond is NaN at sigma 10 alone; a line through it and a sound one is NaN still."""

    def network(x: Tensor, sigma: Tensor, name) -> Tensor:
        out = 2 * x
        if sigma.max() == 10 and name != "cond":
            out[-1] = float("nan")
        return out

    model, answers = guide(how, Static("110000", predictor=LogSigmaLine()), Toy(network))
    assert torch.isfinite(torch.tensor(answers["uncond"][1:])).all()
    assert torch.isfinite(torch.tensor(answers["cond"])).all()
    assert decisions(model, "uncond").startswith("CCC")


def test_off_by_is_none_in_the_report_where_it_is_not_finite():
    model = cached(broken_at_8(float("nan")), Method(warmup=3), sigmas=SIX)
    drive(model, SIX[:3], 1.0)
    assert [event["prediction_error"] for event in model.report.to_dict()["events"]] == [None, None, None]
    json.loads(model.report.to_json(), parse_constant=lambda constant: pytest.fail(constant))


def test_rows_at_different_sigmas_are_computed_and_said():
    network = Toy()
    model = cached(network, Method(), sigmas=SIX)
    model(filled(1.0, rows=2), level(10, rows=2))
    with pytest.warns(UserWarning, match="different sigmas: such evaluations are always computed") as caught:
        answers = [model(filled(1.0, rows=2), torch.tensor([high, 0.5])) for high in (8.0, 6.0)]
    assert len(caught) == 1
    model(filled(1.0, rows=2), level(4, rows=2))
    assert all(a is b for a, b in zip(answers, network.returned[1:], strict=True))
    assert decisions(model) == "CCCS"
    assert reasons(model)[1:3] == ["sigmas differ in the batch"] * 2
    assert model.report.run == 0


def test_a_run_that_begins_with_rows_at_different_sigmas_does_not_blame_the_schedule():
    model = cached(twice, Method(), sigmas=SIX)
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        model(filled(1.0, rows=2), torch.tensor([10.0, 8.0]))
    assert ["different sigmas" in str(warning.message) for warning in caught] == [True]


def test_an_x_that_requires_grad_is_computed():
    model = begun()
    x = filled(3.0).requires_grad_()
    answer = model(x, level(6))
    answer.sum().backward()
    assert (x.grad == 2).all()
    assert reasons(model)[2] == "gradients are asked for"
    with torch.no_grad():
        assert (model(filled(3.0).requires_grad_(), level(4)) == 3 + 1).all()
    assert decisions(model) == "CSCS"


def test_what_is_remembered_holds_no_graph():
    weight = torch.tensor(2.0, requires_grad=True)
    model = cached(lambda x, sigma: weight * x, Method(), sigmas=SIX)
    computed = model(filled(3.0), level(10))
    skipped = model(filled(4.0), level(8))
    assert computed.requires_grad
    assert not skipped.requires_grad
    assert (skipped == 7).all()


# At most one transfer a decision.


class Reads(TorchDispatchMode):
    """Counts single numbers brought to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("decide", ["batch", "each"])
@pytest.mark.parametrize("method", [UCache(1.0), EasyCache(0.3), Static("110100"), Method(predictor=LogSigmaLine())])
def test_a_decided_evaluation_costs_at_most_one_transfer(method, how, decide, monkeypatch):
    """Sigma lies on the CPU here and is read in rows of two; the first evaluation also begins the run."""
    fetches, fetch = [], DeferredScalars.fetch

    def counting(self) -> None:
        fetches.append(1)
        fetch(self)

    monkeypatch.setattr(DeferredScalars, "fetch", counting)
    names = ("cond", "uncond")
    model = cached(Forgetful(twice_named), method, branches=names if how == "batched" else by_name, decide=decide)
    counts = []
    with model.run(SIX, stages=1):
        for k, sigma in enumerate(SIX[:-1]):
            at, before = level(sigma, rows=2), len(fetches)
            with Reads() as reads:
                if how == "batched":
                    model(filled(10 - k, rows=2), at, name="")
                else:
                    for name in names:
                        model(filled(10 - k, rows=2), at, name=name)
            assert reads.count == 0 or k == 0
            counts.append(len(fetches) - before)
    limit = 2 if (how, decide) == ("separate", "each") else 1
    assert max(counts) <= limit
    assert sum(counts) > 0
    assert counts[0] == 0


def test_evaluations_held_by_a_gate_read_nothing():
    """On the meta device, where nothing can be read: anything that tried would raise."""
    holds = [
        Method(warmup=6),
        UCache(mask="111110", warmup=5, last_step=True),
        EasyCache(start=0.9, window="steps"),
        Method(criterion=EasyCacheRule(), evaluations="second", warmup=6),
        Off(),
    ]
    for method in holds:
        model = cached(Forgetful(), method, branches=("cond", "uncond"))
        with model.run(SIX, stages=1):
            for sigma in SIX[:-1]:
                model(filled(1.0, rows=2).to("meta"), level(sigma, rows=2).to("meta"))
        assert decisions(model, "cond") == "CCCCCC"


def test_the_readings_of_a_run_come_over_together(monkeypatch):
    """Five computed evaluations wait; the decision at the sixth and the report need one transfer each."""
    fetches, fetch = [], DeferredScalars.fetch
    monkeypatch.setattr(DeferredScalars, "fetch", lambda self: (fetches.append(1), fetch(self))[1])
    model = cached(twice, EasyCache(0.3, window=None, start=0, end=1, warmup=5), sigmas=SIX)
    drive(model, SIX[:5], [10, 9, 8, 7, 6])
    assert len(fetches) == 0
    drive(model, SIX[5:6], [5])
    assert len(fetches) == 1
    assert "off by" in str(model.report)
    assert len(fetches) <= 2
    model.report.to_json()
    assert len(fetches) <= 2


# Ranks agree.


def rank_run(rank: int, group) -> dict[str, str]:
    """Rank 0 would skip all but 0; rank 1 moves too far at 3; rank 1's uncond is NaN at the end of that."""

    def network(x: Tensor, sigma: Tensor, name: str) -> Tensor:
        return x * (float("nan") if (rank, name, float(sigma.max())) == (1, "uncond", 4.0) else 2)

    xs = [1, 1.1, 1.2, 9, 9.1, 9.2] if rank else [1, 1.1, 1.2, 1.3, 1.4, 1.5]
    method = Method(criterion=Near())
    model = cached(Toy(network), method, sigmas=SIX, branches=by_name, group=group)
    for x, sigma in zip(xs, SIX[:-1], strict=True):
        for name in ("cond", "uncond"):
            model(filled(x), level(sigma), name=name)
    return {name: decisions(model, name) for name in ("cond", "uncond")}


def of_one_rank(rank: int, save) -> None:
    save("decisions", rank_run(rank, torch.distributed.group.WORLD))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, str]]:
    return [saved["decisions"] for saved in together(2, of_one_rank, tmp_path_factory.mktemp("ranks"))]


def test_without_a_group_these_ranks_would_disagree():
    assert rank_run(0, None)["cond"] == "CSSSSS"
    assert rank_run(1, None)["cond"] == "CSSCSS"


def test_ranks_take_the_same_decision_though_their_inputs_differ(ranks):
    assert ranks[0]["cond"] == ranks[1]["cond"] == "CSSCSS"


def test_ranks_agree_about_followers_too_when_one_of_them_is_not_finite(ranks):
    assert ranks[0]["uncond"] == ranks[1]["uncond"]
    assert ranks[0]["uncond"].startswith("CSSCC")


# The report.


def test_heun_counts_steps_not_evaluations_not_calls():
    model = cached(twice, Static("110101"), branches=("cond", "uncond"))
    with model.run(SIX, stages=2):
        for k, sigma in enumerate(heun(SIX)):
            model(filled(k, rows=2), level(sigma, rows=2))
    report = model.report
    assert (report.scheduled_steps, report.steps, report.evaluations, len(report.events)) == (6, 6, 11, 22)
    assert (report.calls, report.skipped) == (2 * 7, 2 * 4)
    assert report.speedup == 22 / 14
    assert report.branches == ["cond", "uncond"]
    assert report.decisions("uncond") == "CCCCSSCCSSC"
    assert str(report).splitlines()[:2] == [
        "method    static: 6 steps, 11 evaluations, 22 calls asked for",
        "calls     14 made, 8 skipped: 1.57x fewer calls",
    ]


def test_heun_without_announcement_is_counted_in_steps_too():
    model = cached(twice, Method(), sigmas=SIX)
    drive(model, heun(SIX), range(11))
    report = model.report
    assert (report.scheduled_steps, report.steps, report.evaluations) == (6, 6, 11)
    assert [(e.position.step, e.position.stage) for e in report.events][:5] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_without_a_schedule_steps_are_unknown_and_said_to_be():
    model = cached(twice, Method())
    drive(model, SIX[:-1], 1.0)
    assert model.report.steps is None
    assert "steps unknown, 6 evaluations, 6 calls asked for" in str(model.report)
    assert any("the schedule is not known" in note for note in model.report.notes)


def walked() -> Report:
    model = cached(twice, EasyCache(0.2, window=None, start=0, end=1), sigmas=SIX)
    drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    return model.report


def test_the_summary_has_decisions_reasons_and_how_far_off():
    assert str(walked()).splitlines() == [
        "method    easycache: 6 steps, 6 evaluations, 6 calls asked for",
        "calls     3 made, 3 skipped: 2.00x fewer calls",
        "guided    CCSSCS",
        "computed  no cache yet (1), no estimate yet (1), above threshold (1)",
        "skipped   below threshold (3)",
        "off by    12.0% of the output (median of 2 checks, worst 12.5%)",
    ]


def test_the_table_has_a_row_for_every_evaluation():
    rows = [re.split("  +", row) for row in walked().table().splitlines()]
    assert rows[0] == ["eval", "step", "sigma", "branch", "decision", "reason", "estimate", "threshold", "off by"]
    assert rows[3] == ["2", "2", "6", "guided", "skipped", "below threshold", "0.0625", "0.2000"]
    assert rows[5] == ["4", "4", "2", "guided", "computed", "above threshold", "0.3750", "0.2000", "11.5%"]
    assert len(rows) == 7


def test_json_round_trips(tmp_path):
    report = walked()
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text
    found = json.loads(text)
    assert found == report.to_dict()
    assert (found["steps"], found["evaluations"], found["calls"], found["skipped"]) == (6, 6, 3, 3)
    assert found["speedup_in_calls"] == 2.0
    assert found["events"][2] == {
        "evaluation": 2,
        "step": 2,
        "stage": 0,
        "sigma": 6.0,
        "branch": "guided",
        "computed": False,
        "reason": "below threshold",
        "estimate": 0.0625,
        "threshold": 0.2,
        "prediction_error": None,
    }


@pytest.mark.parametrize("report", [walked, lambda: Report("none")], ids=["walked", "empty"])
def test_plot_writes_a_picture(report, tmp_path):
    path = report().plot(tmp_path / "run.png")
    content = path.read_bytes()
    assert path == tmp_path / "run.png"
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) > 5000


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_in_an_announced_run_is_in_no_run(again):
    """Else its runs, which nobody ends, would be one: a cache of the first would answer in the second."""
    model = CachedDenoiser(Forgetful(), Method(), scalings=plain)
    with model.run(SIX, stages=2):
        evaluate_odd(model, SIX[:3])
        other = again(model)
    for x in (1.0, 10.0):
        assert drive(other, SIX[:4], [x, x + 1, 3, 4])[0] == 2 * x
        assert other.report.scheduled_steps is None
        assert decisions(other) == "CSSS"


def test_a_report_can_be_kept_while_the_next_run_goes_on():
    model = cached(twice, Method(max_cached=1), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    first = model.report
    drive(model, SIX[:2], 1.0)
    assert first.evaluations == 6
    assert model.report.evaluations == 2
    assert (first.run, model.report.run) == (0, 1)


def test_a_report_can_be_pickled_and_copied():
    report = walked()
    for other in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert other.to_dict() == report.to_dict()


@pytest.mark.parametrize(
    "method",
    [
        UCache(1.5, mask="fast", max_consecutive=2),
        EasyCache(),
        Static(StepMask.bins([3, 1], [4])),
        Off(),
        Method(criterion=Near(), predictor=LogSigmaLine(), warmup=1),
    ],
    ids=lambda method: method.name,
)
def test_a_method_can_be_pickled_and_copied_and_decides_alike(method):
    expected = None
    for other in (method, pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        model = cached(twice, other, sigmas=(*range(9, 0, -1), 0)[:9] if other.name == "static" else SIX)
        drive(model, SIX[:-1], COND)
        expected = expected or decisions(model)
        assert decisions(model) == expected
    assert pickle.loads(pickle.dumps(method)).name == method.name


def test_two_models_share_a_method_without_sharing_what_it_learns():
    method = EasyCache(0.2, window=None, start=0, end=1)
    one, two = (cached(twice, method, sigmas=SIX) for _ in range(2))
    for sigma, x in zip(SIX[:-1], [10, 8, 7.5, 7, 6.5, 6], strict=True):
        drive(one, (sigma,), x)
        drive(two, (sigma,), 3.0)
    assert decisions(one) == "CCSSCS"
    assert decisions(two) == "CCCCCC"


def test_a_engine_without_a_host_answers_requests():
    """The seam below every adapter: four methods of a Request."""

    class Plain(Call):
        names = ("cond",)

        def __init__(self, x: float, sigma: float) -> None:
            self.latent, self.sigma = filled(x), level(sigma)

        def inputs(self):
            return (self.latent.clone(),)

        def run_model(self):
            return [2 * self.latent, "aux"]

        def outputs(self, answer):
            return (answer[0].clone(),)

        def rebuild(self, outputs):
            return [outputs[0], None]

    engine = Engine(Method(), sigmas=SIX)
    computed, aux = engine(Plain(3, 10))
    skipped, nothing = engine(Plain(4, 8))
    assert ((computed == 6).all(), aux) == (True, "aux")
    assert ((skipped == 4 + 3).all(), nothing) == (True, None)


class Counted(Call):
    """A call of a host that counts its evaluations; its network is `twice`."""

    def __init__(self, x: float, sigma: float, evaluation: int, name: str = "cond", form: tuple = ()) -> None:
        self.latent, self.sigma, self.names = filled(x), level(sigma), (name,)
        self.evaluation, self.cache_key = evaluation, form

    def inputs(self):
        return (self.latent.clone(),)

    def run_model(self):
        return 2 * self.latent

    def outputs(self, answer):
        return (answer.clone(),)

    def rebuild(self, outputs):
        return outputs[0]


@pytest.mark.filterwarnings("ignore:branch 'uncond' is evaluated before")
def test_the_hosts_number_of_an_evaluation_counts_and_not_the_sigma():
    """uncond is left out of evaluation 0; evaluation 1 begins with it, at the same sigma, as Heun's does."""
    for numbers, expected in (((0, 1, 1), [0, 1, 1]), ((None, None, None), [0, 0, 1])):
        engine = Engine(Method(), sigmas=SIX)
        engine.announce(SIX)
        for x, number, name in zip((1, 1, 2), numbers, ("cond", "uncond", "cond"), strict=True):
            engine(Counted(x, 8, number, name))
        assert [event.position.evaluation for event in engine.report.events] == expected


def test_a_change_of_form_drops_the_cache_of_an_announced_run():
    engine = Engine(Method(), sigmas=SIX)
    engine.announce(SIX)
    for number, form in enumerate(((1,), (1,), (2,), (2,))):
        engine(Counted(1, SIX[number], number, form=form))
    assert engine.report.decisions("cond") == "CSCS"
    assert DROPPED in engine.report.notes


def test_quiet_runs_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (None, UCache(), EasyCache(window="steps"), Static("fast"), Method(last_step=True, warmup=1)):
            model = cached(twice, method, sigmas=SIX)
            drive(model, SIX[:-1], 1.0)


class Unhelpful(Predictor):
    """Never can tell."""

    def predict(self, branch):
        return None


def test_a_predictor_that_cannot_tell_computes():
    model = cached(twice, Method(predictor=Unhelpful()), sigmas=SIX)
    assert drive(model, SIX[:-1], COND) == pytest.approx([2 * x for x in COND])
    assert decisions(model) == "CCCCCC"
