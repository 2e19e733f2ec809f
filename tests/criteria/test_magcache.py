"""MagCache: decisions and calibration by hand, and decisions as diffusers makes them."""

from __future__ import annotations

import types

import pytest
import torch
from toys import SIX, Toy, cached, decisions, drive, filled, heun, level, reasons

from stepcache import MagCache, Method, OptionError, StepMask, method
from stepcache.criteria.magcache import as_ratios, nearest
from stepcache.extend import MagCacheRule, calibration

TEN = (*range(10, 0, -1), 0)
EVEN = "/".join(["1"] * 10)
FALLING = "/".join(["0.98"] * 10)


def plus_sigma(x, sigma):
    """Its residual is sigma everywhere, so that a ratio is that of two sigmas."""
    return x + sigma.reshape(-1, 1, 1, 1)


def run(chosen: Method, sigmas=TEN, network=None):
    model = cached(network or Toy(), chosen, sigmas=sigmas)
    drive(model, sigmas[:-1], 1.0)
    return model


# The decision


def test_after_the_first_fifth_at_most_three_in_a_row_are_skipped():
    model = run(MagCache(EVEN))
    assert decisions(model) == "CCSSSCSSSC"
    assert reasons(model)[:2] == ["no cache yet", "retention"]
    assert reasons(model)[5] == reasons(model)[9] == "max_skip_steps"


def test_the_error_is_the_sum_of_how_far_the_products_are_from_1():
    """0.98 and 0.9604 are off by 0.02 and 0.0396, together 0.0596; with 0.941192 it is 0.118408."""
    model = run(MagCache(FALLING))
    assert decisions(model) == "CCSSCSSCSS"
    estimates = [event.estimate for event in model.report.events]
    assert estimates[2:5] == pytest.approx([0.02, 0.0596, 0.118408])
    assert estimates[5:8] == pytest.approx(estimates[2:5])
    assert {event.threshold for event in model.report.events[1:]} == {0.06}


def test_a_ratio_above_1_counts_as_one_below():
    assert decisions(run(MagCache("/".join(["1.02"] * 10)))) == "CCSCSCSCSC"
    assert decisions(run(MagCache("1/1/1/0.9/1/1/1/1/1/1", max_skip_steps=9))) == "CCSCSSSSSS"


def test_the_error_may_reach_the_threshold():
    assert decisions(run(MagCache("/".join(["0.5"] * 10), threshold=0.5))) == "CCSCSCSCSC"


def test_a_ratio_belongs_to_its_evaluation_and_not_to_those_that_were_asked():
    """Only the ratio of evaluation 6 is off; it alone is computed, whatever was skipped before."""
    ratios = [1.0] * 10
    ratios[6] = 2.0
    assert decisions(run(MagCache(ratios, max_skip_steps=9))) == "CCSSSSCSSS"
    assert decisions(run(MagCache(ratios, max_skip_steps=9, max_consecutive=1))) == "CCSCSCCSCS"


def test_an_evaluation_that_a_gate_holds_begins_anew():
    assert decisions(run(MagCache(FALLING, mask=StepMask("1110000000", "dynamic")))) == "CCCSSCSSCS"


def test_the_share_of_the_run_that_is_computed_first_is_rounded():
    for share, steps in [(0.0, 1), (0.24, 2), (0.25, 3), (0.5, 5), (0.96, 10), (1.0, 10)]:
        assert decisions(run(MagCache(EVEN, retention_ratio=share, max_skip_steps=99))) == "C" * steps + "S" * (
            10 - steps
        )


def test_a_skipped_evaluation_reuses_the_residual():
    """After 2 x at x = 3 the residual is 3."""
    model = cached(Toy(), MagCache(EVEN), sigmas=TEN)
    assert drive(model, TEN[:-1], [1, 3, 5, 7, 9, 1, 1, 1, 1, 1])[:6] == [2, 6, 5 + 3, 7 + 3, 9 + 3, 2]


@pytest.mark.parametrize("options", [{"threshold": 0}, {"max_skip_steps": 0}, {"retention_ratio": 1}])
def test_at_0_nothing_is_ever_skipped_and_the_model_is_called_directly(options):
    chosen = MagCache(EVEN, **options)
    assert chosen.never_skips
    assert set(reasons(run(chosen))) == {"off"}


# Runs of another length


def test_ratios_of_another_number_of_steps_are_the_nearest():
    assert nearest((1, 2, 3), 5) == (1, 1, 2, 3, 3)
    assert nearest((1, 2, 3, 4, 5), 3) == (1, 3, 5)
    assert nearest((1, 2, 3), 1) == (3,)
    assert nearest((7,), 3) == (7, 7, 7)
    assert decisions(run(MagCache("1/1/1/1/2", max_skip_steps=9))) == "CCSSSSSSCC"


