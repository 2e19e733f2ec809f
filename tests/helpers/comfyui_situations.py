"""What must hold in ComfyUI, on any host that offers `comfyui_double.Double`'s few methods.

Collected twice: on the double (tests/samplers/comfyui), and on a real checkout (tests/hosts), each
with the samplers that it has as the fixture `sampler`.
Each failure of ComfyUI's own EasyCache and LazyCache that was seen there has a test.
"""

from __future__ import annotations

import copy
import gc
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from stepcache import OptionError
from stepcache.samplers import comfyui
from stepcache.samplers.comfyui import cache_of, chosen_method, patched
from stepcache.samplers.k_diffusion import EVALUATIONS, CachedDenoiser
from stepcache.samplers.k_diffusion import sample as k_sample

SIGMAS = torch.tensor([14.0, 9.0, 5.5, 3.4, 2.1, 1.3, 0.8, 0.45, 0.2, 0.05, 0.0])
RESTART = torch.tensor([14.0, 9.0, 5.5, 3.4, 2.1, 1.3, 8.0, 4.0, 2.0, 0.9, 0.3, 0.0])
FLOW = torch.linspace(1, 0, 11)
STEPS = len(SIGMAS) - 1
HEUN = ("heun", "dpm_2", "dpmpp_sde")
SKIP_UNCOND = "skip=uncond"
CRITERION = "threshold=1.5,start=0,end=1"
"""Skips some evaluations and computes others with the small random networks here."""


def chosen(name: str, options: str = "", number: str = "default", mask: str = "none", policy: str = "dynamic"):
    return chosen_method(name, number, options, mask=mask, policy=policy)


def noise(rows: int = 1, size: int = 8, first: int = 7) -> Tensor:
    return torch.cat(
        [torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(first + k)) for k in range(rows)]
    )


def run(host: Any, patcher: Any, sampler: Any = "euler", sigmas: Tensor = SIGMAS, x: Tensor | None = None, **more: Any):
    """One run; `host.rows` are then the rows of its forwards."""
    x = noise() if x is None else x
    guider = host.guider(
        patcher,
        more.pop("positive", None) or host.cond(1),
        more.pop("negative", None) or host.cond(2),
        more.pop("cfg", 5.0),
    )
    host.rows.clear()
    torch.manual_seed(5)
    with torch.inference_mode():
        sampler = host.sampler(sampler) if isinstance(sampler, str) else sampler
        return guider.sample(x, torch.zeros_like(x), sampler, sigmas.clone(), seed=5, **more)


def with_option(patcher: Any, key: str, value: Any) -> Any:
    clone = patcher.clone()
    clone.model_options[key] = value
    return clone


def decisions(patcher: Any, branch: str = "cond") -> str:
    return cache_of(patcher).report.decisions(branch)


def close(a: Tensor, b: Tensor, share: float = 1e-3) -> bool:
    return bool((a - b).norm() <= share * b.norm())


def test_off_is_bit_identical_with_the_same_calls(host: Any, sampler: str) -> None:
    model = host.model()
    bare, rows = run(host, model, sampler), list(host.rows)
    for name, options in (
        ("none", ""),
        ("ucache", "threshold=0"),
        ("forecast", "mask=1111111111"),
        ("forecast", f"warmup=20,{SKIP_UNCOND}"),
    ):
        assert torch.equal(run(host, patched(model, chosen(name, options)), sampler), bare)
        assert host.rows == rows


