"""The web UI extension on doubles of its hosts; `tests/hosts/test_webui.py` runs it on the real ones."""

from __future__ import annotations

import configparser
import inspect
import itertools
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hosts_webui import (
    SAMPLERS,
    STEPS,
    Denoiser,
    Host,
    Network,
    Tiles,
    controlnet,
    multidiffusion,
    occupied,
    pag,
    patched,
    sag,
)
from k_diffusion import sampling
from k_diffusion.external import CompVisDenoiser

from stepcache import METHODS, OptionError, StepMask
from stepcache.cli import main
from stepcache.extend import Engine, Prediction, Profile, main_number
from stepcache.samplers import webui
from stepcache.samplers.install import MARK
from stepcache.samplers.k_diffusion import CachedDenoiser, sample
from stepcache.samplers.webui import Options, infotext
from stepcache.samplers.webui import run as run_module
from stepcache.samplers.webui.a1111 import A1111Patch
from stepcache.samplers.webui.axes import add_axes
from stepcache.samplers.webui.call import WebuiCall
from stepcache.samplers.webui.components import INFO, NUMBER_INFO, SPEED_CHOICES
from stepcache.samplers.webui.forge import ForgePatch
from stepcache.samplers.webui.run import Run, on_cfg_denoiser
from stepcache.samplers.webui.schedule import unipc_times

pytestmark = pytest.mark.filterwarnings("ignore:the last step cannot be protected")  # DPM fast

NAMES = ("a1111-1.10", "a1111-1.7", "a1111-1.6", "forge")
ON = [True, "2x"]


def settings(method="forecast", number="", **more):
    """Arguments as the API passes them, of a custom speed."""
    options = Options(enabled=True, speed="custom", method=method, number=number, **more)
    return list(vars(options).values())


def negative_only(method="forecast", number="", **more):
    """The same, with the negative prompt alone skipped."""
    return settings(method, number, skip="negative prompt only", **more)


SIX_OF_TEN = "6 of 10 steps computed (1.7x fewer network calls)"
NEVER = settings("forecast", 1)
MASKED = settings("static", mask="1001010011")
"""Five of ten steps are computed."""
NEGATIVE_MASKED = negative_only("static", mask="1001010011")


HORSE = [(1.0, ((STEPS * 4, 0.3),))]
TWO = [(1.0, ((STEPS * 4, 0.3),)), (0.6, ((STEPS * 4, -0.5),))]
EDITED = [(1.0, ((4, 0.3), (STEPS * 4, 0.9)))]
SITUATIONS = {
    **{name: {"sampler_name": name} for name in SAMPLERS if name != "DPM adaptive"},
    "hires": {"hr": 9},
    "img2img": {"img2img": True},
    "img2img, DDIM, twice": {"img2img": True, "sampler_name": "DDIM", "n_iter": 2},
    "batch of 2, twice": {"prompt": [HORSE, EDITED], "n_iter": 2},
    "AND": {"prompt": [TWO]},
    "AND, batch of 2": {"prompt": [TWO, TWO]},
    "AND, unequal": {"prompt": [TWO, HORSE]},
    "prompt editing": {"prompt": [EDITED]},
    "NGMS": {"s_min_uncond": 3.0},
    "CFG 1": {"cfg_scale": 1.0},
    "refiner": {"refiner_at": 5},
}


@pytest.fixture(autouse=True)
def host_modules(monkeypatch):
    """What the extension imports of a host, at the moment it needs it."""
    shared = types.ModuleType("modules.shared")
    shared.opts = types.SimpleNamespace(uni_pc_skip_type="time_uniform")
    scripts = types.ModuleType("modules.scripts")
    scripts.AlwaysVisible = object()
    package = types.ModuleType("modules")
    package.shared, package.scripts = shared, scripts
    for name, module in (("modules", package), ("modules.shared", shared), ("modules.scripts", scripts)):
        monkeypatch.setitem(sys.modules, name, module)
    return package


@pytest.fixture
def runs(monkeypatch):
    """The runs that are begun."""
    begun = []
    begin = Run.__init__

    def noted(self, *arguments, **keywords):
        begin(self, *arguments, **keywords)
        begun.append(self)

    monkeypatch.setattr(Run, "__init__", noted)
    return begun


def same(p, q):
    return len(p.latents) == len(q.latents) and all(map(torch.equal, p.latents, q.latents))


def left(host, runs):
    """What is still patched in the host."""
    found = list(run_module._running)
    for run in runs:
        found += [run for inner in [run.denoiser.inner_model] if "forward" in vars(inner)]
        found += [run for func in [run.denoiser.sampler.func] if hasattr(func, "stepcache_wrapper")]
        found += [run for state in [run.engine.runs.current] if state is not None]
    for model in (host.first, host.refiner) if host.forge else ():
        found += [one for one in model.forge_objects.unet.model_options.values() if hasattr(one, "stepcache_patch")]
    found += list(host.original.model_options) if host.forge else []
    return found


def decisions(run, branch="cond"):
    return run.engine.report.decisions(branch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_disabled_or_never_skipping_is_bit_identical_and_nothing_is_left(name, situation, runs):
    host, fields = Host(name), SITUATIONS[situation]
    bare = host.job(None, **fields)
    calls = list(host.network.calls)
    never = host.job(NEVER, **fields)
    assert host.network.calls == calls
    assert same(never, bare)
    cached = host.job(ON, **fields)
    if situation != "AND, unequal" or host.forge:
        assert sum(host.network.calls) < sum(calls)
        assert not same(cached, bare)
    assert left(host, runs) == []
    for _ in range(2):
        disabled = host.job([False], **fields)
        assert host.network.calls == calls
        assert same(disabled, bare)
        assert disabled.extra_generation_params == {}
    assert len(runs) == 2 * (bare.n_iter + (bare.hr is not None))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "UniPC"])
def test_a_static_mask_skips_exactly_its_steps(name, sampler, runs):
    host = Host(name)
    host.job(MASKED, sampler_name=sampler)
    assert decisions(runs[0]) == "CSSCSCSSCC"
    assert decisions(runs[0], "uncond") == "CSSCSCSSCC"
    assert host.network.calls == [2] * 5
    assert [event.position.step for event in runs[0].engine.report.events if event.branch == "cond"] == [*range(10)]


@pytest.mark.parametrize("name", ["a1111-1.10", "forge"])
def test_steps_are_not_evaluations(name, runs):
    """DDIM runs one step fewer than asked for, as in its hosts; PLMS evaluates the first of them twice."""
    host, nine = Host(name), settings("static", mask="100101001")
    host.job(nine, sampler_name="DDIM")
    host.job(nine, sampler_name="PLMS")
    host.job(MASKED, sampler_name="Heun")
    assert [decisions(run) for run in runs] == ["CSSCSCSSC", "CCSSCSCSSC", "CCSSSSCCSSCCSSSSCCC"]
    assert [run.engine.report.steps for run in runs] == [9, 9, 10]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "Heun", "DPM2", "DPM++ SDE"])