def test_without_a_schedule_the_ratios_are_the_runs_and_what_is_past_them_is_computed():
    model = cached(Toy(), MagCache("1/1/1/1/1"))
    drive(model, TEN[:-1], 1.0)
    assert decisions(model) == "CSSSC" + "C" * 5
    assert reasons(model)[5:] == ["no ratio"] * 5


def test_a_run_that_begins_in_the_middle_of_its_schedule_takes_the_ratios_from_there():
    model = cached(Toy(), MagCache("1/1/1/1/1/1/1/2/1/1", max_skip_steps=9), sigmas=TEN)
    drive(model, TEN[4:-1], 1.0)
    assert decisions(model) == "CSSCSS"


def test_both_evaluations_of_a_heun_step_have_a_ratio():
    model = cached(plus_sigma, MagCache(calibrate=True))
    with model.run(SIX, stages=2):
        drive(model, heun(SIX), 1.0)
    assert calibration(model.report) == "1/0.8/1/0.75/1/0.66667/1/0.5/1/0.5/1"


def test_second_evaluations_of_a_step_that_nobody_told_of_are_computed():
    """Heun asks 10 8 8 6 6 4 4 2 2 1 1. The first 8 is taken for the next step, until the second comes."""
    model = cached(Toy(), MagCache("1/1/1/1/1/1"), sigmas=SIX)
    drive(model, heun(SIX), 1.0)
    assert decisions(model) == "CSS" + "CS" * 4
    assert reasons(model)[3::2] == ["no ratio"] * 4


# Calibration


def test_a_calibration_computes_everything_and_reports_its_ratios():
    model = run(MagCache(calibrate=True), SIX, plus_sigma)
    assert decisions(model) == "CCCCCC"
    assert reasons(model)[1:] == ["calibration"] * 5
    assert calibration(model.report) == "1/0.8/0.75/0.66667/0.5/0.5"
    assert model.report.notes == ["calibration: ratios=1/0.8/0.75/0.66667/0.5/0.5"]


def test_a_ratio_is_that_of_whole_samples_and_its_mean_over_the_batch():
    """3, 4 after 0, 10 is a half, 6, 8 after 3, 4 is two: in the mean 1.25."""
    outs = torch.tensor([[[0.0, 10.0], [3.0, 4.0]], [[3.0, 4.0], [6.0, 8.0]]]).reshape(2, 2, 1, 1, 2)
    model = cached(lambda x, sigma: outs[10 - int(sigma[0])], MagCache(calibrate=True), sigmas=(10, 9, 0))
    for sigma in (10, 9):
        model(torch.zeros(2, 1, 1, 2), level(sigma, rows=2))
    assert calibration(model.report) == "1/1.25"


def test_the_ratios_are_the_deciding_branches():
    def network(x, sigma):
        return x + torch.stack([torch.ones_like(sigma[0]), sigma[1]]).reshape(2, 1, 1, 1)

    model = cached(network, MagCache(calibrate=True), sigmas=SIX, branches=("uncond", "cond"))
    for sigma in SIX[:-1]:
        model(filled(1.0, 2), level(sigma, 2))
    assert calibration(model.report) == "1/0.8/0.75/0.66667/0.5/0.5"


def test_every_run_has_a_calibration_of_its_own_and_the_method_none():
    chosen = MagCache(calibrate=True)
    model = cached(plus_sigma, chosen)
    for sigmas, expected in [((8, 4, 2, 0), "1/0.5/0.5"), ((9, 3, 0), "1/0.33333")]:
        with model.run(sigmas):
            drive(model, sigmas[:-1], 1.0)
        assert calibration(model.report) == expected
    assert chosen == MagCache(calibrate=True)
    assert chosen.criterion.measured == {}


def test_whatever_else_is_given_a_calibration_computes_everything():
    chosen = MagCache(calibrate=True, mask=StepMask("100000", "static"), max_cached=0, start=0.5, threshold=0)
    model = run(chosen, SIX, plus_sigma)
    assert decisions(model) == "CCCCCC"
    assert calibration(model.report) == "1/0.8/0.75/0.66667/0.5/0.5"
    with pytest.raises(OptionError, match=r"^max_cached=-2"):
        MagCache(calibrate=True, max_cached=-2)


def test_a_calibration_is_given_back_as_option_text():
    """Sigma falls from 100 by 1 per cent a step: every ratio is 0.99, of which 3 products may be skipped."""
    sigmas = [100 * 0.99**i for i in range(10)] + [0]
    text = calibration(run(MagCache(calibrate=True), sigmas, plus_sigma).report)
    assert text == "1" + "/0.99" * 9
    assert decisions(run(method("magcache", f"ratios={text}"), sigmas, plus_sigma)) == "CCSSSCSSSC"
    assert decisions(run(method("magcache", f"ratios={text},threshold=0.03"), sigmas, plus_sigma)) == "CCSSCSSCSS"