def test_counts_are_those_of_the_network(host: Any, sampler: str) -> None:
    model = patched(host.model(), chosen("forecast"))
    run(host, model, sampler)
    report = cache_of(model).report
    assert report.steps == STEPS
    assert report.evaluations == (2 * STEPS - 1 if sampler in HEUN else STEPS)
    assert report.calls + report.skipped == 2 * report.evaluations
    assert report.calls == sum(host.rows)
    assert 0 < report.skipped < report.evaluations * 2
    assert decisions(model) == decisions(model, "uncond")
    assert [event.position.step for event in report.events if event.branch == "cond"] == [
        step for step in range(STEPS) for _ in range(2 if sampler in HEUN and step < STEPS - 1 else 1)
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [("forecast", ""), ("ucache", CRITERION), ("easycache", CRITERION), ("spectrum", ""), ("forecast", SKIP_UNCOND)],
)
def test_the_same_decisions_as_under_k_diffusion(host: Any, sampler: str, name: str, options: str) -> None:
    function = host.sampler(sampler).sampler_function
    first: list[Tensor] = []

    def seen(executor: Any, x: Tensor, *args: Any) -> Tensor:
        first.append(x.clone())
        return executor(x, *args)

    method = chosen(name, options)
    plain = host.model()
    model = patched(plain, method)
    model.add_wrapper_with_key("predict_noise", "test", seen)
    there = run(host, model, sampler)
    context = torch.cat([host.cond(2)[0][0], host.cond(1)[0][0]])

    def inner(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return plain.model.apply_model(x, sigma, **extra)

    sampling = plain.get_model_object("model_sampling")
    inner.t_to_sigma = lambda t: torch.tensor(sampling.percent_to_sigma(1 - float(t) / 999))
    inner.sigmas = sampling.sigmas
    # What ComfyUI's own samplers ask of the model they are given.
    host_model = types.SimpleNamespace(model_patcher=plain, inner_model=plain.model)
    cached = CachedDenoiser(inner, method, branches=("uncond", "cond"), scalings="eps")

    def guided(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        uncond, cond = cached(torch.cat([x, x]), torch.cat([sigma, sigma]), c_crossattn=context).chunk(2)
        return uncond + (cond - uncond) * 5.0

    guided.inner_model = host_model
    torch.manual_seed(5)
    with torch.inference_mode():
        keywords = {"extra_args": {"seed": 5, "model_options": {}}, "disable": True}
        if function.__name__ in EVALUATIONS:
            here = k_sample(function, guided, first[0], SIGMAS.clone(), cache=cached, **keywords)
        else:
            with cached.run(SIGMAS.clone(), comfyui.EVALUATIONS[function.__name__]):
                here = function(guided, first[0], SIGMAS.clone(), **keywords)
    assert decisions(model) == cached.report.decisions("cond")
    assert decisions(model, "uncond") == cached.report.decisions("uncond")
    assert "S" in decisions(model, "uncond")
    assert close(there, getattr(host, "latent_out", lambda x: x)(here))


@pytest.mark.parametrize("options", ["", SKIP_UNCOND])
def test_no_state_after_a_run_nor_after_a_broken_one(host: Any, options: str) -> None:
    def latents() -> int:
        gc.collect()
        return sum(isinstance(one, Tensor) and one.ndim > 0 for one in gc.get_objects())

    model = patched(host.model(), chosen("forecast", options))
    good = run(host, model)
    before = latents()
    usual = copy.deepcopy(model.model_options)

    def interrupt(step: int, *info: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt

    guider = host.guider(model, host.cond(1), host.cond(2))
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        guider.sample(
            noise(), torch.zeros_like(noise()), host.sampler("euler"), SIGMAS.clone(), callback=interrupt, seed=5
        )
    assert guider.model_options is model.model_options
    assert model.model_options == usual
    assert "S" in decisions(model, "uncond")
    del guider
    assert latents() <= before
    assert torch.equal(run(host, model), good)


def test_a_run_leaves_the_model_without_a_cache_alone(host: Any) -> None:
    plain = host.model()
    bare = run(host, plain)
    run(host, patched(plain, chosen("forecast")))
    assert torch.equal(run(host, plain), bare)
    assert cache_of(plain) is None


def test_heun_plus_plus_with_sigmas_that_rise_is_one_run(host: Any) -> None:
    model = patched(host.model(), chosen("easycache", "threshold=0.4"))
    run(host, model, "heunpp2")
    report = cache_of(model).report
    assert report.evaluations == 3 * STEPS - 3
    assert report.calls == sum(host.rows)
    assert report.skipped > 0


@pytest.mark.parametrize("name", ["forecast", "ucache", "easycache"])
def test_a_restart_schedule_above_the_window(host: Any, name: str) -> None:
    model = patched(host.model(), chosen(name, "threshold=1" if name.endswith("cache") else ""))
    assert run(host, model, sigmas=RESTART).isfinite().all()
    report = cache_of(model).report
    assert (report.steps, report.evaluations) == (len(RESTART) - 1, len(RESTART) - 1)
    assert report.calls == sum(host.rows)
    assert report.skipped > 0
    if name == "easycache":
        above = [e for e in report.events if e.position.step == 6]
        assert {e.reason for e in above} == {"before window"}


def test_a_change_of_shape_in_a_run_forgets_and_goes_on(host: Any) -> None:
    """The built-in reset sets a rate of 0, by which every later step is skipped."""

    def sample_halves(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            if i == 5:
                x = x[..., ::2, ::2].contiguous()
            denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    sampler = host.own_sampler(sample_halves)
    plain = host.model()
    model = patched(plain, chosen("easycache", "threshold=0.4,start=0,end=1"))
    x = run(host, model, sampler)
    assert decisions(model)[5:7] == "CC"
    full = run(host, plain, sampler)
    assert x.shape == full.shape == (1, 4, 4, 4)
    assert x.isfinite().all()


def test_the_samplers_own_x_is_never_written_to(host: Any) -> None:
    """fp32 flow models: the built-in node adds its cache to the sampler's own latent."""

    def sample_watching(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            kept = x.clone()
            denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
            assert torch.equal(x, kept)
            assert denoised.data_ptr() != x.data_ptr()
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    model = patched(host.model("flow"), chosen("easycache", "threshold=2,start=0,end=1"))
    run(host, model, host.own_sampler(sample_watching), FLOW)
    assert decisions(model).count("S") > 2


def test_a_skipped_evaluation_of_every_kind_of_model_gives_denoised(host: Any) -> None:
    """What was taken apart into c_skip, c_out and c_in comes together again."""
    for kind in host.kinds:
        sampling = host.model(kind).get_model_object("model_sampling")
        x, sigma = noise(2), torch.tensor([0.6, 0.6])
        answer = [torch.randn_like(x), torch.randn_like(x)]
        asked: list[list] = []
        call = comfyui.BatchCall(
            lambda conds, *_: asked.append(conds) or answer,  # noqa: B023
            [[1], [2], None],
            sampling,
            {0: "cond", 1: "uncond"},
            x,
            sigma,
            1,
            (),
            False,
        )
        assert call.names == ("uncond", "cond")  # as ComfyUI batches them
        c_in = sampling.calculate_input(sigma, x)
        assert all(torch.allclose(given, c_in, atol=1e-6) for given in call.inputs())
        outs = call.outputs(answer)
        for name, out in zip(call.names, outs, strict=True):
            denoised = sampling.calculate_denoised(sigma, out, x)
            assert torch.allclose(denoised, answer[("cond", "uncond").index(name)], atol=1e-5)
        *restored, left_out = call.rebuild(outs)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(restored, answer, strict=True))
        assert not left_out.any()
        part = call.part("uncond")
        part.inputs()
        (out,) = part.outputs(part.run_model())
        assert torch.equal(out, outs[0])
        call.run_model()
        assert asked == [[None, [2], None], [[1], [2], None]]


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_models_of_other_kinds_are_cached(host: Any, kind: str) -> None:
    plain = host.model(kind)
    sigmas = FLOW if kind == "flow" else SIGMAS
    model = patched(plain, chosen("forecast"))
    full, cached = run(host, plain, sigmas=sigmas), run(host, model, sigmas=sigmas)
    assert cache_of(model).report.calls == sum(host.rows) < 2 * STEPS
    assert close(cached, full, 0.5)


@pytest.mark.parametrize("changed", ["input", "uncond", "unknown"])
def test_calls_of_other_guidance_pass_through_and_are_never_stored(host: Any, changed: str) -> None:
    """PAG asks for cond once more in the same evaluation, SAG for uncond at another x, others for prompts of theirs."""

    def post_cfg(args: dict[str, Any]) -> Tensor:
        conds = {"input": [args["cond"]], "uncond": [args["uncond"]]}.get(changed)
        if conds is None:
            conds = [[{**args["cond"][0], "uuid": object()}]]
        before = len(host.rows)
        (other,) = host.calc_cond_batch(
            args["model"], conds, args["input"] * 3 + 1, args["sigma"], args["model_options"]
        )
        extra.append(len(host.rows) - before)
        assert not torch.equal(other, args["denoised"])
        return args["denoised"]

    extra: list[int] = []
    plain = host.model()
    for name, options in (("forecast", ""), ("easycache", "threshold=0.4"), ("forecast", SKIP_UNCOND)):
        usual = patched(plain, chosen(name, options))
        alone = run(host, usual)
        guided = patched(with_option(plain, "sampler_post_cfg_function", [post_cfg]), chosen(name, options))
        assert torch.equal(run(host, guided), alone)
        assert decisions(guided) == decisions(usual)
        assert cache_of(guided).report.branches == cache_of(usual).report.branches
    assert extra == [1] * (3 * STEPS)


def test_scheduled_prompts_have_no_cache_of_each_other(host: Any) -> None:
    model = patched(host.model(), chosen("forecast", "interval=3"))
    positive = host.cond(1, start_percent=0.0, end_percent=0.5) + host.cond(3, start_percent=0.5, end_percent=1.0)
    switch = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    run(host, model, positive=positive)
    events = [e for e in cache_of(model).report.events if e.branch == "cond"]
    first = next(e for e in events if e.position.sigma < switch)
    assert first.position.step == 5
    assert (first.computed, first.reason) == (True, "no cache yet")
    assert decisions(model).count("S") >= 2
    assert cache_of(model).report.branches[::-1] == ["cond", "uncond"]


def test_a_control_net_is_not_asked_on_skipped_evaluations(host: Any) -> None:
    control = host.control()
    model = patched(host.model(), chosen("forecast"))
    positive, negative = host.controlled(control)
    run(host, model, positive=positive, negative=negative)
    report = cache_of(model).report
    assert control.asked == report.calls // 2 < STEPS


def test_cache_ends_where_a_control_net_ends(host: Any) -> None:
    control = host.control((0.0, 0.5))
    model = patched(host.model(), chosen("forecast", "interval=3"))
    positive, negative = host.controlled(control)
    end = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    run(host, model, positive=positive, negative=negative)
    first = next(e for e in cache_of(model).report.events if e.branch == "cond" and e.position.sigma < end)
    assert first.reason == "no cache yet"


def test_the_positive_prompt_decides(host: Any) -> None:
    """ComfyUI batches uncond first, and the built-in node decides on the first."""
    model = patched(host.model(), chosen("easycache", "threshold=0.4"))
    run(host, model)
    asked = [e for e in cache_of(model).report.events if e.estimate is not None]
    assert {e.branch for e in asked} == {"cond"}
    assert len(asked) > 3


def test_an_image_is_the_same_alone_and_in_a_batch(host: Any) -> None:
    for options in ("", "interval=3", SKIP_UNCOND):
        model = patched(host.model(), chosen("forecast", options))
        batch = run(host, model, x=noise(4))
        report = cache_of(model).report
        for k in range(4):
            assert close(batch[k : k + 1], run(host, model, x=noise(1, first=7 + k)), 1e-4)
            assert decisions(model) == report.decisions("cond")
            assert decisions(model, "uncond") == report.decisions("uncond")


def test_with_decide_each_no_image_is_skipped_against_its_own_rule(host: Any) -> None:
    model = patched(host.model(), chosen("easycache", "threshold=0.4,start=0,end=1"), decide="each")
    run(host, model, x=torch.cat([noise(1), noise(1, first=8) * 3]))
    report = cache_of(model).report
    assert len(report.branches) == 4
    skipped = [e for e in report.events if not e.computed]
    assert skipped
    assert all(e.estimate < e.threshold for e in skipped)
    assert report.calls == sum(host.rows)


def test_with_decide_sample_every_image_of_a_batch_is_the_one_alone(host: Any) -> None:
    """Two latents that decide otherwise: the network gets the rows of those alone that need it."""
    method = chosen("easycache", "threshold=0.6,start=0,end=1")
    both = torch.cat([noise(), 3 * noise(first=8)])
    model = patched(host.model(), method, decide="sample")
    images = run(host, model, x=both)
    rows = [*host.rows]
    alone = []
    for k in range(2):
        one = patched(host.model(), method)
        assert close(run(host, one, x=both[k : k + 1]), images[k : k + 1])
        alone.append(decisions(one))
    assert alone[0] != alone[1]
    assert [decisions(model, f"cond of sample {k}") for k in (1, 2)] == alone
    assert sum(rows) == 2 * sum(one.count("C") for one in alone)


def test_with_decide_sample_a_batch_with_a_control_net_decides_as_one(host: Any) -> None:
    positive, negative = host.controlled(host.control())
    model = patched(host.model(), chosen("easycache", "threshold=0.4,start=0,end=1"), decide="sample")
    run(host, model, x=torch.cat([noise(), 3 * noise(first=8)]), positive=positive, negative=negative)
    assert "S" in decisions(model)
    assert "cannot be taken apart into its samples" in " ".join(cache_of(model).report.notes)


class OwnPart:
    """A part of a prompt of somebody else's: what ComfyUI asks for, but no `cond`."""

    def process_cond(self, batch_size: int, **more: Any) -> OwnPart:
        return self

    def can_concat(self, other: OwnPart) -> bool:
        return True

    def concat(self, others: list[OwnPart]) -> float:
        return 1.0

    def size(self) -> list[int]:
        return [1]


@pytest.mark.parametrize("kind", ["a number for each image", "a list", "a class of its own"])
def test_with_decide_sample_a_part_of_a_prompt_of_an_unknown_kind_lets_the_batch_decide_as_one(
    host: Any, kind: str
) -> None:
    rows = torch.ones(2, 1)
    part = OwnPart() if kind == "a class of its own" else host.part([rows] if kind == "a list" else rows)
    positive, negative = (host.cond(seed, model_conds={"other": part}) for seed in (1, 2))
    method, x = chosen("easycache", "threshold=0.6,start=0,end=1"), torch.cat([noise(), 3 * noise(first=8)])
    model = patched(host.model(), method, decide="sample")
    images = run(host, model, x=x, positive=positive, negative=negative)
    report = cache_of(model).report
    if kind != "a number for each image":
        assert "S" in decisions(model)
        assert "cannot be taken apart into its samples" in " ".join(report.notes)
        together = patched(host.model(), method)
        assert torch.equal(images, run(host, together, x=x, positive=positive, negative=negative))
    else:
        assert "S" in decisions(model, "cond of sample 1")
        assert not any("cannot be taken apart" in note for note in report.notes)


def test_two_nodes_on_one_model_the_last_one_holds(host: Any) -> None:
    plain = host.model()
    both = patched(patched(plain, chosen("ucache")), chosen("forecast"))
    alone = patched(plain, chosen("forecast"))
    assert torch.equal(run(host, both), run(host, alone))
    assert cache_of(both).report.method == "forecast"
    assert len(both.get_wrappers("outer_sample", "stepcache")) == 1
    other = patched(alone, chosen("none"))
    assert torch.equal(run(host, other), run(host, plain))
    assert cache_of(alone).report.method == "forecast"


def test_dpm_adaptive_makes_the_calls_it_makes_without(host: Any) -> None:
    plain = host.model()
    bare, rows = run(host, plain, "dpm_adaptive"), list(host.rows)
    model = patched(plain, chosen("forecast"))
    assert torch.equal(run(host, model, "dpm_adaptive"), bare)
    assert host.rows == rows
    assert "comparing evaluations" in str(cache_of(model).report)


def test_the_models_options_can_be_copied_at_any_time(host: Any) -> None:
    def post_cfg(args: dict[str, Any]) -> Tensor:
        copies.append(copy.deepcopy(args["model_options"]))
        return args["denoised"]

    copies: list[Any] = []
    plain = with_option(host.model(), "sampler_post_cfg_function", [post_cfg])
    model = patched(plain, chosen("forecast")).clone().clone()
    run(host, model)
    assert len(copies) == STEPS
    kept = [one["transformer_options"]["wrappers"]["calc_cond_batch"]["stepcache"][0].__self__ for one in copies]
    assert all(one is kept[0] for one in kept)
    assert "S" in decisions(model)


def test_other_wrappers_see_every_evaluation(host: Any) -> None:
    def other(executor: Any, *args: Any) -> Any:
        seen.append(len(args[1]))
        return executor(*args)

    def outermost(executor: Any, *args: Any) -> Any:
        options = executor.class_obj.model_options
        result = executor(*args)
        assert executor.class_obj.model_options is options
        return result

    seen: list[int] = []
    plain = host.model()
    plain.add_wrapper_with_key("outer_sample", "other", outermost)
    model = patched(plain, chosen("forecast"))
    usual = run(host, model)
    model.add_wrapper_with_key("calc_cond_batch", "other", other)
    assert torch.equal(run(host, model), usual)
    assert seen == [2] * STEPS
    assert all("easycache" not in keys for keys in model.wrappers.values())


def test_windows_of_a_long_run_have_a_cache_each(host: Any) -> None:
    plain, halves = host.model(), (noise(1), noise(1, first=8))
    alone = torch.cat([run(host, patched(plain, chosen("forecast")), x=x) for x in halves], -1)
    model = patched(host.windows(plain, 8), chosen("forecast"))
    assert close(run(host, model, x=torch.cat(halves, -1)), alone, 1e-4)
    report = cache_of(model).report
    assert set(report.branches) == {"cond", "uncond", "cond 2", "uncond 2"}
    assert len({report.decisions(name) for name in report.branches}) == 1
    assert report.calls == sum(host.rows) < 4 * STEPS


def test_branches_asked_for_one_by_one(host: Any) -> None:
    """As a node does that leaves layers out of one of them."""

    def one_by_one(args: dict[str, Any]) -> list[Tensor]:
        rest = args["input"], args["sigma"], args["model_options"]
        cond, left_out = host.calc_cond_batch(args["model"], [args["conds"][0], None], *rest)
        _, uncond = host.calc_cond_batch(args["model"], [None, args["conds"][1]], *rest)
        assert not left_out.any()
        return [cond, uncond]

    plain = host.model()
    together = run(host, patched(plain, chosen("forecast")))
    model = patched(with_option(plain, "sampler_calc_cond_batch_function", one_by_one), chosen("forecast"))
    assert close(run(host, model), together, 1e-4)
    assert decisions(model) == decisions(model, "uncond")
    assert cache_of(model).report.calls == sum(host.rows)


def test_guidance_that_ends_in_the_run_leaves_cond_its_cache(host: Any) -> None:
    def ending(args: dict[str, Any]) -> list[Tensor]:
        late = args["sigma"][0] < 1
        conds = [args["conds"][0], None if late else args["conds"][1]]
        cond, uncond = host.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])
        return [cond, cond if late else uncond]

    model = patched(with_option(host.model(), "sampler_calc_cond_batch_function", ending), chosen("forecast"))
    run(host, model)
    assert decisions(model) == "CCSCSCSCSC"
    assert decisions(model, "uncond") == "CCSCSC"
    assert not cache_of(model).report.notes


def test_prompts_that_are_not_the_guiders_come_first_and_are_left_alone(host: Any) -> None:
    def before(args: dict[str, Any]) -> list[Tensor]:
        rest = args["input"], args["sigma"], args["model_options"]
        host.calc_cond_batch(args["model"], [[{**args["conds"][0][0], "uuid": object()}]], *rest)
        return host.calc_cond_batch(args["model"], args["conds"], *rest)

    plain = host.model()
    usual = run(host, patched(plain, chosen("forecast")))
    model = patched(with_option(plain, "sampler_calc_cond_batch_function", before), chosen("forecast"))
    assert torch.equal(run(host, model), usual)
    assert sum(host.rows) == cache_of(model).report.calls + STEPS


def test_without_guidance_there_is_one_branch(host: Any) -> None:
    model = patched(host.model(), chosen("forecast"))
    run(host, model, cfg=1.0)
    assert cache_of(model).report.branches == ["cond"]
    assert cache_of(model).report.calls == sum(host.rows) < STEPS


def test_a_mask_of_another_length_is_refused_with_both_lengths(host: Any) -> None:
    model = patched(host.model(), chosen("static", "mask=1010"))
    with pytest.raises(OptionError, match=r"^in the node StepCache: the mask has 4 entries, the run has 10 steps"):
        run(host, model)
    assert torch.isfinite(run(host, model, sigmas=torch.tensor([14.0, 5.0, 2.0, 1.0, 0.0]))).all()
    assert decisions(model) == "CSCS"


def test_first_block_cache_leaves_the_network_at_its_first_block(host: Any) -> None:
    plain = host.model()
    model = patched(plain, chosen("fbcache", number=0.4))
    result = run(host, model, sigmas=SIGMAS)
    report = cache_of(model).report
    assert len(host.rows) == STEPS
    assert 0 < report.skipped < 2 * STEPS
    assert result.isfinite().all()
    hooks = [m for m in plain.model.modules() if m._forward_hooks]
    assert not hooks


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_with_skip_uncond_the_positive_prompt_is_computed_alone(host: Any, sampler: str) -> None:
    """If both prompts are the same, their difference is 0, so that the prediction is exact whatever the noise."""
    plain, model = host.model(), patched(host.model(), chosen("forecast", SKIP_UNCOND))
    bare = run(host, plain, sampler, negative=host.cond(1))
    off = (run(host, patched(plain, chosen("forecast")), sampler, negative=host.cond(1)) - bare).norm()
    same = run(host, model, sampler, negative=host.cond(1))
    assert (same - bare).norm() < 1e-3 * off
    result = run(host, model, sampler)
    report = cache_of(model).report
    assert host.rows == [2, 1] * 4 + [2, 2]
    assert report.calls == sum(host.rows)
    assert (decisions(model), decisions(model, "uncond")) == ("CCCCCCCCCC", "CSCSCSCSCC")
    assert result.isfinite().all()
    assert not torch.equal(result, run(host, plain, sampler))
    assert not report.notes


def test_skip_uncond_if_the_prompts_are_asked_for_one_by_one(host: Any) -> None:
    def one_by_one(args: dict[str, Any]) -> list[Tensor]:
        rest = args["input"], args["sigma"], args["model_options"]
        cond, _ = host.calc_cond_batch(args["model"], [args["conds"][0], None], *rest)
        _, uncond = host.calc_cond_batch(args["model"], [None, args["conds"][1]], *rest)
        return [cond, uncond]

    plain, method = host.model(), chosen("forecast", SKIP_UNCOND)
    together = run(host, patched(plain, method), "euler_ancestral")
    model = patched(with_option(plain, "sampler_calc_cond_batch_function", one_by_one), method)
    assert close(run(host, model, "euler_ancestral"), together, 1e-4)
    assert (decisions(model), decisions(model, "uncond")) == ("CCCCCCCCCC", "CSCSCSCSCC")
    assert cache_of(model).report.calls == sum(host.rows)


def test_a_control_net_of_a_predicted_prompt_is_not_asked(host: Any) -> None:
    control = host.control()
    model = patched(host.model(), chosen("forecast", SKIP_UNCOND))
    run(host, model, "euler_ancestral", negative=host.cond(2, control=control))
    assert (decisions(model), decisions(model, "uncond")) == ("CCCCCCCCCC", "CSCSCSCSCC")
    assert control.asked == 6
    assert cache_of(model).report.calls == sum(host.rows) == 16


def test_a_prompt_is_predicted_from_one_with_a_control_net(host: Any) -> None:
    """Asked whenever cond is run. uncond is computed anew after its own ControlNet, of half the run, has ended."""
    control, half = host.control(), host.control((0.0, 0.5))
    model = patched(host.model(), chosen("forecast", SKIP_UNCOND))
    end = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    positive, negative = host.cond(1, control=control), host.cond(2, control=half)
    run(host, model, "euler_ancestral", positive=positive, negative=negative)
    first = next(e for e in cache_of(model).report.events if e.branch == "uncond" and e.position.sigma < end)
    assert (first.computed, first.reason) == (True, "no cache yet")
    assert control.asked == STEPS
    assert half.asked == decisions(model, "uncond").count("C") < STEPS


def test_a_predicted_prompt_is_computed_when_it_changes(host: Any) -> None:
    model = patched(host.model(), chosen("forecast", SKIP_UNCOND))
    negative = host.cond(2, start_percent=0.0, end_percent=0.5) + host.cond(3, start_percent=0.5, end_percent=1.0)
    switch = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    run(host, model, "euler_ancestral", negative=negative)
    events = [e for e in cache_of(model).report.events if e.branch == "uncond"]
    first = next(e for e in events if e.position.sigma < switch)
    assert (first.position.step, first.computed, first.reason) == (5, True, "no cache yet")
    assert decisions(model, "uncond").count("S") >= 3
    assert cache_of(model).report.calls == sum(host.rows)


def test_windows_with_skip_uncond_are_computed(host: Any) -> None:
    """cond on one window's frames predicts nothing of uncond on another's."""
    plain, x = host.windows(host.model(), 8), torch.cat([noise(1), noise(1, first=8)], -1)
    bare, rows = run(host, plain, x=x), list(host.rows)
    model = patched(plain, chosen("forecast", SKIP_UNCOND))
    assert torch.equal(run(host, model, x=x), bare)
    assert host.rows == rows
    assert "each context window would need a reference of its own" in str(cache_of(model).report.notes)


def test_skip_uncond_without_guidance_skips_nothing(host: Any) -> None:
    plain, model = host.model(), patched(host.model(), chosen("forecast", SKIP_UNCOND))
    assert torch.equal(run(host, model, cfg=1.0), run(host, plain, cfg=1.0))
    assert "if cond is the only branch, nothing is skipped" in str(cache_of(model).report.notes)


def test_what_is_written_for_both_prompts_in_one_batch_gets_them(host: Any) -> None:
    """A patch of another hand on the network, which takes every batch apart into cond and uncond."""

    def both(module: Any, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) < 2:
            raise RuntimeError("not enough values to unpack")

    plain = host.model()
    bare = run(host, plain)
    model = patched(plain, chosen("forecast", SKIP_UNCOND))
    plain.model.diffusion_model.register_forward_pre_hook(both)
    assert torch.equal(run(host, model), bare)
    assert decisions(model, "uncond") == "C" * STEPS
    assert "the call for cond alone fails: not enough values to unpack" in str(cache_of(model).report.notes)


def test_skipping_uncond_needs_a_deciding_reference(host: Any) -> None:
    with pytest.raises(OptionError, match="skip='uncond' with decide='each'"):
        patched(host.model(), chosen("forecast", SKIP_UNCOND), decide="each")


@pytest.mark.parametrize("options", ["", SKIP_UNCOND])
def test_a_compiled_network_is_compiled_as_often_as_without_a_cache(host: Any, options: str) -> None:
    """ComfyUI's EasyCache is inside of what is compiled: 20 graphs and more than 8 recompilations.

    With skip="uncond" a single prompt is run, too: for one row torch compiles some of it once more.
    """
    model, graphs = host.model(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    network = model.model.diffusion_model
    network.forward = torch.compile(network.forward, backend=backend, dynamic=True)
    try:
        torch._dynamo.reset()
        bare, once = run(host, model), len(graphs)
        cached = patched(model, chosen("forecast", options))
        run(host, cached)
        assert once > 0
        assert once + bool(options) <= len(graphs) <= once * (1 + bool(options))
        assert sum(host.rows) == cache_of(cached).report.calls < 2 * STEPS
        torch._dynamo.reset()
        graphs.clear()
        run(host, cached)
        assert once + bool(options) <= len(graphs) <= once * (1 + bool(options))
        assert close(run(host, patched(model, chosen("none"))), bare)
    finally:
        del network.forward
        torch._dynamo.reset()
