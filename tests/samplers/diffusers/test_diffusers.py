"""The diffusers adapter on real pipeline classes with tiny random weights."""

from __future__ import annotations

import copy
import functools
import io
import re
import statistics
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise

import diffusers
import pytest
import torch
from tiny_pipelines import PIPELINES, of_diffusers, run

import stepcache
from stepcache import EasyCache, Forecast, Off, OptionError, Static, StepMask, UCache
from stepcache.bench import METRICS
from stepcache.demo import pipelines, sampling
from stepcache.extend import Engine
from stepcache.samplers.diffusers import SLOT, StepCacheCallback, attach, frames, places, training_sigma

MASK = StepMask("fast", "static")
WITHOUT_WAN = pytest.mark.skipif(not hasattr(diffusers, "WanPipeline"), reason="this diffusers has no Wan")
EXAMPLES = ["sdxl", "flux", pytest.param("wan", marks=WITHOUT_WAN)]


class Counted:
    """Counts the forwards of a pipeline's denoisers, below anything that is attached."""

    def __init__(self, pipe, names) -> None:
        self.calls = 0
        for name in names:
            module = getattr(pipe, name)
            module.forward = self._counting(module.forward)

    def _counting(self, forward: Callable) -> Callable:
        @functools.wraps(forward)
        def counting(*args, **kwargs):
            self.calls += 1
            return forward(*args, **kwargs)

        return counting

    def of(self, work: Callable) -> tuple[torch.Tensor, int]:
        self.calls = 0
        return work(), self.calls