def test_a_report_without_a_calibration_is_named():
    with pytest.raises(
        OptionError, match=r"^the report of magcache has no ratios: run MagCache\(calibrate=True\) once"
    ):
        calibration(run(MagCache(EVEN)).report)


# Options


@pytest.mark.parametrize(
    "given",
    [
        "1/0.98/0.97",
        "1;0.98;0.97",
        " 1 0.98  0.97 ",
        "[1.0, 0.98, 0.97]",
        "1 / 0.98 / 0.97/",
        [1, 0.98, 0.97],
        (1.0, 0.98, 0.97),
        torch.tensor([1.0, 0.98, 0.97], dtype=torch.float64),
    ],
)
def test_ratios_come_as_text_or_as_numbers(given):
    assert as_ratios(given) == (1.0, 0.98, 0.97)
    assert MagCache(given) == MagCache(ratios="1/0.98/0.97")


@pytest.mark.parametrize("given", ["1/x", "1/-0.5", "1/nan", "inf", "1_0", [1, None], 5, None, [[1, 2]], [True]])
def test_ratios_that_are_none_are_refused(given):
    with pytest.raises(OptionError, match=r"^ratios=.*: accepted are numbers of at least 0 with / between them"):
        MagCache(given)


@pytest.mark.parametrize("make", [MagCache, MagCacheRule, lambda: method("magcache"), lambda: MagCache(" / ")])
def test_without_ratios_the_error_says_how_to_calibrate(make):
    with pytest.raises(OptionError, match=r"^ratios='': .*Run once with calibrate=1, .*'calibration: ratios=...'"):
        make()


def test_options_come_as_text_and_under_the_names_of_other_projects():
    chosen = MagCache("1/0.9", 0.1, 2, 0.3)
    assert method("magcache", "ratios=1/0.9,threshold=0.1,max_skip_steps=2,retention_ratio=0.3") == chosen
    assert method("magcache", "mag_ratios=1;0.9,magcache_thresh=0.1,K=2,retention_ratio=0.3") == chosen
    assert method("magcache", "calibrate=1") == MagCache(calibrate=True)
    assert MagCache("1").criterion == MagCacheRule((1.0,), 0.06, 3, 0.2, False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": -1}, "^threshold=-1: accepted is a number of at least 0"),
        ({"max_skip_steps": 1.5}, "^max_skip_steps=1.5: accepted is a whole number"),
        ({"retention_ratio": 1.1}, "^retention_ratio=1.1: accepted is a number from 0 to 1"),
        ({"calibrate": 2}, "^calibrate=2: accepted is 0 or 1"),
        ({"max_skip": 2}, "^unknown option 'max_skip'. Did you mean 'max_skip_steps'"),
    ],
)
def test_options_are_checked_by_name(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        MagCache("1/1", **options)


# diffusers


def their_decisions(steps: int, **options) -> str:
    """What diffusers' MagCache does in so many steps."""
    hooks = pytest.importorskip("diffusers.hooks.mag_cache")
    manager = hooks.StateManager(hooks.MagCacheState, (), {})
    hook = hooks.MagCacheHeadHook(manager, hooks.MagCacheConfig(num_inference_steps=steps, **options))
    hook._metadata = types.SimpleNamespace(
        hidden_states_argument_name="x",
        return_encoder_hidden_states_index=None,
        _get_parameter_from_args_kwargs=lambda name, arguments, keywords: arguments[0],
    )
    hook.fn_ref = types.SimpleNamespace(original_forward=lambda x: x)
    found = ""
    for _ in range(steps):
        hook.new_forward(None, torch.zeros(1, 2, 3))
        state = manager.get_state()
        found += "C" if state.should_compute else "S"
        state.previous_residual = torch.zeros(1, 2, 3)
        state.step_index += 1
    return found


@pytest.mark.parametrize("steps", [10, 20, 28, 50])
@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.02, 2, 0.33)])
def test_decisions_are_those_of_diffusers(steps, threshold, most, retention):
    """With its ratios for Flux, and with random ones."""
    hooks = pytest.importorskip("diffusers.hooks.mag_cache")
    torch.manual_seed(steps)
    sigmas = (*range(steps, 0, -1), 0)
    for ratios in (hooks.FLUX_MAG_RATIOS, 1 + 0.03 * torch.randn(40)):
        options = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": retention}
        expected = their_decisions(steps, mag_ratios=ratios, **options)
        assert decisions(run(MagCache(ratios, **options), sigmas)) == expected
        assert "S" in expected


def test_nearest_is_diffusers_interpolation():
    hooks = pytest.importorskip("diffusers.hooks.mag_cache")
    for length in (1, 2, 7, 28, 50):
        ratios = tuple(float(i) for i in range(length))
        for count in (1, 2, 5, 20, 28, 100):
            assert nearest(ratios, count) == tuple(hooks.nearest_interp(torch.tensor(ratios), count).tolist())
