"""Branches, ControlNets and several tensors at once in diffusers pipelines."""

from __future__ import annotations

import io

import pytest
import torch
from tiny_pipelines import PIPELINES, run

from stepcache import Forecast, Off, OptionError, Static, UCache
from stepcache.samplers.diffusers import StepCacheCallback, attach, patch

MASK = Static([1, 1, 0, 1, 0, 1])


def cached(name: str, method=MASK, **how):
    """The image of a tiny pipeline and what its cache says."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with attach(pipe, method, components=tiny.denoisers, **how) as cache:
        return run(pipe, tiny), cache.report


class Runs:
    """Counts the forwards of one module."""

    def __init__(self, module) -> None:
        self.count, self._forward = 0, module.forward
        module.forward = self

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self._forward(*args, **kwargs)


CONTROLLED = ("sd-controlnet", "sdxl-controlnet", "flux-controlnet")


def controlled(name: str, method, controlnet: bool = True, **call):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    runs = Runs(pipe.controlnet)
    with attach(pipe, method, controlnet=controlnet) as cache:
        image = pipe(**{**tiny.call(pipe), **call})[0]
    return torch.as_tensor(image), runs.count, cache.report


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlnet_is_skipped_with_the_denoiser_and_the_image_is_the_same(name):
    expected, every, report = controlled(name, MASK, controlnet=False)
    image, some, _ = controlled(name, MASK)
    assert torch.equal(image, expected)
    branch = report.branches[0]
    assert every == len(report.decisions(branch)) == 6
    assert some == report.decisions(branch).count("C") == 4


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlnet_in_front_of_a_denoiser_that_is_never_skipped_gives_the_same_image(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    full = torch.as_tensor(pipe(**tiny.call(pipe))[0])
    image, runs, _ = controlled(name, Off())
    assert torch.equal(image, full)
    assert runs == 6


def test_residuals_that_the_pipeline_works_on_are_computed_where_it_does():
    expected, every, _ = controlled("sd-controlnet", MASK, controlnet=False, guess_mode=True)
    image, runs, _ = controlled("sd-controlnet", MASK, guess_mode=True)
    assert torch.equal(image, expected)
    assert runs == every == 6


@pytest.mark.parametrize("window", [{"control_guidance_end": 0.5}, {"control_guidance_start": 0.4}])
def test_a_controlnet_that_acts_on_a_part_of_the_run_is_skipped_too(window):
    expected, _, _ = controlled("sd-controlnet", MASK, controlnet=False, **window)
    image, runs, _ = controlled("sd-controlnet", MASK, **window)
    assert torch.equal(image, expected)
    assert runs == 4


def test_a_second_run_puts_off_what_it_can_and_draws_the_same():
    tiny = PIPELINES["sd-controlnet"]
    pipe = tiny.build()
    runs = Runs(pipe.controlnet)
    with attach(pipe, Forecast(min_evaluations=0)):
        first, second = run(pipe, tiny), run(pipe, tiny)
    assert torch.equal(first, second)
    assert runs.count == 2 * "CSCSCC".count("C")


@pytest.mark.parametrize(
    ("name", "decisions"), [("sd-pndm", "CCSCSCC"), ("sd-heun", "CCSCSCSCSCC"), ("sd", "CCSCSC"), ("flux", "CCSCSC")]
)
def test_forecast_computes_every_second_evaluation(name, decisions):
    _, report = cached(name, Forecast(min_evaluations=0))
    assert {report.decisions(branch) for branch in report.branches} == {decisions}


def test_the_branches_have_the_names_that_the_pipeline_gives_them():
    _, report = cached("wan")
    assert tuple(report.branches) == ("cond", "uncond")
    assert report.decisions("cond") == report.decisions("uncond") == "CCSCSC"


def test_instruct_pix2pix_has_three_branches():
    _, report = cached("pix2pix")
    assert tuple(report.branches) == ("cond", "image", "uncond")


def test_stable_video_diffusion_has_two_although_its_image_latents_differ():
    _, report = cached("svd")
    assert tuple(report.branches) == ("uncond", "cond")


def test_video_and_audio_are_predicted_together():
    image, report = cached("ltx-2")
    assert report.skipped > 0
    assert not any("always computed" in note for note in report.notes)
    assert torch.isfinite(image).all()


@pytest.mark.parametrize(
    ("first", "names"), [(None, ["call", "call 2"]), (False, ["cond", "uncond"]), (True, ["uncond", "cond"])]
)
def test_separate_calls_may_be_named_by_their_order(first, names):
    image, report = cached("chroma", cfg_compute_first=first)
    assert report.branches == names
    assert torch.equal(image, cached("chroma")[0])


def test_branches_in_one_call_are_one_where_they_are_said_to_come_apart():
    _, report = cached("sd", enable_separate_cfg=True)
    assert tuple(report.branches) == ("call",)
    _, report = cached("sd", enable_separate_cfg=None)
    assert tuple(report.branches) == ("uncond", "cond")


def test_further_calls_are_computed_where_all_branches_are_said_to_come_in_one():
    _, report = cached("wan", enable_separate_cfg=False)
    assert report.branches == ["cond"]
    assert any("enable_separate_cfg=False" in note for note in report.notes)


def test_every_branch_decides_by_its_own_change_if_asked_to():
    # a threshold of which the branches think differently
    method = UCache(threshold=1.0, start=0.0, end=1.0)
    _, together = cached("wan", method)
    _, apart = cached("wan", method, cfg_diff_compute_separate=True)
    assert together.decisions("cond") == together.decisions("uncond")
    estimates = [{e.branch for e in report.events if e.estimate is not None} for report in (together, apart)]
    assert estimates == [{"cond"}, {"cond", "uncond"}]


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(OptionError, match="cfg_compute_first"):
        StepCacheCallback("ucache", enable_separate_cfg=False, cfg_compute_first=True)
    with pytest.raises(OptionError, match="enable_separate_cfg"):
        StepCacheCallback("ucache", enable_separate_cfg="perhaps")


def test_the_bar_shows_what_was_skipped_under_the_callback_too():
    tiny = PIPELINES["sd"]
    pipe = tiny.build()
    shown = io.StringIO()
    pipe.set_progress_bar_config(file=shown, mininterval=0)
    pipe(**tiny.call(pipe), callback_on_step_end=StepCacheCallback(MASK))
    assert "skipped 2/6" in shown.getvalue()


def test_a_torch_that_does_not_call_the_slot_is_refused_with_a_sentence(monkeypatch):
    assert patch.slot_is_called()
    monkeypatch.setattr(patch, "slot_is_called", lambda: False)
    with pytest.raises(RuntimeError, match=r"use torch 2\.4 or newer"), attach(PIPELINES["sd"].build(), MASK):
        pass