@pytest.mark.parametrize(
    "method",
    [
        settings("forecast"),
        settings("ucache", 0.3),
        settings("easycache", 0.8),
        settings("static", mask="fast"),
        negative_only(),
    ],
)
def test_the_same_decisions_as_the_k_diffusion_adapter(name, sampler, method, runs):
    host = Host(name)
    caught = {}
    func = SAMPLERS[sampler]

    def spy(model, x, *, extra_args=None, callback=None, **keywords):
        caught.update(keywords, x=x)
        return func(model, x, extra_args=extra_args, callback=callback, **keywords)

    spy.__signature__, spy.__name__ = inspect.signature(func), func.__name__
    SAMPLERS["spied"] = spy
    try:
        p = host.job(method, sampler_name="spied")
    finally:
        del SAMPLERS["spied"]
    network = Network()
    inner = CompVisDenoiser(types.SimpleNamespace(apply_model=network, alphas_cumprod=products_of(host)))
    names, texts = (("uncond", "cond"), (-0.2, 0.3)) if host.forge else (("cond", "uncond"), (0.3, -0.2))
    cached = CachedDenoiser(inner, Options.of(method).as_method(func.__name__), branches=names)

    def guided(x, sigma):
        answers = cached(torch.cat([x, x]), torch.cat([sigma, sigma]), text=torch.tensor(texts)).chunk(2)
        parts = dict(zip(names, answers, strict=True))
        return parts["uncond"] + (parts["cond"] - parts["uncond"]) * 4.0

    x = caught.pop("x")
    if "noise_sampler" in caught:
        noise = torch.Generator().manual_seed(3)
        caught["noise_sampler"] = lambda *sigmas: torch.randn(x.shape, generator=noise)
    latents = sample(func, guided, x, cache=cached, **caught)
    for branch in names:
        assert decisions(runs[0], branch) == cached.report.decisions(branch)
    assert "S" in decisions(runs[0], "uncond")
    # The order is chosen from errors near rounding here, so the two may differ by a share of it.
    assert torch.allclose(latents, p.latents[0], rtol=1e-3, atol=5e-4 * float(latents.abs().max()))


def products_of(host):
    return host.first.alphas_cumprod if not host.forge else 1 / (host.original.model.predictor.sigmas**2 + 1)


def close(p, q):
    """The double's uncond is cond and a constant, which every predictor continues exactly; cond itself is not."""
    scale = max(float(one.abs().max()) for one in q.latents)
    return all(torch.allclose(a, b, rtol=0, atol=1e-5 * scale) for a, b in zip(p.latents, q.latents, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M SDE", "DDIM"])
def test_with_the_negative_prompt_only_the_prompt_alone_is_what_the_network_sees(name, sampler, runs):
    host, mask = Host(name), "1001010011"
    if sampler == "DDIM":
        mask = mask[:9]  # see test_steps_are_not_evaluations
    bare = host.job(None, sampler_name=sampler)
    p = host.job(negative_only("static", mask=mask), sampler_name=sampler)
    both = [-0.2, 0.3] if host.forge else [0.3, -0.2]
    assert host.network.texts == [both if one == "1" else [0.3] for one in mask]
    assert decisions(runs[0]) == "C" * len(mask)
    assert decisions(runs[0], "uncond") == mask.replace("1", "C").replace("0", "S")
    assert close(p, bare)
    assert not close(host.job(settings("static", mask=mask), sampler_name=sampler), bare)
    assert left(host, runs) == []
    assert same(host.job([False], sampler_name=sampler), bare)


@pytest.mark.parametrize("name", ["a1111-1.10", "forge"])
@pytest.mark.parametrize(
    ("situation", "low"),
    [
        *itertools.product(SITUATIONS, [False]),
        *itertools.product(["DPM++ 2M SDE", "Heun", "AND", "AND, batch of 2", "prompt editing", "NGMS"], [True]),
    ],
)
def test_the_negative_prompt_is_predicted_from_the_prompt_whatever_the_situation(name, situation, low, runs):
    host, fields = Host(name), SITUATIONS[situation]
    host.low_memory = lambda: low
    bare = host.job(None, **fields)
    calls = sum(host.network.calls)
    p = host.job(negative_only(), **fields)
    assert close(p, bare)
    if (situation, host.forge) in (("CFG 1", True), ("AND, unequal", False), ("AND, batch of 2", False)):
        assert sum(host.network.calls) == calls
        assert p.comments
    elif situation != "NGMS":  # there uncond is only asked for where it is computed anyhow
        assert sum(host.network.calls) < calls
    assert left(host, runs) == []


@pytest.mark.parametrize("prompt", [[HORSE], [TWO], [TWO, TWO]])
@pytest.mark.parametrize(
    "extensions",
    [
        [controlnet],
        [controlnet, patched],
        [lambda host: patched(host, sampling_sigmas=torch.ones(2))],  # Forge Neo's schedule
        [multidiffusion],
        [occupied],
    ],
)
def test_what_forge_hands_to_the_slot_is_cut_by_chunks(prompt, extensions, runs):
    """ControlNet's lists, patches that look at the labels, another wrapper behind ours."""
    host = Host("forge")
    host.extensions = [one(host, until=99) if one is controlnet else one(host) for one in extensions]
    bare = host.job(None, prompt=prompt)
    each = len(host.network.calls) // 10
    p = host.job(NEGATIVE_MASKED, prompt=prompt)
    images, branches = len(prompt), len(prompt[0]) + 1
    rows = [images * (branches if one == "1" else 1) for one in "1001010011" for _ in range(each)]
    assert host.network.calls == rows
    reference = prompt[0][-1][1][0][1]  # the last of several comes first
    assert host.network.texts[each] == [reference] * images
    assert close(p, bare)
    assert p.comments == []


@pytest.mark.parametrize("extension", [pag, sag])
def test_pag_and_sag_still_pass_through_beside_the_negative_prompt_only(extension, runs):
    host = Host("forge")
    host.extensions = [extension(host)]
    bare = host.job(None)
    assert close(host.job(NEGATIVE_MASKED), bare)
    assert host.network.calls == [n for one in "1001010011" for n in (2 if one == "1" else 1, 1)]
    assert (runs[0].patch.auxiliary, decisions(runs[0], "uncond")) == (10, "CSSCSCSSCC")


@pytest.mark.parametrize(
    ("extensions", "why"),
    [
        (
            [lambda host: patched(host, weights=torch.ones(2))],
            "the transformer option 'weights' may be ordered by rows",
        ),
        ([lambda host: patched(host, words=["a", "b"])], "the transformer option 'words' may be ordered by rows"),
        ([lambda host: controlnet(host, 99), occupied], "another extension wraps the model"),
    ],
)
def test_what_forge_may_order_by_rows_unknown_to_us_is_computed_whole_and_said(extensions, why, runs):
    host = Host("forge")
    host.extensions = [extension(host) for extension in extensions]
    bare = host.job(None)
    p = host.job(NEGATIVE_MASKED)
    assert same(p, bare)
    assert decisions(runs[0], "uncond") == "C" * 10
    assert p.comments[0].startswith(f"StepCache: negative prompt only: {why}")
    assert any("it cannot be taken apart" in comment for comment in p.comments)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"vector": torch.ones(1, 3)}, "a tensor of length 1 in a call of 2 rows"),
        ({"sizes": [512, 768]}, "a list of 2 in a call of 2 rows"),
    ],
)
def test_conditioning_that_is_not_ordered_by_rows_on_a1111_is_computed_whole_and_said(more, why, runs, monkeypatch):
    usual = Denoiser.dictionary
    monkeypatch.setattr(Denoiser, "dictionary", lambda self, texts: {**usual(self, texts), **more})
    host = Host("a1111-1.10")
    bare = host.job(None)
    p = host.job(NEGATIVE_MASKED)
    assert same(p, bare)
    assert p.comments[0] == f"StepCache: negative prompt only: {why}"


