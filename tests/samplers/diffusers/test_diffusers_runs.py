"""Which run a denoiser's call belongs to, and what changes within a run, in diffusers pipelines."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from tiny_pipelines import PIPELINES, SD_BETAS, image, run, sched
from torch import distributed as dist
from torch import nn

from stepcache import DBCache, Forecast, OptionError, Static, UCache
from stepcache.samplers.diffusers import SLOT, StepCacheCallback, attach

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SKIPS = Static("100000")
"""Computes the first step, and whatever has no cache."""


class Computed:
    """Counts the forwards of a module, below the cache."""

    def __init__(self, module: nn.Module) -> None:
        self.count, self._forward = 0, module.forward
        functools.update_wrapper(self, module.forward)
        module.forward = self

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self._forward(*args, **kwargs)


class Stop(Exception):
    pass


@pytest.fixture
def sd():
    tiny = PIPELINES["sd"]
    return tiny.build(), tiny


def draw(pipe, tiny, **more) -> torch.Tensor:
    return torch.as_tensor(pipe(**{**tiny.call(pipe), **more})[0])


def at_step(number: int, act):
    """A callback that does something after one step."""

    def callback(pipe, step, timestep, kwargs):
        if step == number:
            act(pipe, timestep, kwargs)
        return kwargs

    return callback


# Runs that begin inside the timesteps.


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "PNDM", "HeunDiscrete"])
def test_a_callback_counts_the_steps_of_an_img2img_run(scheduler):
    tiny = PIPELINES["sd-img2img"]
    pipe = tiny.build()
    pipe.scheduler = sched(scheduler, **SD_BETAS)
    half = {"num_inference_steps": 12, "strength": 0.5, "image": image()}
    callback = StepCacheCallback(UCache(1e9, start=0, warmup=4))
    draw(pipe, tiny, callback_on_step_end=callback, **half)
    assert callback.report.scheduled_steps == callback.report.steps == 6
    assert {event.position.step for event in callback.report.events if not event.computed} == {4}
    callback = StepCacheCallback(Static("101011"))  # of the run's length, which is right
    draw(pipe, tiny, callback_on_step_end=callback, **half)
    assert callback.report.scheduled_steps == 6


def test_the_callbacks_report_counts_the_first_step_which_was_computed(sd):
    pipe, tiny = sd
    computed, callback = Computed(pipe.unet), StepCacheCallback(Static("111010"))
    draw(pipe, tiny, callback_on_step_end=callback)
    report = callback.report
    assert report.decisions("cond") == report.decisions("uncond") == "CCCSCS"
    assert report.evaluations == report.steps == 6
    assert report.calls == 2 * computed.count
    assert report.speedup == 6 / 4


# Groups of ranks; test_diffusers_ranks.py has several.


@pytest.fixture
def world():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["attach", "callback"])
def test_the_group_is_asked_for_every_decision(sd, way, monkeypatch, world):
    pipe, tiny = sd
    asked = []

    def nobody_else_would(flags, op, group):
        asked.append(group)
        flags[0] = 0

    monkeypatch.setattr(dist, "all_reduce", nobody_else_would)
    computed = Computed(pipe.unet)
    if way == "attach":
        with attach(pipe, SKIPS, group=world):
            draw(pipe, tiny)
    else:
        draw(pipe, tiny, callback_on_step_end=StepCacheCallback(SKIPS, group=world))
    assert computed.count == 6
    assert set(asked) == {world}


# What changes within a run.


def decisions_after(pipe, tiny, act, method=SKIPS, **more) -> tuple[str, list[str]]:
    """The decisions of a run in which something happens after the third step."""
    with attach(pipe, method) as cache:
        draw(pipe, tiny, callback_on_step_end=at_step(2, act), **more)
    return cache.report.decisions("cond" if "cond" in cache.report.branches else "call"), cache.report.notes


def test_a_prompt_changed_within_a_run_drops_what_was_cached(sd):
    def change(pipe, timestep, kwargs):
        kwargs["prompt_embeds"] = kwargs["prompt_embeds"] + 1

    decisions, notes = decisions_after(*sd, change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert decisions == "CSSCSS"
    assert any("prompt" in note and "dropped" in note for note in notes)


def test_a_prompt_changed_in_place_drops_what_was_cached(sd):
    def change(pipe, timestep, kwargs):
        kwargs["prompt_embeds"].add_(1)

    decisions, _ = decisions_after(*sd, change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert decisions == "CSSCSS"


def test_a_prompt_that_is_made_anew_but_is_the_same_does_not(sd):
    def copied(pipe, timestep, kwargs):
        kwargs["prompt_embeds"] = kwargs["prompt_embeds"].clone()

    decisions, notes = decisions_after(*sd, copied, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert decisions == "CSSSSS"
    assert notes == []


def test_weights_changed_within_a_run_drop_what_was_cached(sd):
    def train(pipe, timestep, kwargs):
        with torch.no_grad():
            next(pipe.unet.parameters()).mul_(1.5)

    assert decisions_after(*sd, train)[0] == "CSSCSS"


@pytest.mark.filterwarnings("ignore:.*peft_config")
@pytest.mark.parametrize("change", ["load", "scale", "disable", "fuse"])
def test_a_lora_changed_within_a_run_drops_what_was_cached(sd, change):
    peft = pytest.importorskip("peft")
    pipe, tiny = sd
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    if change != "load":
        pipe.unet.add_adapter(config, adapter_name="a")
    acts = {
        "load": lambda *_: pipe.unet.add_adapter(config, adapter_name="a"),
        "scale": lambda *_: pipe.unet.set_adapters(["a"], [0.5]),
        "disable": lambda *_: pipe.unet.disable_adapters(),
        "fuse": lambda *_: pipe.unet.fuse_lora(),
    }
    assert decisions_after(pipe, tiny, acts[change])[0] == "CSSCSS"
    assert decisions_after(pipe, tiny, lambda *_: None)[0] == "CSSSSS"


class Adapted(nn.Module):
    """A layer with a LoRA, as peft's layers look from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.active_adapters, self.disable_adapters, self.merged_adapters = ["a"], False, []
        self.scaling = {"a": 1.0}

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.scaling.update(a=0.5),
        lambda layer: layer.active_adapters.append("b"),
        lambda layer: setattr(layer, "disable_adapters", True),
        lambda layer: layer.merged_adapters.append("a"),
    ],
    ids=["scale", "another", "disable", "fuse"],
)
def test_a_lora_layer_changed_within_a_run_drops_what_was_cached(sd, change):
    pipe, tiny = sd
    pipe.unet.lora, pipe.unet.peft_config = Adapted(), {"a": object()}
    assert decisions_after(pipe, tiny, lambda *_: change(pipe.unet.lora))[0] == "CSSCSS"
    assert decisions_after(pipe, tiny, lambda *_: None)[0] == "CSSSSS"


