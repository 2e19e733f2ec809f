"""`attach(decide="sample")`: an image does not depend on the others in its batch."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_pipelines import PIPELINES

from stepcache import OptionError, UCache
from stepcache.samplers.diffusers import StepCacheCallback, attach

THRESHOLDS = {"sd": 0.25, "flux": 0.35 if hasattr(FluxTransformer2DModel, "cache_context") else 0.335}
"""At these the seeds 0, 1 and 2 skip other evaluations: of SD with guidance in one call, of Flux without.

Old releases of diffusers, which do not name branches yet, make another tiny Flux.
"""


def drawn(name, seeds, way="attach", **options):
    """The images, how many rows each call of the denoiser had, and the report."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    module, rows = getattr(pipe, tiny.denoisers[0]), []

    @functools.wraps(module.forward)
    def counting(*args, original=module.forward, **kwargs):
        rows.append(len(args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))))
        return original(*args, **kwargs)

    module.forward = counting
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    asked = {"num_inference_steps": 10, "num_images_per_prompt": len(seeds), "generator": generators}
    method = UCache(THRESHOLDS[name], start=0)
    if way == "attach":
        with attach(pipe, method, **options) as cache:
            images = pipe(**{**tiny.call(pipe), **asked}).images
    else:
        cache = StepCacheCallback(method, **options)
        images = pipe(**{**tiny.call(pipe), **asked}, callback_on_step_end=cache).images
    return images, rows, cache.report


@pytest.mark.parametrize("name", THRESHOLDS)
def test_an_image_that_decides_for_itself_is_the_one_drawn_alone(name):
    images, rows, report = drawn(name, range(3), decide="sample")
    made, every = 0, set()
    for seed in range(3):
        expected, calls, one = drawn(name, [seed])
        torch.testing.assert_close(images[seed], expected[0], rtol=0, atol=1e-5)
        for branch in one.branches:
            assert report.decisions(f"{branch} of sample {seed + 1}") == one.decisions(branch)
        made, every = made + sum(calls), every | {one.decisions(one.branches[-1])}
    assert len(every) > 1
    assert sum(rows) == made
    assert len(rows) < made / len(one.branches)
    assert len(report.notes) == len(set(report.notes))


def test_with_any_all_images_are_computed_if_one_needs_it():
    _, rows, report = drawn("sd", range(3), decide="any")
    assert set(rows) == {6}
    assert "another sample is computed" in {event.reason for event in report.events}


def test_the_callback_passes_it_on():
    _, _, report = drawn("flux", range(2), "callback", decide="sample")
    (name,) = drawn("flux", [0])[2].branches  # "cond", or "call" if diffusers does not name its branches yet
    assert report.branches == [f"{name} of sample 1", f"{name} of sample 2"]


def test_two_ways_to_decide_are_refused():
    with pytest.raises(OptionError, match="cfg_diff_compute_separate with decide='sample'"):
        drawn("sd", [0], decide="sample", cfg_diff_compute_separate=True)
    with pytest.raises(OptionError, match=r"unknown value of decide 'samples'\. Did you mean 'sample'"):
        drawn("sd", [0], decide="samples")