def test_without_a_negative_prompt_it_says_so():
    p = Host("forge").job(negative_only(), cfg_scale=1.0)
    assert "if cond is the only branch, nothing is skipped" in p.comments[0]
    result = "negative prompt computed in 10 of 10 steps (nothing saved)"
    assert p.extra_generation_params["StepCache result"] == result


@pytest.mark.parametrize("name", ["a1111-1.10", "forge"])
def test_out_of_memory_in_a_call_for_the_prompt_alone(name, runs):
    """Once, it is computed whole from there on; for good, the host gets the error, and the next job is untouched."""
    host = Host(name)
    bare = host.job(None)
    host.network.fails_at = lambda call: call == 2
    p = host.job(NEGATIVE_MASKED)
    assert same(p, bare)
    assert "the call for cond alone fails: pretended" in p.comments[0]
    host.network.fails_at = lambda call: call > 1
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        host.job(NEGATIVE_MASKED)
    host.network.fails_at = None
    assert left(host, runs) == []
    assert close(host.job(NEGATIVE_MASKED), bare)
    assert same(host.job([False]), bare)


def test_the_negative_prompt_only_in_the_console_the_image_and_the_options(capsys):
    p = Host("a1111-1.10").job(negative_only(), hr=7)
    assert p.extra_generation_params["StepCache skips"] == "negative prompt only"
    both = "negative prompt computed in 6 of 10 steps + negative prompt computed in 4 of 7 steps"
    assert p.extra_generation_params["StepCache result"] == f"{both} (1.3x fewer network calls)"
    assert capsys.readouterr().out.splitlines() == [
        "StepCache: negative prompt computed in 6 of 10 steps (1.2x fewer network calls)",
        "StepCache, hires. fix: negative prompt computed in 4 of 7 steps (1.3x fewer network calls)",
    ]
    assert "StepCache skips" not in Host("forge").job(ON).extra_generation_params
    assert Options(text="skip=all", skip="negative prompt only").as_method().skip == "all"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_automatic_skips_the_negative_prompt_only_if_the_sampler_adds_noise_at_every_evaluation(name, sampler, runs):
    """The figures are in docs/webui.md. Only Forecast chooses, and only with guidance."""
    host = Host(name)
    for arguments, scale in ((ON, 4.0), (ON, 1.0), (settings("ucache"), 4.0), (settings(skip="whole steps"), 4.0)):
        host.job(arguments, sampler_name=sampler, cfg_scale=scale)
    noisy = sampler in ("Euler a", "DPM++ 2M SDE", "DPM++ 3M SDE")
    expected = ["uncond" if noisy else "all", "all", "all", "all"]
    assert [run.engine.method.skip for run in runs] == (expected if sampler != "DPM adaptive" else [])


def test_automatic_chooses_anew_for_the_second_pass(runs):
    """Each pass of hires. fix may have another sampler."""
    host = Host("forge")
    p = host.job(ON, sampler_name="DPM++ 2M SDE", hr=9, hr_sampler="Euler")
    assert [run.engine.method.skip for run in runs] == ["uncond", "all"]
    result = "negative prompt computed in 6 of 10 steps + 6 of 9 steps computed (1.4x fewer network calls)"
    assert p.extra_generation_params["StepCache result"] == result


@pytest.mark.parametrize("name", NAMES)
def test_hires_counts_both_passes_or_only_the_first(name, runs):
    host = Host(name)
    p = host.job(ON, hr=9)
    both = "6 of 10 steps computed + 6 of 9 steps computed (1.6x fewer network calls)"
    assert p.extra_generation_params["StepCache result"] == both
    assert [len(decisions(run)) for run in runs] == [10, 9]
    p = host.job(settings(hires=False), hr=9)
    assert p.extra_generation_params["StepCache result"] == SIX_OF_TEN
    assert len(runs) == 3