def test_class_labels_changed_within_a_loop_drop_what_was_cached():
    tiny = PIPELINES["dit"]
    pipe = tiny.build()
    labels, x = torch.tensor([3]), torch.ones(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(4)
    computed = Computed(pipe.transformer)
    with attach(pipe, Static("1000")):
        for k, t in enumerate(pipe.scheduler.timesteps):
            if k == 2:
                labels = torch.tensor([7])
            out = pipe.transformer(x, timestep=t[None], class_labels=labels).sample[:, :4]
            x = pipe.scheduler.step(out, t, x).prev_sample
    assert computed.count == 2


# Calls that are not the run's.


def test_a_denoiser_called_directly_after_a_broken_callback_run_is_itself(sd):
    pipe, tiny = sd
    given = (torch.ones(2, 4, 8, 8), pipe.scheduler.timesteps[0], torch.ones(2, 5, 16))
    expected = pipe.unet(*given).sample

    def stop(*_):
        raise Stop

    callback = StepCacheCallback(SKIPS, also=at_step(3, stop))
    with pytest.raises(Stop):
        draw(pipe, tiny, callback_on_step_end=callback)
    caches = [weakref.ref(entry.out) for engine in engines(callback) for entry in engine.runs.current.caches["cond"]]
    assert caches
    timestep = pipe.scheduler.timesteps[4]
    with torch.no_grad():
        assert torch.equal(pipe.unet(given[0], timestep, given[2]).sample, bare(pipe, given[0], timestep, given[2]))
    assert SLOT not in pipe.unet.__dict__
    gc.collect()
    assert [ref for ref in caches if ref() is not None] == []
    assert torch.equal(pipe.unet(*given).sample, expected)


def engines(callback):
    return [denoiser.engine for denoiser in callback._attachment._denoisers.values()]


def bare(pipe, *given):
    return pipe.unet._call_impl(*given).sample


def test_a_pipeline_that_calls_itself_otherwise_than_self_is_one(sd):
    pipe, tiny = sd
    other = copy.deepcopy(pipe.scheduler)

    class Mine:
        scheduler, unet = other, pipe.unet

        def __call__(mine):
            mine.scheduler.set_timesteps(6)
            with torch.no_grad():
                return [mine.unet(torch.ones(1, 4, 8, 8), t, torch.ones(1, 5, 16)) for t in mine.scheduler.timesteps]

    computed = Computed(pipe.unet)
    with attach(pipe, SKIPS):
        draw(pipe, tiny)
        computed.count = 0
        Mine()()
    assert computed.count == 6  # it has a scheduler of its own


@pytest.mark.parametrize("way", ["attach", "callback"])
def test_a_callback_that_calls_the_denoiser_gets_its_own_answer_and_disturbs_nothing(sd, way):
    pipe, tiny = sd
    seen = []

    def look(pipe, step, timestep, kwargs):
        x = kwargs["latents"]
        prompt = torch.zeros(len(x), 5, 16)
        seen.append(torch.equal(pipe.unet(x, timestep, prompt).sample, bare(pipe, x, timestep, prompt)))
        return kwargs

    if way == "attach":
        with attach(pipe, SKIPS) as cache:
            expected, report = draw(pipe, tiny), cache.report
            found = draw(pipe, tiny, callback_on_step_end=look)
            assert cache.report.decisions("cond") == report.decisions("cond")
    else:
        expected = draw(pipe, tiny, callback_on_step_end=StepCacheCallback(SKIPS))
        found = draw(pipe, tiny, callback_on_step_end=StepCacheCallback(SKIPS, also=look))
    assert torch.equal(found, expected)
    assert seen == [True] * 6


@pytest.mark.parametrize("way", ["attach", "callback", "same callback"])
def test_a_run_inside_another_ones_callback_leaves_it_its_cache_and_schedule(sd, way):
    pipe, tiny = sd
    full = draw(pipe, tiny, num_inference_steps=4)
    inner = []

    def nested(pipe, timestep, kwargs):
        if inner:
            return
        inner.append(None)
        how = {"callback_on_step_end": cache} if way == "same callback" else {}
        inner.append(draw(pipe, tiny, num_inference_steps=4, **how))

    also = at_step(2, nested)
    if way == "attach":
        with attach(pipe, SKIPS) as cache:
            draw(pipe, tiny, callback_on_step_end=also)
            report = cache.report
        assert report.decisions("cond") == "CSSSSS"
    else:
        cache = StepCacheCallback(SKIPS, also=also)
        draw(pipe, tiny, callback_on_step_end=cache)
        assert cache.report.decisions("cond") == "CCSSSS"
    assert torch.equal(inner[1], full)
    assert SLOT not in pipe.unet.__dict__


# Loops of the user's own.


@pytest.mark.parametrize("kind", ["DDIM", "DDPM", "PNDM"])
@pytest.mark.parametrize("stop", [2, 3, 6])
def test_a_loop_begun_again_over_the_same_timesteps_is_another_run(sd, kind, stop):
    pipe, _ = sd
    pipe.scheduler = sched(kind, skip_prk_steps=True, **SD_BETAS) if kind == "PNDM" else sched(kind, **SD_BETAS)
    pipe.scheduler.set_timesteps(6)
    prompt, computed = torch.ones(1, 5, 16), Computed(pipe.unet)

    def loop(count: int) -> list[int]:
        at = []
        for t in pipe.scheduler.timesteps[:count]:
            before = computed.count
            with torch.no_grad():
                pipe.unet(torch.rand(1, 4, 8, 8), t, prompt)
            at.append(computed.count - before)
        return at

    with attach(pipe, SKIPS) as cache:
        loop(stop)
        again = loop(7)
        assert again[0] == 1
        assert sum(again) == (2 if kind == "PNDM" else 1)  # PNDM evaluates twice in its first step
        assert cache.report.evaluations == len(again)


# Schedulers and denoisers of several stages.


@pytest.fixture
def unclip():
    """The two stages of StableUnCLIP, as its loop runs them: a prior and a U-Net, each with a scheduler of its own."""

    class Stage(nn.Module):
        def forward(self, hidden_states, timestep):
            return 0.5 * hidden_states

    class Pipe:
        def __init__(self):
            self.prior, self.unet = Stage(), Stage()
            self.prior_scheduler, self.scheduler = sched("DDIM", **SD_BETAS), sched("DDIM", **SD_BETAS)
            self.scheduler.set_timesteps(4)

        def __call__(self, steps=(8, 6)):
            x = torch.ones(1, 4, 2, 2)
            for scheduler, stage, count in zip(
                (self.prior_scheduler, self.scheduler), (self.prior, self.unet), steps, strict=True
            ):
                scheduler.set_timesteps(count)
                for t in scheduler.timesteps:
                    x = scheduler.step(stage(x, t), t, x).prev_sample
            return (x,)

    return Pipe()


def test_a_prior_is_placed_on_its_own_scheduler(unclip):
    with attach(unclip, UCache(1e9, start=0)) as cache:
        for _ in range(2):
            unclip()
            prior, unet = cache.reports["prior"], cache.reports["unet"]
            assert (prior.scheduled_steps, unet.scheduled_steps) == (8, 6)
            assert prior.decisions("call")[:7] == "CCSSSSS"
            assert cache.report.scheduled_steps == 6
    assert any("prior_scheduler" in note for note in cache.report.notes)


def test_the_prior_inside_a_combined_pipeline_is_cached(unclip):
    class Inner:
        def __init__(self, prior, scheduler):
            self.prior, self.scheduler = prior, scheduler

        def __call__(self):
            self.scheduler.set_timesteps(6)
            for t in self.scheduler.timesteps:
                self.prior(torch.ones(1, 4), t)

    class Combined:
        def __init__(self):
            self.prior_prior, self.unet = unclip.prior, unclip.unet
            self.prior_scheduler, self.scheduler = unclip.prior_scheduler, unclip.scheduler
            self.prior_pipe = Inner(self.prior_prior, self.prior_scheduler)

        def __call__(self):
            self.prior_pipe()

    pipe = Combined()
    for components in (None, ["prior_prior"]):
        with attach(pipe, SKIPS, components=components) as cache:
            pipe()
        assert cache.reports["prior_prior"].decisions("call") == "CSSSSS"


class Looping:
    """A pipeline of one toy denoiser."""

    def __init__(self, denoiser: nn.Module, name: str = "hidden_states") -> None:
        self.transformer, self.name = denoiser, name
        self.scheduler = sched("DDIM", **SD_BETAS)
        self.scheduler.set_timesteps(6)

    def __call__(self, **more):
        self.scheduler.set_timesteps(6)
        return [self.transformer(**{self.name: torch.ones(1, 4, 2, 2)}, timestep=t) for t in self.scheduler.timesteps]


def test_a_kv_cache_in_one_answer_does_not_switch_the_cache_off():
    class WithKV(nn.Module):
        def forward(self, hidden_states, timestep, mode="cached"):
            out = 0.5 * hidden_states
            return (out, object()) if mode == "extract" else (out,)

    class Pipe(Looping):
        def __call__(self):
            self.scheduler.set_timesteps(6)
            return [
                self.transformer(torch.ones(1, 4), t, mode="cached" if k else "extract")
                for k, t in enumerate(self.scheduler.timesteps)
            ]

    pipe = Pipe(WithKV())
    computed = Computed(pipe.transformer)
    with attach(pipe, SKIPS) as cache:
        answers = pipe()
    assert [len(answer) for answer in answers] == [2, 1, 1, 1, 1, 1]
    assert computed.count == 2
    assert any("more in it than tensors" in note for note in cache.report.notes)


def test_many_calls_at_one_place_do_not_make_a_cache_each():
    class Half(nn.Module):
        def forward(self, hidden_states, timestep):
            return 0.5 * hidden_states

    class Pipe(Looping):
        def __call__(self):
            self.scheduler.set_timesteps(6)
            for _ in range(20):
                self.transformer(torch.ones(1, 4), self.scheduler.timesteps[0])

    pipe = Pipe(Half())
    with attach(pipe, Forecast()) as cache:
        pipe()
        assert len(cache.report.branches) == 4
    assert any("more than 4 calls at the same place" in note for note in cache.report.notes)


def test_every_pass_over_the_timesteps_is_cached():
    tiny = PIPELINES["skyreels-v2-long"]
    pipe = tiny.build()
    computed = Computed(pipe.transformer)
    with attach(pipe, SKIPS):
        run(pipe, tiny)
    assert computed.count == 4  # the first step, of cond and uncond, in each of two passes


# Nothing is left out in silence.


def test_latents_that_are_not_found_are_warned_of():
    class Half(nn.Module):
        def forward(self, noisy, timestep):
            return 0.5 * noisy

    pipe = Looping(Half(), "noisy")
    with pytest.warns(UserWarning, match="transformer: its latents are not found"), attach(pipe, SKIPS) as cache:
        pipe()
    assert any("its latents are not found" in note for note in cache.report.notes)


def test_a_method_that_is_off_at_its_defaults_is_warned_of(sd):
    pipe, tiny = sd
    with pytest.warns(UserWarning, match="fbcache can skip nothing at its defaults"), attach(pipe, "fbcache") as cache:
        draw(pipe, tiny)
    assert any("can skip nothing" in note for note in cache.report.notes)


def test_what_others_set_meanwhile_stays_when_cache_dit_leaves():
    pytest.importorskip("cache_dit")
    tiny = PIPELINES["flux"]
    pipe = tiny.build()
    for container in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        container.extend([copy.deepcopy(container[0]) for _ in range(3)])
    block, hook = pipe.transformer.transformer_blocks[0], object()
    with attach(pipe, DBCache(1, 1, threshold=0.9, warmup=2)):
        block._hf_hook = hook
        block.compile(backend="eager")
        run(pipe, tiny)
    assert block.__dict__["_hf_hook"] is hook
    assert SLOT in block.__dict__
    torch._dynamo.reset()


# Splitting a batched call.


def test_a_call_whose_arguments_are_not_ordered_by_rows_for_certain_is_not_split():
    class Biased(nn.Module):
        def forward(self, hidden_states, timestep, table=None):
            return 0.5 * hidden_states + 0 * timestep

    class Pipe(Looping):
        def __call__(self, table):
            self.scheduler.set_timesteps(6)
            x = torch.ones(1, 4)
            return [self.transformer(torch.cat([x, x]), t, table=table) for t in self.scheduler.timesteps]

    pipe = Pipe(Biased())
    for table, split in ((torch.ones(2, 3), True), (torch.ones(3, 3), False), ([1.0, 2.0], False)):
        with attach(pipe, Static("100000", skip="uncond")) as cache:
            pipe(table)
        skipped = cache.report.decisions("uncond").count("S")
        assert skipped == (5 if split else 0)
        assert any("in a call of 2 rows" in note for note in cache.report.notes) != split


def test_a_denoiser_that_is_missing_its_scheduler_is_refused():
    class Pipe:
        scheduler, unet = None, nn.Linear(1, 1)

    with pytest.raises(OptionError, match="no scheduler for unet"), attach(Pipe()):
        pass