@contextmanager
def calls_asked():
    """Collects the calls that engines answer."""
    seen: list = []
    answer = Engine.__call__

    def noting(self, call):
        if not any(call is other for other in seen):
            seen.append(call)
        return answer(self, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__call__", noting)
        yield seen


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "wan-2.2"])
def test_never_skipping_is_bit_identical_and_a_static_mask_skips_exactly_the_named_calls(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    counted = Counted(pipe, tiny.denoisers)
    full, calls = counted.of(lambda: run(pipe, tiny))

    with attach(pipe, Off(), components=tiny.denoisers) as cache:
        off, off_calls = counted.of(lambda: run(pipe, tiny))
    assert torch.equal(off, full)
    assert off_calls == calls

    with attach(pipe, Static(MASK), components=tiny.denoisers) as cache:
        first, first_calls = counted.of(lambda: run(pipe, tiny))
        with calls_asked() as asked:
            again, again_calls = counted.of(lambda: run(pipe, tiny))
    assert torch.equal(first, again)
    assert torch.isfinite(first).all()
    assert first_calls == again_calls < calls
    assert not torch.equal(first, full)
    digits = MASK.for_steps(cache.report.scheduled_steps)
    for event in cache.report.events:
        assert event.computed or digits[event.position.step] == 0
    if "long" not in name:
        computed = [call.names for call in asked if call.computed is not None]
        assert len(computed) == again_calls
        assert sum(map(len, computed)) == cache.report.calls

    for component in tiny.denoisers:
        assert SLOT not in getattr(pipe, component).__dict__
    after, after_calls = counted.of(lambda: run(pipe, tiny))
    assert torch.equal(after, full)
    assert after_calls == calls


def test_two_experts_have_a_cache_each_and_the_switch_computes():
    tiny = PIPELINES["wan-2.2"]
    pipe = tiny.build()
    counted = Counted(pipe, tiny.denoisers)
    full, calls = counted.of(lambda: run(pipe, tiny))
    with attach(pipe, Static([1] + [0] * 5)) as cache:
        _, cached_calls = counted.of(lambda: run(pipe, tiny))
    assert cached_calls == 4 < calls  # the first step, and the switch, of cond and uncond
    assert cache.report.calls == 4
    assert torch.equal(run(pipe, tiny), full)


@pytest.fixture
def sd():
    tiny = PIPELINES["sd"]
    pipe = tiny.build()
    return pipe, tiny, Counted(pipe, tiny.denoisers)


def image(pipe, tiny, **more) -> torch.Tensor:
    return pipe(**{**tiny.call(pipe), **more}).images


@pytest.mark.parametrize("name", ["wan-2.2", "sd"])
def test_nothing_is_remembered_after_the_run_while_still_attached(name):
    """Neither by the expert that stood at the end, nor by the one before it, whose last step is not the run's."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with attach(pipe, Forecast()) as cache:
        run(pipe, tiny)
        runs = [denoiser.engine.runs.current for denoiser in cache._denoisers.values()]
        assert [run.caches for run in runs if run is not None and run.caches] == []
        assert cache.report.evaluations == 6


def test_the_callback_alone_attaches_after_the_first_step_and_leaves_at_the_last(sd):
    pipe, tiny, counted = sd
    full = image(pipe, tiny)
    cache = StepCacheCallback(Static(MASK))
    cached, calls = counted.of(lambda: image(pipe, tiny, callback_on_step_end=cache))
    assert SLOT not in pipe.unet.__dict__
    assert calls == cache.report.decisions("cond").count("C")
    assert len(cache.report.decisions("cond")) == 6
    with attach(pipe, Static([1, 1, *MASK.for_steps(6)[2:]])):
        expected = image(pipe, tiny)
    assert torch.equal(cached, expected)
    assert not torch.equal(cached, full)
    assert torch.equal(image(pipe, tiny), full)


def test_one_callback_serves_many_calls_in_a_row_and_another_pipeline(sd):
    pipe, tiny, counted = sd
    cache = StepCacheCallback("ucache", threshold=2.0)
    first, calls = counted.of(lambda: image(pipe, tiny, callback_on_step_end=cache))
    assert calls < 6
    assert torch.equal(image(pipe, tiny, callback_on_step_end=cache), first)
    other = PIPELINES["sdxl"].build()
    run_other = other(**PIPELINES["sdxl"].call(other), callback_on_step_end=cache).images
    assert torch.isfinite(run_other).all()
    assert torch.equal(image(pipe, tiny, callback_on_step_end=cache), first)
    assert SLOT not in pipe.unet.__dict__
    assert SLOT not in other.unet.__dict__


def test_an_exception_leaves_nothing_that_the_next_run_would_see(sd):
    pipe, tiny, _ = sd
    full = image(pipe, tiny)

    def broken(pipe, step, timestep, kwargs):
        if step == 3:
            raise RuntimeError("stop")
        return kwargs

    with pytest.raises(RuntimeError, match="stop"):
        image(pipe, tiny, callback_on_step_end=StepCacheCallback("ucache", threshold=9.0, also=broken))
    assert torch.equal(image(pipe, tiny), full)
    assert SLOT not in pipe.unet.__dict__
    with pytest.raises(RuntimeError, match="stop"), attach(pipe, UCache(9.0)):
        image(pipe, tiny, callback_on_step_end=broken)
    assert SLOT not in pipe.unet.__dict__
    assert torch.equal(image(pipe, tiny), full)


def test_a_run_in_the_frame_of_one_that_was_broken_off_is_another(sd, monkeypatch):
    """Python gives a new frame the id of one that has ended, more often in some versions than in others."""
    monkeypatch.setattr(frames, "key", lambda frame: (0, frame.f_code))
    test_an_exception_leaves_nothing_that_the_next_run_would_see(sd)


def test_the_callback_composes_with_the_users_own(sd):
    pipe, tiny, _ = sd
    steps = []

    def mine(pipe, step, timestep, kwargs):
        steps.append((step, sorted(kwargs)))
        return kwargs

    mine.tensor_inputs = ["latents"]
    cache = StepCacheCallback(UCache(2.0), also=mine)
    assert cache.tensor_inputs == ["latents"]
    image(pipe, tiny, callback_on_step_end=cache, callback_on_step_end_tensor_inputs=["latents"])
    assert steps == [(step, ["latents"]) for step in range(6)]


def test_two_pipelines_may_be_cached_at_once(sd):
    pipe, tiny, _ = sd
    other = PIPELINES["flux"].build()
    with attach(pipe, Static(MASK)) as a, attach(other, Static(MASK)) as b:
        first = image(pipe, tiny), run(other, PIPELINES["flux"])
        second = image(pipe, tiny), run(other, PIPELINES["flux"])
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert a.report.skipped > 0 < b.report.skipped


def test_the_place_survives_copies_and_what_is_copied_has_no_cache(sd, tmp_path):
    pipe, tiny, _ = sd
    del pipe.unet.forward
    with attach(pipe, Static(MASK)) as cache:
        assert SLOT not in copy.deepcopy(pipe.unet).__dict__
        pipe.unet.save_pretrained(tmp_path)
        pipe.to(torch.float32)
        image(pipe, tiny)
        assert cache.report.skipped > 0
    assert SLOT not in pipe.unet.__dict__
    assert type(pipe.unet).from_pretrained(tmp_path).config.in_channels == pipe.unet.config.in_channels


def test_a_compiled_denoiser_is_called_through_its_compilation(sd):
    pipe, tiny, _ = sd
    del pipe.unet.forward
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    full = image(pipe, tiny)
    pipe.unet.compile(backend=backend)
    occupant = pipe.unet.__dict__[SLOT]
    image(pipe, tiny)
    compiled = len(graphs)
    assert compiled > 0
    with attach(pipe, Static(MASK)) as cache:
        image(pipe, tiny)
    assert cache.report.skipped > 0
    assert len(graphs) == compiled  # nothing of the cache is in the graph
    assert pipe.unet.__dict__[SLOT] is occupant
    torch.testing.assert_close(image(pipe, tiny), full)


def test_compiling_afterwards_takes_the_place_and_is_said_once(sd):
    pipe, tiny, _ = sd
    del pipe.unet.forward
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(pipe, Static(MASK)):
            pipe.unet.compile(backend="eager")
            image(pipe, tiny)
    assert len([w for w in caught if "took the place of the cache" in str(w.message)]) == 1
    del pipe.unet.__dict__[SLOT]


def test_attaching_twice_is_an_error_and_so_is_a_denoiser_that_is_not_there(sd):
    pipe, _, _ = sd
    with attach(pipe, UCache()), pytest.raises(OptionError, match="unet is cached already"), attach(pipe, UCache()):
        pass
    assert SLOT not in pipe.unet.__dict__
    with pytest.raises(OptionError, match="StableDiffusionPipeline has no denoiser 'transformer'"):
        attach(pipe, UCache(), components=["transformer"]).__enter__()
    with pytest.raises(OptionError, match=r"as components=\['unet'\]"):
        attach(pipe, UCache(), components="unet").__enter__()
    with pytest.raises(OptionError, match="options go with a method's name"):
        StepCacheCallback(UCache(), threshold=3)
    with pytest.raises(OptionError, match="Did you mean 'threshold'"):
        StepCacheCallback("easycache", treshold=3)


def test_attach_is_also_at_the_top_of_the_package(sd):
    pipe, tiny, _ = sd
    with stepcache.attach(pipe, UCache(), mask=StepMask.preset("fast", steps=6)) as cache:
        image(pipe, tiny)
    assert cache.report.steps == 6
    assert stepcache.attach is attach


def test_a_mask_of_another_length_is_an_error_with_both_lengths(sd):
    pipe, tiny, _ = sd
    with pytest.raises(OptionError, match="the mask has 3 entries, the run has 6 steps"), attach(pipe, Static("101")):
        image(pipe, tiny)
    assert SLOT not in pipe.unet.__dict__


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("EulerDiscrete", [(i, 0) for i in range(4)]),
        ("DDIM", [(i, 0) for i in range(4)]),
        ("DPMSolverMultistep", [(i, 0) for i in range(4)]),
        ("UniPCMultistep", [(i, 0) for i in range(4)]),
        ("HeunDiscrete", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]),
        ("KDPM2Discrete", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]),
        ("KDPM2AncestralDiscrete", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]),
        ("FlowMatchHeunDiscrete", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]),
    ],
)
def test_schedulers_with_two_calls_a_step_are_counted_in_steps(scheduler, expected):

    made = getattr(diffusers, f"{scheduler}Scheduler")()
    made.set_timesteps(4)
    found = places(made)
    assert [place[1:] for place in found] == expected
    sigmas = [sigma for sigma, _, _ in found]
    # KDPM2 ancestral ends in two that are equal up to rounding.
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(sigmas))
    assert min(sigmas) > 0


def test_pndm_has_one_step_of_two_calls_or_three_of_four():
    from diffusers import PNDMScheduler

    plms, prk = PNDMScheduler(skip_prk_steps=True), PNDMScheduler(skip_prk_steps=False)
    for scheduler in (plms, prk):
        scheduler.set_timesteps(8)
    assert [place[1:] for place in places(plms)] == [(0, 0), (0, 1), *((i, 0) for i in range(1, 8))]
    assert [place[1:] for place in places(prk)] == [(i, s) for i in range(3) for s in range(4)] + [
        (i, 0) for i in range(3, 8)
    ]


def test_sigma_is_the_schedulers_own_or_from_its_alphas():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    ddim = DDIMScheduler()
    ddim.set_timesteps(4)
    alphas = ddim.alphas_cumprod[ddim.timesteps]
    assert [place[0] for place in places(ddim)] == pytest.approx(((1 - alphas) / alphas).sqrt().tolist(), rel=1e-5)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(4)
    assert [place[0] for place in places(flow)] == pytest.approx(flow.sigmas[:-1].tolist())


def test_easycache_runs_by_the_schedulers_training_timetable(sd):
    pipe, tiny, _ = sd
    with attach(pipe, EasyCache(9.0)) as cache:
        image(pipe, tiny)
    assert any("shares of the training timetable" in note for note in cache.report.notes)


@pytest.mark.parametrize(
    ("scheduler", "config", "expected"),
    [
        ("FlowMatchEulerDiscrete", {"shift": 3.0}, "0.923166 >= sigma > 0.251872"),
        ("UniPCMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0}, "0.923166 >= sigma > 0.251872"),
        (
            "DDIM",
            {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
            "5.09241 >= sigma > 0.343705",
        ),
    ],
)
def test_the_training_timetable_is_the_schedulers(scheduler, config, expected):
    """The original's own figures for shares 0.2 and 0.9 (golden tables, flow3 and compvis)."""

    sigma = training_sigma(getattr(diffusers, f"{scheduler}Scheduler")(**config))
    high, low = sigma(0.2), sigma(0.9)
    assert f"{high:.6g} >= sigma > {low:.6g}" == expected


def test_diffusers_own_cache_inside_works_at_the_same_time():
    config = of_diffusers("hooks.FirstBlockCacheConfig")
    tiny = PIPELINES["flux"]
    pipe = tiny.build()
    pipe.transformer.enable_cache(config(threshold=1e-9))
    expected = run(pipe, tiny)
    with attach(pipe, Off()):
        assert torch.equal(run(pipe, tiny), expected)
    with attach(pipe, Static(MASK)) as cache:
        both = run(pipe, tiny)
    assert cache.report.skipped > 0
    assert torch.isfinite(both).all()
    pipe.transformer.disable_cache()
    assert torch.isfinite(run(pipe, tiny)).all()


def test_the_progress_bar_shows_what_was_skipped(sd):
    pipe, tiny, _ = sd
    shown = io.StringIO()
    pipe.set_progress_bar_config(file=shown, mininterval=0)
    with attach(pipe, Static(MASK)) as cache:
        image(pipe, tiny)
    decisions = cache.report.decisions("cond")
    assert (
        f"skipped {decisions.count('S')}/6" in shown.getvalue()
        or f"skipped {decisions[:5].count('S')}/5" in shown.getvalue()
    )
    assert "progress_bar" not in pipe.__dict__
    before = len(shown.getvalue())
    pipe.set_progress_bar_config(disable=True, file=shown)
    with attach(pipe, Static(MASK)):
        image(pipe, tiny)
    assert len(shown.getvalue()) == before


@pytest.mark.parametrize("method", [UCache(), EasyCache(), Static("fast"), UCache(mask="fast")], ids=lambda m: m.name)
def test_decisions_agree_with_the_k_diffusion_adapters_on_the_same_schedule(method):
    """The trained U-Net, Euler on Karras sigmas, through both hosts: the same decisions and the same image."""
    there = sampling.subject("unet").sample("euler", 20, method, range(10))
    here = pipelines.measured("unet").sample("Euler", 20, method, range(10))
    assert here.report.decisions("cond") == there.report.decisions("cond")
    assert here.report.decisions("uncond") == there.report.decisions("uncond")
    torch.testing.assert_close(here.images, there.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "scheduler"), [(n, s) for n, schedulers in pipelines.SCHEDULERS.items() for s in schedulers]
)
def test_the_trained_networks_draw_their_digits_under_every_scheduler(network, scheduler):
    subject, seeds = pipelines.measured(network), range(10)
    cached, full = (subject.sample(scheduler, 20, method, seeds) for method in (UCache(), None))
    assert 9 <= cached.calls <= 12
    assert statistics.fmean(sampling.right(cached.images, full.images, seeds)) >= 0.9
    assert statistics.fmean(METRICS["PSNR"](cached.images, full.images, seeds)) > 28


def test_forecast_is_the_default_method(sd):
    pipe, tiny, _ = sd
    with attach(pipe) as cache:
        image(pipe, tiny)
    assert cache.report.method == StepCacheCallback().report.method == "forecast"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_use_forecast_by_default(example, tmp_path, capsys, name):
    example(f"diffusers_{name}.py", "--tiny", "--device=cpu", "--steps=6", f"--out={tmp_path / 'image.png'}")
    assert "forecast" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run_on_tiny_random_weights(example, tmp_path, capsys, name):
    out = tmp_path / "image.png"
    example(f"diffusers_{name}.py", "--tiny", "--compare", "--method=static", "--mask=fast", f"--out={out}")
    assert out.stat().st_size > 100
    assert re.search(r"[1-9]\d* of \d+ forwards skipped", capsys.readouterr().out)