def test_the_callback_names_the_steps_of_a_sampler_nobody_knows(runs, monkeypatch):
    """Two evaluations a step at sigmas off the schedule, under a name that is in no table."""
    func = SAMPLERS["DPM2"]

    def sample_unheard_of(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return func(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    monkeypatch.setitem(SAMPLERS, "unheard of", sample_unheard_of)
    seen = []
    monkeypatch.setattr(Engine, "set_step", lambda self, step: seen.append(step))
    Host("forge").job(ON, sampler_name="unheard of")
    assert seen == [*range(10)]
    assert runs[0].schedule.stages is None


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_is_a_run_of_its_own(name, runs):
    p = Host(name).job(ON, n_iter=3)
    assert [decisions(run) for run in runs] == ["CCSCSCSCSC"] * 3
    assert p.extra_generation_params["StepCache result"] == SIX_OF_TEN
    assert same(p, Host(name).job(ON, n_iter=3))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_joined_by_and_have_a_cache_each(name, runs):
    host = Host(name)
    host.job(MASKED, prompt=[TWO])
    assert runs[0].engine.report.branches in (["cond", "cond 2", "uncond"], ["uncond", "cond", "cond 2"])
    assert host.network.calls == [3] * 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", [[HORSE], [TWO], [TWO, TWO]])
def test_calls_split_for_want_of_memory_answer_as_one_call_does(name, prompt, runs):
    whole = Host(name).job(MASKED, prompt=prompt)
    host = Host(name)
    host.low_memory = lambda: True
    split = host.job(MASKED, prompt=prompt)
    assert torch.allclose(whole.latents[0], split.latents[0], rtol=1e-4, atol=1e-4)
    assert host.network.calls == [len(prompt)] * (5 * (1 + len(prompt[0])))
    assert runs[1].patch.auxiliary == 0


@pytest.mark.filterwarnings("ignore:branch .* is evaluated before the reference")
@pytest.mark.parametrize("name", NAMES)
def test_calls_split_at_some_evaluations_only_keep_the_branches_apart(name, runs):
    host, turns = Host(name), itertools.cycle([False, True, True, False, True])
    host.low_memory = lambda: next(turns)
    host.job(MASKED)
    report = runs[0].engine.report
    assert sorted(report.branches) == ["cond", "uncond"]
    assert len(decisions(runs[0])) == len(decisions(runs[0], "uncond")) == 10
    assert decisions(runs[0]) == "CSSCSCSSCC"


@pytest.mark.filterwarnings("ignore:branch .* is evaluated before the reference")
@pytest.mark.parametrize("name", NAMES)
def test_heun_without_uncond_at_some_evaluations_keeps_two_of_one_sigma_apart(name, runs):
    """Split calls: cond alone at one evaluation, then uncond first at the next, at the same sigma."""
    host = Host(name)
    host.low_memory = lambda: True
    p = host.job(ON, sampler_name="Heun", s_min_uncond=20.0)
    assert len(p.saw) == 19
    assert any(a == b for a, b in itertools.pairwise(p.saw))
    assert runs[0].engine.report.evaluations == 19
    assert len(decisions(runs[0])) == 19
    uncond = [event.position.evaluation for event in runs[0].engine.report.events if event.branch == "uncond"]
    assert uncond == [*range(0, 19, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_an_edited_prompt_is_computed_when_it_changes(name, runs):
    host = Host(name)
    host.job(settings("static", mask="1000000001"), prompt=[EDITED])
    assert decisions(runs[0]) == "CSSSSCSSSC"
    assert any("prompt" in note for note in runs[0].engine.report.notes)


@pytest.mark.parametrize("name", NAMES)
def test_words_that_alternate_are_computed_at_every_change(name, runs):
    words = tuple((step, 0.3 if step % 2 else 0.8) for step in range(STEPS * 2))
    host = Host(name)
    p = host.job(settings("static", mask="1000000001"), prompt=[[(1.0, words)]])
    assert decisions(runs[0]) == "C" * 10
    assert p.comments[0].startswith("StepCache: no step of this run was skipped: ")
    assert p.comments[0].endswith("prompt or model changed within the run: the cache was dropped")


@pytest.mark.parametrize("name", NAMES)
def test_a_refiner_begins_with_a_computed_evaluation_and_is_cached_too(name, runs):
    host = Host(name)
    host.job(settings("static", mask="1000000001"), refiner_at=6)
    assert decisions(runs[0]) == "CSSSSSCSSC"
    assert left(host, runs) == []


@pytest.mark.parametrize("extension", [pag, sag])
@pytest.mark.parametrize("prompt", [[HORSE], [TWO]])
@pytest.mark.parametrize("low", [False, True])
def test_pag_and_sag_pass_through_and_are_never_stored(extension, prompt, low, runs):
    host = Host("forge")
    host.extensions, host.low_memory = [extension(host)], lambda: low
    bare = host.job(None, prompt=prompt)
    assert same(host.job(NEVER, prompt=prompt), bare)
    host.job(MASKED, prompt=prompt)
    again = (len(prompt[0]) if extension is pag else 1) * (low or extension is sag) or 1
    assert runs[-1].patch.auxiliary == 10 * (again if low else 1)
    assert decisions(runs[-1]) == "CSSCSCSSCC"
    branches = {"cond", "uncond"} | ({"cond 2"} if prompt == [TWO] else set())
    assert set(runs[-1].engine.report.branches) == branches


def test_further_calls_on_a1111_pass_through_and_are_never_stored(runs, monkeypatch):
    """An extension that asks the inner model once more, after the evaluation's own rows."""
    once = Denoiser.a1111

    def again(self, x, sigma, text, *arguments):
        answer = once(self, x, sigma, text, *arguments)
        return answer + 0.1 * self.inner_model(x, sigma, cond=self.dictionary(text * 0.5))

    monkeypatch.setattr(Denoiser, "a1111", again)
    host = Host("a1111-1.10")
    host.job(MASKED)
    assert (runs[0].patch.auxiliary, decisions(runs[0])) == (10, "CSSCSCSSCC")
    assert host.network.calls == [2, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 2, 1, 2, 1]
    assert same(host.job(NEVER), host.job(None))


@pytest.mark.parametrize("late", [False, True])
def test_multidiffusion_is_kept_called_and_skipped_whole(late, runs):
    host = Host("forge")
    host.extensions = [multidiffusion(host)]
    if late:
        host.extensions.insert(0, pag(host))
    bare = host.job(None)
    tiled = list(host.network.calls)
    assert same(host.job(NEVER), bare)
    host.job(MASKED)
    assert len(host.network.calls) == len(tiled) / 2 + (10 if late else 0)
    assert isinstance(host.first.forge_objects.unet.model_options["model_function_wrapper"], Tiles)


def test_a_controlnet_that_ends_in_the_run_is_computed_when_it_does(runs):
    host = Host("forge")
    host.extensions = [controlnet(host, until=4)]
    host.job(settings("static", mask="1000000001"))
    assert decisions(runs[0]) == "CSSSCSSSSC"


def test_inpainting_noise_at_every_evaluation_does_not_disturb():
    host = Host("forge")
    host.inpainting = True
    bare = host.job(None)
    assert same(host.job(NEVER), bare)
    cached = host.job(ON)
    assert cached.extra_generation_params["StepCache result"] == SIX_OF_TEN
    assert cached.latents[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_interrupt_leaves_nothing_and_the_next_job_is_untouched(name, runs):
    host = Host(name)
    bare = host.job(None)
    host.stop_at = 5
    stopped = host.job(ON)
    assert stopped.extra_generation_params["StepCache result"].startswith("3 of 5 steps computed")
    assert left(host, runs) == []
    host.stop_at = None
    assert same(host.job([False]), bare)
    assert same(host.job(ON), Host(name).job(ON))


@pytest.mark.parametrize("name", NAMES)
def test_out_of_memory_is_raised_leaves_nothing_and_the_next_job_is_untouched(name, runs):
    host = Host(name)
    bare = host.job(None)
    host.network.fails_at = lambda call: call == 3
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        host.job(ON)
    assert len(host.network.calls) == 3, "the failed call was not made again"
    host.network.fails_at = None
    assert left(host, runs) == []
    assert same(host.job([False]), bare)
    assert same(host.job(ON), Host(name).job(ON))


@pytest.mark.parametrize("name", NAMES)
def test_an_error_of_our_own_costs_the_speed_and_not_the_image(name, runs, monkeypatch, capsys):
    bare = Host(name).job(None)

    def broken(*arguments):
        raise RuntimeError("a bug")

    for patch in (ForgePatch, A1111Patch):
        monkeypatch.setattr(patch, "scalings", broken)
        monkeypatch.setattr(patch, "coordinate", lambda self: None)
    host = Host(name)
    p = host.job(ON)
    assert same(p, bare)
    assert p.comments == ["StepCache: the rest of this run was computed: RuntimeError: a bug"]
    assert p.comments[0] in capsys.readouterr().out
    assert left(host, runs) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (settings("forcast"), "Did you mean 'forecast'?"),
        ([True, "5x"], "unknown speed '5x'"),
        ([True, "forecast"], "unknown speed 'forecast'"),
        (settings("ucache", -1), "threshold=-1.0: accepted is a number of at least 0"),
        (settings("ucache", "much"), "threshold='much': accepted is a number"),
        (settings("forecast", 2.5), "interval='2.5': accepted is a whole number"),
        (settings("static"), "static needs a mask"),
        (settings("static", 3, mask="fast"), "static takes no number; leave it empty"),
        (settings("profile"), "path='': accepted is the path of a file that stepcache tune wrote"),
        (settings("profile", text="path=no/such.json"), "path='no/such.json' cannot be read"),
        (settings("profile", 3, text="path=no/such.json"), "profile takes no number; leave it empty"),
        (settings(window="half"), "window='half': accepted are two numbers in per cent of the run"),
        (settings(window="90-10"), "window='90-10': accepted is a start before the end"),
        (settings(window="50-150"), "window='50-150': accepted is a start before the end, from 0 to 100"),
        (settings(window="0.15-0.95"), "it is in per cent; did you mean 15-95?"),
        (settings(warmup="some"), "warmup='some': accepted is a whole number of at least 0"),
        (settings(max_consecutive=-1), "max_consecutive='-1': accepted is a whole number of at least 0"),
        (settings(mask="110"), "the mask has 3 entries, the run has 10 steps"),
        (settings(mask="fast", policy="stern"), "unknown policy 'stern'"),
        (settings("ucache", text="decays=1"), "Did you mean 'decay'?"),
        ([*settings(), 1], "14 arguments: accepted are 13"),
        (settings(skip="negative"), "unknown skip 'negative'"),
        (settings(hires="no"), "hires='no': accepted is 0 or 1"),
    ],
)
def test_wrong_options_are_said_and_the_job_runs_without_the_cache(name, arguments, said, capsys):
    host = Host(name)
    bare, p = host.job(None), host.job(arguments)
    assert same(p, bare)
    assert said in p.comments[0]
    assert said in capsys.readouterr().out
    assert p.extra_generation_params == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_is_replayed_by_option_text(name, runs, tmp_path):
    skipped = {n: Prediction(1, 0.25) for n in (2, 4, 6, 7, 8)}
    path = tmp_path / "five of ten.json"
    Profile((1, 1, 0, 1, 0, 1, 0, 0, 0, 1), skipped).save(path)
    p = Host(name).job(settings("profile", text=f"path={path}"))
    assert decisions(runs[0], "cond") == "CCSCSCSSSC"
    assert p.extra_generation_params["StepCache options"] == f"path={path}"


def test_an_error_while_the_options_are_read_costs_the_cache_and_not_the_image(monkeypatch):
    def broken(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Options, "as_method", broken)
    host = Host("forge")
    bare, p = host.job(None), host.job(ON)
    assert same(p, bare)
    assert p.comments == ["StepCache: RuntimeError: a bug; this job runs without the cache"]


@pytest.mark.parametrize("name", NAMES)
def test_dpm_adaptive_goes_without_the_cache_and_says_so(name):
    host = Host(name)
    p = host.job(ON, sampler_name="DPM adaptive")
    assert "DPM adaptive chooses its steps" in p.comments[0]


def test_a_run_in_which_no_call_is_seen_says_so():
    host = Host("forge")
    host.calculate = lambda unet, x, level, conds, uncond: ([x * 0.9 for _ in conds], x * 0.8)
    p = host.job(ON)
    assert p.comments == [
        "StepCache: nothing was cached: no call of the model was seen, another extension may have replaced it"
    ]


def test_a_batch_of_unequal_and_prompts_is_computed_on_a1111_and_says_so():
    p = Host("a1111-1.10").job(ON, prompt=[TWO, HORSE])
    assert "different numbers of prompts joined by AND" in p.comments[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_console_line_and_the_infotext_count_evaluations(name, capsys):
    given = {"window": "0-100", "mask": "fast", "policy": "static", "hires": False, "text": "decay=0.5"}
    p = Host(name).job(settings("ucache", 0.5, warmup=1, max_consecutive="3", **given))
    assert p.extra_generation_params == {
        "StepCache": "custom",
        "StepCache method": "ucache",
        "StepCache number": "0.5",
        "StepCache window": "0-100",
        "StepCache warm-up": "1",
        "StepCache max in a row": "3",
        "StepCache mask": "fast",
        "StepCache mask policy": "static",
        "StepCache hires": False,
        "StepCache options": "decay=0.5",
        "StepCache result": "4 of 10 steps computed (2.5x fewer network calls)",
    }
    assert capsys.readouterr().out == "StepCache: 4 of 10 steps computed (2.5x fewer network calls)\n"
    assert Host(name).job(ON).extra_generation_params == {"StepCache": "2x", "StepCache result": SIX_OF_TEN}


def test_a_sampler_with_two_evaluations_a_step_is_counted_in_evaluations():
    p = Host("forge").job(ON, sampler_name="Heun")
    assert p.extra_generation_params["StepCache result"] == "11 of 19 evaluations computed (1.7x fewer network calls)"


def test_a_run_too_short_and_one_in_which_nothing_was_skipped_are_said():
    p = Host("forge").job(ON, hr=5)
    assert p.comments == ["StepCache: every step was computed: a run of 5 is too short to predict steps in it"]
    sentence = "StepCache: no step of this run was skipped: these options leave none that may be"
    for arguments in (NEVER, settings("fbcache")):
        assert Host("forge").job(arguments).comments == [sentence]


def test_the_table_goes_to_the_console_when_asked_for(capsys):
    Host("forge").job(settings(table=True))
    assert len([line for line in capsys.readouterr().out.splitlines() if "interval of 2" in line]) >= 10


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_network_space_on_a1111s_timestep_samplers_is_that_of_sigma(prediction):
    """The raw output recovered from eps at a timestep is the network's own, whatever it predicts."""
    table = (1 - torch.linspace(0.0001, 0.02, 1000)).cumprod(0)
    x, v = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    a = table[300]
    given = v if prediction == "eps" else a.sqrt() * v + (1 - a).sqrt() * x
    inner = types.SimpleNamespace(inner_model=types.SimpleNamespace(alphas_cumprod=table))
    if prediction == "v":
        inner.predict_eps_from_z_and_v = None
    patch = A1111Patch(types.SimpleNamespace(inner_model=inner), None)
    sigma = patch.sigma_at(torch.tensor([300.0, 300.0]))
    assert torch.allclose(sigma, ((1 - a) / a).sqrt())
    call = WebuiCall(lambda: given, patch.scalings, ("cond",), x, sigma, None)
    assert torch.equal(call.inputs()[0], x)
    assert torch.allclose(call.outputs(given)[0], v, atol=1e-5)
    assert torch.allclose(call.rebuild(call.outputs(given)), given, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "flow"), [("eps", False), ("v", False), ("edm", False), ("flow", True)], ids=lambda value: str(value)
)
def test_forges_parametrisation_is_asked_for_whatever_it_is(kind, flow):
    """c_skip, c_out and c_in of eps, v, EDM's and flow models, from the host's own two functions."""
    root = lambda s: (s * s + 1).sqrt()  # noqa: E731
    skip = {"v": lambda s: 1 / (s * s + 1), "edm": lambda s: 1 / (s * s + 1)}.get(kind, torch.ones_like)
    out = {"v": lambda s: -s / root(s), "edm": lambda s: s / root(s)}.get(kind, lambda s: -s)
    spread = lambda s: s.view(-1, 1, 1, 1)  # noqa: E731
    sampled = types.SimpleNamespace(
        calculate_input=lambda s, x: x if flow else x / root(spread(s)),
        calculate_denoised=lambda s, o, x: skip(spread(s)) * x + out(spread(s)) * o,
        percent_to_sigma=lambda share: 1 - share,
    )
    unet = types.SimpleNamespace(model=types.SimpleNamespace(model_sampling=sampled))
    engine = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet))
    denoiser = types.SimpleNamespace(inner_model=types.SimpleNamespace(inner_model=engine))
    patch = ForgePatch(denoiser, None)
    sigma = torch.tensor([0.3, 0.7])
    c_skip, c_out, c_in = patch.scalings(sigma)
    assert torch.allclose(c_skip, skip(sigma))
    assert torch.allclose(c_out, out(sigma))
    assert torch.allclose(c_in, torch.ones(2) if flow else 1 / root(sigma))
    assert patch.coordinate() is (float if flow else None)
    assert patch.training_sigma()(0.25) == 0.75


def test_stable_diffusion_3_on_a1111_is_a_flow_model():
    inner = types.SimpleNamespace(sigma_to_t=None, sigma_max=torch.tensor(1.0), inner_model=None)
    patch = A1111Patch(types.SimpleNamespace(inner_model=inner), None)
    c_skip, c_out, c_in = patch.scalings(torch.tensor([0.4]))
    assert (c_skip, float(c_out), float(c_in)) == (None, pytest.approx(-0.4), 1.0)
    assert patch.coordinate() is float


@pytest.mark.parametrize(("spacing", "power"), [("time_uniform", 1), ("time_quadratic", 2), ("logSNR", None)])
def test_unipcs_own_times(spacing, power, host_modules):
    host_modules.shared.opts.uni_pc_skip_type = spacing
    times = unipc_times(False, torch.arange(0, 1000, 100))
    if power is None:
        assert times is None
        return
    assert len(times) == 11
    assert float(times[0]) == pytest.approx(999.0)
    assert float(times[-1]) == pytest.approx(0.0, abs=1e-2)
    roots = ((times / 1000) + 1 / 1000) ** (1 / power)
    assert torch.allclose(roots.diff(), roots.diff()[:1].expand(10), atol=1e-4)
    assert float(unipc_times(True, torch.arange(0, 500, 100))[0]) == pytest.approx(400)


def test_options_by_position_with_defaults_for_those_missing():
    assert Options.of([True, "3x"]) == Options(enabled=True, speed="3x")
    assert Options.of([True, None, "ucache"]) == Options(enabled=True, method="ucache")
    assert Options.of([]) == Options()
    given = {"window": "20-80", "mask": "fast", "policy": "static", "warmup": 3, "max_consecutive": "2"}
    method = Options.of(settings("ucache", "0.5", **given)).as_method()
    assert (method.criterion.threshold, method.start, method.end) == (0.5, 0.2, 0.8)
    assert (method.mask, method.warmup, method.max_consecutive) == (StepMask("fast", "static"), 3, 2)
    default = Options.of([True, "custom", "ucache"]).as_method()
    assert default == METHODS["ucache"]()
    assert (default.start, default.end) == (0.15, 0.95)


@pytest.mark.parametrize(("speed", "interval"), [("2x", 2), ("3x: every third step", 3), ("4X", 4)])
def test_a_speed_is_forecast_whatever_the_hidden_fields_hold(speed, interval):
    method = Options(speed=speed, method="ucache", number="0.5").as_method()
    assert method == METHODS["forecast"](interval)


@pytest.mark.parametrize(
    ("panel", "axes", "expected"),
    [
        (ON, {"speed": "4x"}, METHODS["forecast"](4)),
        (ON, {"number": 3}, METHODS["forecast"](3)),
        ([True, "2x", "ucache"], {"number": 3}, METHODS["forecast"](3)),
        (ON, {"method": "ucache"}, METHODS["ucache"]()),
        (settings("ucache", 0.5), {"method": "easycache"}, METHODS["easycache"]()),
        (settings("ucache", 0.5), {"method": "ucache"}, METHODS["ucache"](0.5)),
        (settings("ucache", 0.5), {"number": 0.7}, METHODS["ucache"](0.7)),
        (settings("ucache", 0.5), {"speed": "3x"}, METHODS["forecast"](3)),
    ],
)
def test_the_axes_of_the_plot_make_the_speed_custom_if_they_need_it(panel, axes, expected):
    assert Options.of(panel, **axes).as_method() == expected


def test_further_options_win_over_the_fields():
    method = Options(speed="custom", method="ucache", number=1, warmup=2, text="threshold=0.25,warmup=3").as_method()
    assert (method.criterion.threshold, method.warmup) == (0.25, 3)
    assert Options(text="interval=5").as_method() == METHODS["forecast"](5)
    with pytest.raises(OptionError, match="Did you mean 'warmup'"):
        Options(text="warm=3").as_method()


def test_every_method_has_a_place_in_the_panel():
    assert main_number("forecast") == ("interval", 2)
    assert main_number("ucache") == ("threshold", 1.0)
    assert main_number("spectrum") == ("window_size", 2)
    assert main_number("hicache") == ("interval", 4)
    assert main_number("magcache") == ("threshold", 0.06)
    assert main_number("static") is None
    for name in METHODS:
        if name not in ("none", "static", "magcache", "profile"):
            assert Options.of(settings(name, main_number(name)[1])).as_method() == METHODS[name]()
        if main := main_number(name):
            assert main[0] in NUMBER_INFO, name


COMPONENTS = {option: number for number, option in enumerate(vars(Options()))}


@pytest.fixture
def gradio(monkeypatch):
    """A double of gradio, whose components keep what they were made with. Returns the list of those made."""
    made = []
    page = types.SimpleNamespace(loaded=[])
    page.load = lambda function, **keywords: page.loaded.append(function)

    class Component:
        def __init__(self, *arguments, **keywords):
            self.keywords, self.kind = keywords, type(self).__name__
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def change(self, function, **keywords):
            self.function = function

    module = types.ModuleType("gradio")
    for kind in ("Accordion", "Row", "Checkbox", "Dropdown", "Textbox", "Radio"):
        setattr(module, kind, type(kind, (Component,), {}))
    module.update = dict
    module.context = types.ModuleType("gradio.context")
    module.context.Context = types.SimpleNamespace(root_block=page)
    monkeypatch.setitem(sys.modules, "gradio", module)
    monkeypatch.setitem(sys.modules, "gradio.context", module.context)
    return made


def test_the_panel_has_a_component_for_each_option_in_the_order_of_the_api(gradio):
    made = gradio
    script = webui.Extension()
    components = script.ui(is_img2img=True)
    assert [one.keywords["elem_id"].removeprefix("stepcache_img2img_") for one in components] == [*vars(Options())]
    assert all(one in made for one in components)
    assert [one for one, _ in script.infotext_fields] == components[:-1]
    panel = dict(zip(vars(Options()), components, strict=True))
    assert all(len(one.keywords["info"]) > 20 for one in components)
    assert {option for option in panel if option not in INFO} == {"method", "number"}
    assert not panel["hires"].keywords["visible"], "img2img has no hires. fix"
    _, second = [one for one in made if one.kind == "Accordion"]
    assert not second.keywords["open"]
    assert [one for one in components if made.index(one) < made.index(second)] == [panel["enabled"], panel["speed"]]


def test_method_and_number_are_shown_only_with_a_custom_speed(gradio):
    panel = dict(zip(vars(Options()), webui.Extension().ui(is_img2img=False), strict=True))
    assert panel["speed"].function is panel["method"].function
    hints = panel["speed"].function
    loaded = sys.modules["gradio.context"].Context.root_block.loaded
    assert loaded == [hints, panel["mask"].function], "a host may have saved other defaults"
    row, method, number, window, warmup = hints(SPEED_CHOICES["custom"], "ucache")
    assert row == {"visible": True}
    assert method["info"].startswith("ucache skips while")
    assert (number["placeholder"], window, warmup) == ("1", {"placeholder": "15-95"}, {"placeholder": "0"})
    assert hints(SPEED_CHOICES["custom"], "static")[2] == {"info": "static takes no number.", "placeholder": ""}
    row, _, _, window, warmup = hints(SPEED_CHOICES["3x"], "ucache")
    assert (row, window, warmup) == ({"visible": False}, {"placeholder": "0-100"}, {"placeholder": "2"})
    assert panel["mask"].function("fast") == {"visible": True}
    assert panel["mask"].function("none") == panel["mask"].function(None) == {"visible": False}


def test_the_infotext_is_pasted_back_into_every_component():
    given = settings("ucache", 0.5, skip="whole steps", window="10-90", warmup=2, max_consecutive=3, hires=False)
    given[8:10], given[11] = ["110", "static"], "decay=0.5"
    text = {key: str(value) for key, value in infotext.write(Options.of(given)).items()}
    fields = infotext.paste_fields(COMPONENTS, SPEED_CHOICES)
    read = [value(text) for _, value in fields]
    custom = SPEED_CHOICES["custom"]
    assert read == [
        *(True, custom, "ucache", "0.5", "whole steps", "10-90", "2", "3", "110", "static", False, "decay=0.5")
    ]
    assert Options.of(read).as_method() == Options.of(given).as_method()
    plain = {key: str(value) for key, value in infotext.write(Options(enabled=True, speed="3x")).items()}
    assert plain == {"StepCache": "3x"}
    assert [value(plain) for _, value in fields] == [
        *(True, SPEED_CHOICES["3x"], "forecast", "", "automatic", "", "", "", "none", "dynamic", True, "")
    ]
    assert [value({"Steps": "20"}) for _, value in fields] == [False, *[None] * 11]


def test_the_xyz_plot_gets_its_axes_once_and_they_act():
    class AxisOption:
        def __init__(self, label, type, apply, choices=None):
            self.label, self.type, self.apply, self.choices = label, type, apply, choices

    plot = types.SimpleNamespace(axis_options=[AxisOption("Seed", int, None)], AxisOption=AxisOption)
    script = type("Script", (), {"__module__": "xyz_grid.py"})
    scripts = types.SimpleNamespace(scripts_data=[types.SimpleNamespace(script_class=script, module=plot)])
    add_axes(scripts)
    add_axes(scripts)
    axes = {axis.label: axis for axis in plot.axis_options[1:]}
    names = ("Enabled", "Speed", "Method", "Number", "Skip", "Mask preset", "Mask")
    assert list(axes) == [f"[StepCache] {name}" for name in names]
    assert "forecast" in axes["[StepCache] Method"].choices()
    host = Host("forge")
    script = host.script
    p = types.SimpleNamespace(extra_generation_params={}, comments=[])
    p.comment = p.comments.append
    axes["[StepCache] Method"].apply(p, "ucache", [])
    axes["[StepCache] Number"].apply(p, 0.4, [])
    script.process(p, True)
    assert p.stepcache_job.options.as_method().criterion.threshold == 0.4
    assert p.stepcache_job.options.as_method().skip == "all"
    assert axes["[StepCache] Speed"].choices() == ["2x", "3x", "4x", "custom"]
    skip = axes["[StepCache] Skip"]
    skip.apply(p, skip.type(skip.choices()[2]), [])
    script.process(p, True)
    assert p.stepcache_job.options.as_method().skip == "uncond"
    script.process(p, False)
    assert p.stepcache_job is None
    assert "has no effect while StepCache is not enabled" in p.comments[0]
    axes["[StepCache] Enabled"].apply(p, axes["[StepCache] Enabled"].type("True"), [])
    script.process(p, False)
    assert p.stepcache_job is not None


def test_importing_the_module_needs_no_host():
    code = (
        "import sys, stepcache.samplers.webui; print(sorted({'gradio', 'modules', 'k_diffusion'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def folder(tmp_path):
    for part in ("modules", "extensions"):
        (tmp_path / "webui" / part).mkdir(parents=True)
    for part in ("modules/scripts.py", "modules/processing.py"):
        (tmp_path / "webui" / part).touch()
    return tmp_path / "webui"


def test_install_writes_an_entry_point_once_that_loads(folder, capsys, host_modules):
    assert main(["install", "webui", str(folder)]) == 0
    file = folder / "extensions" / "stepcache" / "scripts" / "stepcache_webui.py"
    assert f"Wrote {file}" in capsys.readouterr().out
    written = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if "stepcache" in one.parts)
    assert [one for one in written if (folder / one).is_file()] == [
        "extensions/stepcache/metadata.ini",
        "extensions/stepcache/scripts/stepcache_webui.py",
    ]
    metadata = configparser.ConfigParser()
    metadata.read(folder / "extensions" / "stepcache" / "metadata.ini")
    ours = configparser.ConfigParser()
    ours.read(Path(__file__).parents[3] / "metadata.ini")
    assert metadata == ours
    main(["install", "webui", str(folder)])
    assert "nothing to do" in capsys.readouterr().out
    file.write_text(file.read_text() + "# an older text\n")
    main(["install", "webui", str(folder)])
    assert "Wrote" in capsys.readouterr().out
    callbacks = types.SimpleNamespace(on_cfg_denoiser=[].append, on_before_ui=[].append)
    host_modules.script_callbacks, host_modules.scripts.Script = callbacks, type("Script", (), {})
    defined = {"__name__": "stepcache_webui.py"}
    exec(compile(file.read_text(), str(file), "exec"), defined)
    assert issubclass(defined["StepCache"], (webui.Extension, host_modules.scripts.Script))
    assert callbacks.on_cfg_denoiser.__self__ == [on_cfg_denoiser]


def test_the_entry_point_says_that_the_package_is_missing(folder, host_modules, monkeypatch):
    main(["install", "webui", str(folder)])
    host_modules.script_callbacks = None
    monkeypatch.setitem(sys.modules, "stepcache.samplers", None)
    file = folder / "extensions" / "stepcache" / "scripts" / "stepcache_webui.py"
    with pytest.raises(ImportError, match="needs the package stepcache in the web UI's own Python"):
        exec(compile(file.read_text(), str(file), "exec"), {})


def test_install_refuses_what_is_no_web_ui_or_not_ours(folder, capsys):
    with pytest.raises(SystemExit):
        main(["install", "webui", str(folder.parent)])
    said = capsys.readouterr().err
    assert "is no web UI: it lacks modules/scripts.py, modules/processing.py, extensions" in said
    assert f"did you mean {folder}?" in said
    other = folder / "extensions" / "stepcache"
    other.mkdir()
    (other / "notes.txt").touch()
    with pytest.raises(SystemExit):
        main(["install", "webui", str(folder)])
    assert "is not ours" in capsys.readouterr().err
    (other / "notes.txt").unlink()
    (other / "metadata.ini").write_text("[Extension]\nName = another\n")
    with pytest.raises(SystemExit):
        main(["install", "webui", str(folder)])
    assert "was not written by stepcache" in capsys.readouterr().err
    assert not (other / "scripts").exists()


def test_install_never_writes_through_a_link(folder, capsys, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "extensions" / "stepcache").symlink_to(elsewhere)
    with pytest.raises(SystemExit):
        main(["install", "webui", str(folder)])
    assert f"is a link to {elsewhere}: remove the link" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []
    elsewhere.rmdir()  # now the link is dangling
    with pytest.raises(SystemExit):
        main(["install", "webui", str(folder)])
    assert "is a link to" in capsys.readouterr().err


@pytest.mark.parametrize("in_the_way", ["extensions/stepcache", "extensions/stepcache/scripts"])
def test_install_says_if_a_file_is_in_the_way(in_the_way, folder, capsys):
    (folder / in_the_way).parent.mkdir(exist_ok=True)
    (folder / in_the_way).touch()
    if in_the_way.endswith("scripts"):
        (folder / "extensions/stepcache/metadata.ini").write_text(MARK)
    with pytest.raises(SystemExit):
        main(["install", "webui", str(folder)])
    assert f"{folder / in_the_way}" in (error := capsys.readouterr().err)
    assert "Nothing can be installed there" in error


@pytest.mark.parametrize("name", ["stepcache", "step-cache-main"])
def test_install_refuses_a_second_panel_beside_a_checkout(name, folder, capsys):
    checkout = folder / "extensions" / name
    (checkout / "scripts").mkdir(parents=True)
    for part in ("pyproject.toml", "scripts/stepcache_webui.py"):
        (checkout / part).write_bytes((Path(__file__).parents[3] / part).read_bytes())
    with pytest.raises(SystemExit):
        main(["install", "webui", str(folder)])
    assert f"there already, as a clone of its repository: {checkout}" in capsys.readouterr().err
    assert [one.name for one in (folder / "extensions").iterdir()] == [name]


@pytest.mark.parametrize("own", ["venv", "../system/python"])
def test_install_says_if_the_web_ui_has_a_python_of_its_own(own, folder, capsys):
    (folder / own).mkdir(parents=True)
    main(["install", "webui", str(folder)])
    assert f"the web UI seems to run on the Python in {(folder / own).resolve()}" in capsys.readouterr().out


BARE = """
import importlib.util, json, sys, types

clone, packages = sys.argv[1:3]
sys.path.append(packages)
installed = importlib.util.find_spec("stepcache") is not None
sys.path[1:1] = sys.argv[3:]
if sys.argv[3:]:
    import stepcache
before = list(sys.path)
modules, callbacks = types.ModuleType("modules"), []
modules.script_callbacks = types.SimpleNamespace(on_cfg_denoiser=callbacks.append, on_before_ui=callbacks.append)
modules.scripts = types.SimpleNamespace(Script=object)
sys.modules["modules"] = modules
spec = importlib.util.spec_from_file_location("stepcache_webui.py", clone + "/scripts/stepcache_webui.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
p = types.SimpleNamespace(extra_generation_params={})
module.StepCache().process(p, True, "custom", "ucache", 0.5)
found = {
    "installed": installed,
    "from": [sys.modules[name].__file__ for name in ("stepcache", "stepcache.samplers.webui")],
    "callbacks": len(callbacks),
    "threshold": p.stepcache_job.options.as_method().criterion.threshold,
    "path unchanged": sys.path == before,
    "others found": [name for name in ("samplers", "tests") if importlib.util.find_spec(name)],
}
print("FOUND", json.dumps(found))
"""


@pytest.fixture
def clone(tmp_path):
    """A clone of the repository among a web UI's extensions."""
    here, folder = Path(__file__).parents[3], tmp_path / "webui" / "extensions" / "step-cache-main"
    for part in ("stepcache", "samplers", "scripts"):
        shutil.copytree(here / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "metadata.ini"):
        shutil.copy(here / part, folder / part)
    return folder


@pytest.fixture
def packages(tmp_path):
    """A folder with every installed package, torch among them, but without stepcache."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for place in map(Path, sys.path):
        for entry in place.iterdir() if place.name in ("site-packages", "dist-packages") and place.is_dir() else ():
            if "stepcache" not in entry.name and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def load_in_a_bare_interpreter(*arguments):
    """Runs BARE without environment, site-packages and .pth files. Returns what it prints, then what it found."""
    command = [sys.executable, "-I", "-S", "-c", BARE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed, _, found = done.stdout.partition("FOUND ")
    return printed, json.loads(found)


def test_a_clone_among_the_extensions_runs_without_being_installed(clone, packages):
    printed, found = load_in_a_bare_interpreter(clone, packages)
    assert found == {
        "installed": False,
        "from": [str(clone / "stepcache" / "__init__.py"), str(clone / "samplers" / "webui" / "__init__.py")],
        "callbacks": 2,
        "threshold": 0.5,
        "path unchanged": True,
        "others found": [],
    }
    assert printed == ""


def test_a_copy_that_was_loaded_before_the_clone_is_used_and_named(clone, packages, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(clone, other)
    printed, found = load_in_a_bare_interpreter(clone, packages, other)
    assert printed == f"StepCache: another copy was loaded first. {other} is in use, not {clone}\n"
    assert found["from"][1] == str(other / "samplers" / "webui" / "__init__.py")
    assert found["threshold"] == 0.5


def test_no_host_runs_an_installer_of_ours():
    """Web UIs and ComfyUI-Manager run a folder's install.py at every start or update, if there is one."""
    assert not (Path(__file__).parents[3] / "install.py").exists()


def test_the_schedule_of_a_followed_sampler_is_still_its_own(runs):
    """The host reads the signature of `sampler.func`, wrapped or not."""
    host = Host("a1111-1.10")
    host.job(ON)
    assert runs[0].schedule.sigmas is not None
    assert runs[0].schedule.stages == 1
    assert SAMPLERS["Euler"] is sampling.sample_euler
