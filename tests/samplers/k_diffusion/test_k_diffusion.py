"""The k-diffusion adapter under k-diffusion's own samplers and wrappers."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import k_diffusion as K
    from k_diffusion import sampling

from stepcache import EasyCache, Method, OptionError, Static, StepMask, UCache
from stepcache.extend import Lagrange
from stepcache.samplers.k_diffusion import CachedDenoiser, FlowDenoiser, InTurn, find, sample

SAMPLERS = sorted(name for name in dir(sampling) if name.startswith("sample_"))
TWO = {"sample_heun", "sample_dpm_2", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral", "sample_dpmpp_sde"}
NO_SCHEDULE = {"sample_dpm_fast", "sample_dpm_adaptive"}
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
SIGMAS = sampling.get_sigmas_karras(12, 0.03, 14.6)
ALTERNATE = "101010101011"


class Net(nn.Module):
    """A smooth network of (x_in, t) that remembers what it was called with."""

    alphas_cumprod = ALPHAS

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x, t, **extra):
        self.seen.append((x.clone(), t.clone()))
        return torch.tanh(x) + 0.1 * torch.sin(t.float().view(-1, 1, 1, 1) / 100)

    apply_model = forward


class Offset(Net):
    """The network-space identity plus a constant: there residual reuse is exact at every sigma."""

    def forward(self, x, t, **extra):
        self.seen.append((x.clone(), t.clone()))
        return x + torch.linspace(-1, 1, x[0].numel()).view_as(x[0]) * extra.get("strength", 1.0)

    apply_model = forward


def eps_model(network: nn.Module | None = None) -> nn.Module:
    return K.external.DiscreteEpsDDPMDenoiser(network or Net(), ALPHAS, quantize=False)


def start(sigma: float = 14.6, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * sigma


def arguments(name: str) -> tuple:
    return {"sample_dpm_fast": (0.03, 14.6, 12), "sample_dpm_adaptive": (0.03, 14.6)}.get(name, (SIGMAS,))


def run(name: str, model, cache: CachedDenoiser, **keywords) -> torch.Tensor:
    torch.manual_seed(7)
    return sample(name, model, start(), *arguments(name), cache=cache, disable=True, **keywords)


def bare(name: str, model) -> torch.Tensor:
    torch.manual_seed(7)
    return getattr(sampling, name)(model, start(), *arguments(name), disable=True)


def test_there_are_thirteen_samplers():
    assert len(SAMPLERS) == 13


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("method", [None, UCache(threshold=0.0), Static("1" * 12)], ids=["none", "zero", "ones"])
def test_off_is_bit_identical_and_the_model_sees_the_same_calls(name, method):
    plain, cached = Net(), Net()
    expected = bare(name, eps_model(plain))
    model = CachedDenoiser(eps_model(cached), method)
    assert torch.equal(run(name, model, model), expected)
    assert len(cached.seen) == len(plain.seen)
    for (x, t), (x_plain, t_plain) in zip(cached.seen, plain.seen, strict=True):
        assert torch.equal(x, x_plain)
        assert torch.equal(t, t_plain)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "method",
    [UCache(1.5), EasyCache(0.5), Static("fast"), UCache(mask=StepMask("medium"), max_consecutive=1, last_step=True)],
    ids=["ucache", "easycache", "static", "everything"],
)
@pytest.mark.filterwarnings("ignore:the mask cannot act", "ignore:the last step cannot")
def test_every_sampler_counts_steps_evaluations_and_calls_apart(name, method):
    network = Net()
    model = CachedDenoiser(eps_model(network), method)
    image = run(name, model, model)
    report = model.report
    assert torch.isfinite(image).all()
    assert report.calls == len(network.seen)
    if name not in NO_SCHEDULE:
        assert report.steps == 12
        assert report.evaluations == (23 if name in TWO else 12)
    elif name == "sample_dpm_fast":
        assert (report.steps, report.evaluations) == (5, 12)
    assert report.calls + report.skipped == report.evaluations
    assert report.speedup == report.evaluations / report.calls
    if name == "sample_dpm_adaptive":
        assert report.skipped == 0
    elif name not in NO_SCHEDULE or method.mask is None:
        assert report.skipped > 0


def test_dpm_adaptive_counts_its_own_steps():
    steps = []
    network = Net()
    model = CachedDenoiser(eps_model(network), None)
    run("sample_dpm_adaptive", model, model, callback=lambda info: steps.append(info["i"]))
    assert model.report.steps == len(set(steps)) == steps[-1] + 1
    assert model.report.evaluations == len(network.seen)


def wrappers() -> dict[str, tuple]:
    """Every wrapper of k-diffusion, and the flow forms, around a network, with the scalings to name if any."""
    diffusion = SimpleNamespace(alphas_cumprod=ALPHAS.numpy())
    compvis_v = lambda net: K.external.CompVisVDenoiser(net)  # noqa: E731
    return {
        "DiscreteEpsDDPMDenoiser": (eps_model, None),
        "CompVisDenoiser": (K.external.CompVisDenoiser, None),
        "OpenAIDenoiser": (lambda net: K.external.OpenAIDenoiser(net, diffusion, has_learned_sigmas=False), None),
        "DiscreteVDDPMDenoiser": (lambda net: K.external.DiscreteVDDPMDenoiser(net, ALPHAS, quantize=False), None),
        "CompVisVDenoiser": (compvis_v, None),
        "VDenoiser": (K.external.VDenoiser, None),
        "layers.Denoiser": (lambda net: K.layers.Denoiser(net, sigma_data=0.5), None),
        "FlowDenoiser": (FlowDenoiser, None),
        "flow": (lambda net: lambda x, sigma: x - sigma.view(-1, 1, 1, 1) * net(x, sigma), "flow"),
        "eps function": (
            lambda net: (
                lambda x, sigma: x - sigma.view(-1, 1, 1, 1) * net(x / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt(), sigma)
            ),
            None,
        ),
    }


class OffsetWithCond(Offset):
    """CompVis' v wrapper insists on passing `cond` by position."""

    def apply_model(self, x, t, cond=None):
        return self.forward(x, t)


@pytest.mark.parametrize("wrapper", wrappers())
@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpmpp_2m"])
def test_reuse_is_exact_at_every_sigma_where_the_residual_is_constant(wrapper, name):
    wrap, scalings = wrappers()[wrapper]
    network = OffsetWithCond()
    model = wrap(network)
    cached = CachedDenoiser(model, Static(ALTERNATE), scalings=scalings)
    extra = {"extra_args": {"cond": torch.zeros(2)}} if wrapper == "CompVisVDenoiser" else {}
    torch.manual_seed(7)
    sigmas = SIGMAS / (1 + SIGMAS) if wrapper == "flow" else SIGMAS
    x = start(float(sigmas[0]))
    expected = getattr(sampling, name)(model, x, sigmas, disable=True, **extra)
    calls = len(network.seen)
    got = sample(name, cached, x, sigmas, disable=True, **extra)
    assert len(network.seen) - calls == cached.report.calls < calls
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_a_denoised_minus_x_is_never_reused_across_sigmas():
    """The form that LazyCache reuses would be off by sigma_c / sigma_n - 1; ours is exact here."""
    cached = CachedDenoiser(eps_model(Offset()), Static("101"), sigmas=[10.0, 5.0, 1.0, 0.0])
    x = start(10.0)
    first = cached(x, torch.full((2,), 10.0))
    second = cached(x, torch.full((2,), 5.0))
    assert cached.report.decisions("guided") == "CS"
    torch.testing.assert_close(second, eps_model(Offset())(x, torch.full((2,), 5.0)))
    assert not torch.allclose(second - x, first - x, rtol=0.1)


class Batched(nn.Module):
    """Guidance with both branches in one call, uncond first."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model = inner_model

    def forward(self, x, sigma):
        strength = torch.tensor([0.5, 1.0]).repeat_interleave(len(x)).view(-1, 1, 1, 1)
        both = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), strength=strength)
        uncond, cond = both.chunk(2)
        return uncond + 3.0 * (cond - uncond)


class Separate(Batched):
    """Guidance with the branches in separate calls, cond first."""

    def forward(self, x, sigma):
        cond = self.inner_model(x, sigma, strength=torch.tensor(1.0))
        uncond = self.inner_model(x, sigma, strength=torch.tensor(0.5))
        return uncond + 3.0 * (cond - uncond)


class Wavy(Net):
    def forward(self, x, t, strength=1.0):
        self.seen.append((x, t))
        return torch.tanh(x) + strength * torch.sin(t.float().view(-1, 1, 1, 1) / 100 + x)


@pytest.mark.parametrize("method", [UCache(1.0), EasyCache(1.0), Static(ALTERNATE)], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpmpp_2m"])
def test_batched_and_separate_branches_decide_and_answer_alike(method, name):
    batched = CachedDenoiser(eps_model(Wavy()), method, branches=("uncond", "cond"))
    in_turn = CachedDenoiser(eps_model(Wavy()), method, branches=InTurn("cond", "uncond"))
    named = CachedDenoiser(
        eps_model(Wavy()), method, branches=lambda x, sigma, strength: "cond" if strength == 1 else "uncond"
    )
    images = [run(name, Batched(batched), batched), run(name, Separate(in_turn), in_turn)]
    images.append(run(name, Separate(named), named))
    decisions = batched.report.decisions("cond")
    assert "S" in decisions
    for model in (batched, in_turn, named):
        assert model.report.decisions("cond") == model.report.decisions("uncond") == decisions
        assert sorted(model.report.branches) == ["cond", "uncond"]
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=1e-4, atol=1e-4)


def test_around_guidance_there_is_one_branch_and_the_scalings_come_from_inside():
    network = Offset()
    guided = Batched(eps_model(network))
    cached = CachedDenoiser(guided, Static(ALTERNATE))
    expected = bare("sample_euler", Batched(eps_model(Offset())))
    image = run("sample_euler", cached, cached)
    assert cached.report.branches == ["guided"]
    assert len(network.seen) == cached.report.calls == ALTERNATE.count("1")
    torch.testing.assert_close(image, expected, rtol=2e-4, atol=2e-4)


def test_three_branches_in_one_call_follow_the_names_given():
    names = ("uncond", "cond", "image")
    cached = CachedDenoiser(eps_model(), Static("101"), branches=names, sigmas=[9.0, 4.0, 1.0, 0.0])
    for sigma in (9.0, 4.0, 1.0):
        cached(start(sigma, batch=6)[..., :1], torch.full((6,), sigma))
    assert [cached.report.decisions(name) for name in names] == ["CSC"] * 3
    assert cached.report.calls == 6


def test_a_batch_that_does_not_divide_into_the_branches_is_an_error_with_both_numbers():
    cached = CachedDenoiser(eps_model(), UCache(), branches=("uncond", "cond"))
    with pytest.raises(OptionError, match=r"batch of 3 does not divide into the 2 branches uncond, cond"):
        cached(start(batch=3), torch.full((3,), 14.6))


def test_attributes_of_the_inner_model_stay_reachable():
    inner = eps_model()
    cached = CachedDenoiser(inner, UCache(), sigmas=SIGMAS)
    assert torch.equal(cached.sigmas, inner.sigmas)
    assert torch.equal(cached.get_sigmas(5), inner.get_sigmas(5))
    assert torch.equal(cached.sigma_to_t(torch.tensor([1.0])), inner.sigma_to_t(torch.tensor([1.0])))
    assert float(cached.sigma_min) == float(inner.sigma_min)
    with pytest.raises(AttributeError, match="nor the model inside it has the attribute 'sigmoid'"):
        cached.sigmoid  # noqa: B018


def test_the_wrapper_adds_nothing_to_parameters_and_follows_to():
    inner = eps_model(nn.Linear(3, 3))
    cached = CachedDenoiser(inner, UCache())
    assert [id(p) for p in cached.parameters()] == [id(p) for p in inner.parameters()]
    cached.to(torch.float64)
    assert inner.inner_model.weight.dtype == torch.float64


def test_the_callback_composes_with_the_users_own():
    seen = []
    cached = CachedDenoiser(eps_model(), UCache())
    run("sample_heun", cached, cached, callback=lambda info: seen.append(info["i"]))
    assert seen == list(range(12))


def test_the_callback_alone_names_the_steps_of_an_unknown_schedule():
    cached = CachedDenoiser(eps_model(), None)
    sampling.sample_dpm_2(cached, start(), SIGMAS, callback=cached.callback(), disable=True)
    assert (cached.report.steps, cached.report.evaluations) == (12, 23)
    assert [event.position.step for event in cached.report.events][:5] == [0, 0, 1, 1, 2]


def test_an_unknown_schedule_works_and_the_report_says_what_it_costs():
    network = Net()
    cached = CachedDenoiser(eps_model(network), UCache(1.5))
    sampling.sample_euler(cached, start(), SIGMAS, disable=True)
    assert len(network.seen) == cached.report.calls < cached.report.evaluations == 12
    assert cached.report.steps is None
    assert any("schedule is not known" in note for note in cached.report.notes)
    assert any("training timetable (no schedule)" in note for note in cached.report.notes)


@pytest.mark.parametrize("name", ["sample_euler", "sample_dpm_2", "sample_dpmpp_2m"])
@pytest.mark.parametrize("method", [EasyCache(1.0), Static(ALTERNATE)], ids=lambda m: m.name)
def test_the_schedule_may_be_given_in_three_ways_with_the_same_result(name, method):
    by_sample = CachedDenoiser(eps_model(), method)
    expected = run(name, by_sample, by_sample)
    by_run = CachedDenoiser(eps_model(), method)
    with by_run.run(SIGMAS):
        torch.manual_seed(7)
        assert torch.equal(getattr(sampling, name)(by_run, start(), SIGMAS, disable=True), expected)
    by_constructor = CachedDenoiser(eps_model(), method, sigmas=SIGMAS)
    for _ in range(2):
        torch.manual_seed(7)
        assert torch.equal(getattr(sampling, name)(by_constructor, start(), SIGMAS, disable=True), expected)
        for other in (by_run, by_constructor):
            assert other.report.decisions("guided") == by_sample.report.decisions("guided")
            assert other.report.steps == by_sample.report.steps == 12


def test_heuns_first_corrector_is_known_with_a_plan_and_recognised_one_evaluation_later_without():
    """At sigmas[1] the corrector of step 0 cannot be told from Euler's step 1 until sigmas[1] is asked for again."""
    planned = CachedDenoiser(eps_model(), Static(ALTERNATE))
    run("sample_heun", planned, planned)
    guessed = CachedDenoiser(eps_model(), Static(ALTERNATE), sigmas=SIGMAS)
    sampling.sample_heun(guessed, start(), SIGMAS, disable=True)
    places = [[(e.position.step, e.position.stage) for e in model.report.events] for model in (planned, guessed)]
    assert places[0] == places[1] == [(i, s) for i in range(12) for s in range(2 if i < 11 else 1)]
    assert planned.report.decisions("guided") == "CCSSCCSSCCSSCCSSCCSSCCC"
    assert guessed.report.decisions("guided") == "CSSSCCSSCCSSCCSSCCSSCCC"


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2"])
def test_churn_raises_sigma_within_the_run_and_steps_stay_right(name):
    cached = CachedDenoiser(eps_model(), Static(ALTERNATE))
    run(name, cached, cached, s_churn=5.0)
    report = cached.report
    stages = [(event.position.step, event.position.stage) for event in report.events]
    per_step = 1 if name == "sample_euler" else 2
    assert stages == [(i, s) for i in range(12) for s in range(per_step if i < 11 else 1)]
    assert [e.computed for e in report.events] == [ALTERNATE[step] == "1" for step, _ in stages]


def test_a_restart_schedule_stays_one_run():
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 5.0, 2.0, 1.0, 0.3, 0.0])
    network = Net()
    cached = CachedDenoiser(eps_model(network), Static("10110101"))
    sample("euler", cached, start(10.0), sigmas, disable=True)
    assert cached.report.decisions("guided") == "CSCCSCSC"
    assert cached.report.steps == 8
    assert len(network.seen) == 5


def test_a_restart_between_the_steps_of_a_falling_schedule_stays_one_run():
    """A1111's Restart sampler goes back up to an earlier sigma of the same schedule."""
    cached = CachedDenoiser(eps_model(), UCache(1.5), sigmas=[10.0, 5.0, 2.0, 1.0, 0.3, 0.0])
    for sigma in (10.0, 5.0, 2.0, 1.0, 5.0, 2.0, 1.0, 0.3):
        cached(start(sigma)[..., :1], torch.full((2,), sigma))
    assert cached.report.evaluations == 8
    assert [event.position.step for event in cached.report.events] == [0, 1, 2, 3, 1, 2, 3, 4]


def test_a_mask_of_another_length_is_an_error_with_both_lengths_before_the_model_is_called():
    network = Net()
    cached = CachedDenoiser(eps_model(network), Static("10101"))
    with pytest.raises(OptionError, match="the mask has 5 entries, the run has 12 steps"):
        run("sample_euler", cached, cached)
    with pytest.raises(OptionError, match="the mask has 5 entries, the run has 12 steps"):
        CachedDenoiser(eps_model(), Static("10101"), sigmas=SIGMAS)
    assert network.seen == []


def test_a_mask_without_a_schedule_computes_everything_and_says_so_once():
    network = Net()
    cached = CachedDenoiser(eps_model(network), Static("fast"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            sampling.sample_euler(cached, start(), SIGMAS, disable=True)
    assert len([w for w in caught if "the mask cannot act" in str(w.message)]) == 1
    assert len(network.seen) == 24
    assert any("mask cannot act" in note for note in cached.report.notes)


def test_easycache_places_its_window_by_the_models_own_sigma_table():
    model = CachedDenoiser(eps_model(), EasyCache(0.3))
    run("sample_euler", model, model)
    table = eps_model()
    high = float(table.t_to_sigma(torch.tensor(0.85 * 999)))
    low = float(table.t_to_sigma(torch.tensor(0.05 * 999)))
    for event in model.report.events:
        assert (event.reason == "before window") == (event.position.sigma > high)
        assert (event.reason == "after window") == (event.position.sigma <= low)


def test_x_that_requires_grad_is_computed():
    network = Net()
    cached = CachedDenoiser(eps_model(network), Static("fast"), sigmas=SIGMAS)
    for sigma in SIGMAS[:-1]:
        x = start(float(sigma)).requires_grad_()
        (gradient,) = torch.autograd.grad(cached(x, sigma.expand(2)).sum(), x)
        assert gradient.abs().sum() > 0
    assert len(network.seen) == 12
    assert {event.reason for event in cached.report.events} == {"gradients are asked for"}


def test_a_sampler_may_be_named_with_or_without_prefix_and_misspelt_only_once():
    cached = CachedDenoiser(eps_model(), UCache())
    assert torch.equal(
        sample("euler", cached, start(), SIGMAS, disable=True),
        sample(sampling.sample_euler, cached, start(), sigmas=SIGMAS, disable=True),
    )
    with pytest.raises(OptionError, match="Did you mean 'euler'"):
        sample("eulr", cached, start(), SIGMAS)


def test_sample_finds_the_one_cache_inside_a_model_or_says_how_to_name_it():
    cached = CachedDenoiser(eps_model(Wavy()), UCache(), branches=("uncond", "cond"))
    assert find(Batched(cached)) is cached
    with pytest.raises(OptionError, match=r"Net holds 0 CachedDenoisers: pass the one to use as sample\(..., cache=\)"):
        sample("euler", Net(), start(), SIGMAS)


def test_every_option_of_the_adapter_that_is_wrong_names_what_is_accepted():
    with pytest.raises(OptionError, match=r"unknown reference 'cont'. Did you mean 'cond'"):
        CachedDenoiser(eps_model(), UCache(), branches=("uncond", "cond"), reference="cont")
    with pytest.raises(OptionError, match=r"unknown scalings 'flw'. Did you mean 'flow'"):
        CachedDenoiser(eps_model(), UCache(), scalings="flw")
    with pytest.raises(OptionError, match=r"method=3: accepted are a Method"):
        CachedDenoiser(eps_model(), 3)
    with pytest.raises(OptionError, match=r"unknown method 'ucahce'. Did you mean 'ucache'"):
        CachedDenoiser(eps_model(), "ucahce")


def test_flow_denoiser_is_the_same_flow_in_k_diffusions_coordinates():
    """Euler in (x, sigma) takes the same steps as Euler in (x_t, t), because both keep image and noise fixed."""
    velocity = Net()
    denoiser = FlowDenoiser(velocity)
    sigmas = denoiser.get_sigmas(8)
    x = start(float(sigmas[0]))
    image = sampling.sample_euler(denoiser, x, sigmas, disable=True)
    t = sigmas / (1 + sigmas)
    y = x * (1 - t[0])
    for now, following in itertools.pairwise(t):
        y = y + (following - now) * velocity(y, now.expand(2))
    torch.testing.assert_close(image, y, rtol=1e-4, atol=1e-4)


def test_flow_denoiser_timetable_is_shifted():
    t = torch.tensor([499.0])
    assert float(FlowDenoiser(Net()).t_to_sigma(t)) == pytest.approx(0.5 / 0.5)
    assert float(FlowDenoiser(Net(), shift=3.0).t_to_sigma(t)) == pytest.approx(0.75 / 0.25, rel=1e-5)


def test_importing_the_adapter_imports_no_host():
    code = "import sys, stepcache.samplers.k_diffusion; print(*{m.partition('.')[0] for m in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "stepcache" in modules
    assert not {"k_diffusion", "diffusers", "matplotlib", "rich", "skimage"} & set(modules)


def test_all_samplers_take_what_sample_passes():
    for name in SAMPLERS:
        parameters = inspect.signature(getattr(sampling, name)).parameters
        assert list(parameters)[:2] == ["model", "x"]
        assert "callback" in parameters
        assert ("sigmas" in parameters) == (name not in NO_SCHEDULE)


def test_a_method_is_data_and_one_may_serve_many_models():
    method = Method(mask="fast", name="shared")
    a, b = (CachedDenoiser(eps_model(), method.replace(mask=StepMask("fast", "static"))) for _ in range(2))
    assert torch.equal(run("sample_euler", a, a), run("sample_euler", b, b))
    assert a.report.decisions("guided") == b.report.decisions("guided")


def test_a_run_broken_off_by_the_callback_leaves_nothing_for_the_next_one():
    """The web UI's interrupt reaches the sampler, not the wrapper. The next run begins further down the schedule."""
    cached = CachedDenoiser(eps_model(), Static("111111000001"), sigmas=SIGMAS)

    def interrupt(info):
        if info["i"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampling.sample_euler(cached, start(), SIGMAS, callback=interrupt, disable=True)
    x = start(float(SIGMAS[6]))
    clean = CachedDenoiser(eps_model(), Static("111111000001"), sigmas=SIGMAS)
    expected = sampling.sample_euler(clean, x, SIGMAS[6:], disable=True)
    assert torch.equal(sampling.sample_euler(cached, x, SIGMAS[6:], disable=True), expected)


class SometimesUnguided(Separate):
    """Guidance only at high sigma, as NGMS does it: the uncond call is left out below."""

    def forward(self, x, sigma):
        if sigma[0] > 1:
            return super().forward(x, sigma)
        return self.inner_model(x, sigma, strength=torch.tensor(1.0))


def test_branches_in_turn_stay_right_when_the_last_one_is_left_out():
    in_turn = CachedDenoiser(eps_model(Wavy()), UCache(1.0), branches=InTurn("cond", "uncond"))
    named = CachedDenoiser(
        eps_model(Wavy()), UCache(1.0), branches=lambda x, sigma, strength: "cond" if strength == 1 else "uncond"
    )
    images = [run("sample_euler", SometimesUnguided(model), model) for model in (in_turn, named)]
    assert torch.equal(*images)
    assert in_turn.report.decisions("cond") == named.report.decisions("cond")
    assert len(in_turn.report.decisions("uncond")) == int((SIGMAS > 1).sum())


def test_a_cached_model_can_be_pickled_and_its_copy_stands_on_its_own():
    cached = CachedDenoiser(eps_model(), UCache(1.5))
    expected = run("sample_euler", cached, cached)
    for other in (pickle.loads(pickle.dumps(cached)), copy.deepcopy(cached)):
        assert other.inner_model is not cached.inner_model
        assert other._scalings.owner is other.inner_model
        assert torch.equal(run("sample_euler", other, other), expected)


def euler(model, x, sigmas, wait=lambda: None):
    """A sampler of three lines, without a callback."""
    for sigma, following in itertools.pairwise(sigmas):
        wait()
        x = x + (x - model(x, sigma.expand(2))) / sigma * (following - sigma)
    return x


class OffsetOfThread(nn.Module):
    """As NAMEOF, with a constant of each thread's own: reuse is exact from one's own cache and from no other."""

    def __init__(self):
        super().__init__()
        self.offsets = {}

    def forward(self, x, t):
        return x + self.offsets[threading.get_ident()]


def test_threads_that_share_one_wrapper_never_get_each_others_cache():
    """It costs speed and a warning. Whoever is answered from a cache is answered from its own."""
    network = OffsetOfThread()
    shared = CachedDenoiser(eps_model(network), UCache(1e9, start=0.0, max_consecutive=1), sigmas=SIGMAS)
    starts = [start().roll(k, dims=-1) for k in (0, 3, 5)]
    barrier, images, errors = threading.Barrier(3), {}, []

    def work(k):
        try:
            network.offsets[threading.get_ident()] = 10.0 * k
            barrier.wait(timeout=30)
            images[k] = euler(shared, starts[k], SIGMAS, wait=lambda: barrier.wait(timeout=30))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for k in range(3):
        network.offsets[threading.get_ident()] = 10.0 * k
        expected = euler(eps_model(network), starts[k], SIGMAS)
        torch.testing.assert_close(images[k], expected, rtol=1e-4, atol=1e-4)


def test_threads_that_share_one_wrapper_have_turns_of_their_own():
    """Two runs whose calls alternate: neither takes the other's cond for the first of its own pair."""
    network = lambda x, sigma, name: torch.full_like(x, float(name == "cond"))  # noqa: E731
    shared = CachedDenoiser(network, Method(), branches=InTurn("cond", "uncond"), scalings="denoised")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sigma in SIGMAS[:-1]:
            for name in ("cond", "uncond"):
                for thread in (one, two):
                    image = thread.submit(shared, start(), sigma.expand(2), name=name).result()
                    assert image.eq(float(name == "cond")).all()


@pytest.mark.parametrize(("latents", "answers"), [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("skip", ["all", "uncond"])
def test_a_skipped_evaluation_has_the_dtype_of_the_computed_ones(latents, answers, skip):
    network = lambda x, sigma: (x * 0.5).to(answers)  # noqa: E731
    cached = CachedDenoiser(network, Static("10", skip=skip), sigmas=[4.0, 1.0, 0.0], branches=("uncond", "cond"))
    latent = start(1.0)[:1, ..., :1].repeat(2, 1, 1, 1)
    made = [cached((sigma * latent).to(latents), torch.full((2,), sigma)) for sigma in (4.0, 1.0)]
    assert cached.report.decisions("uncond") == "CS"
    assert [one.dtype for one in made] == [answers] * 2


def test_gradients_wanted_for_the_conditioning_are_not_cut():
    cached = CachedDenoiser(eps_model(Wavy()), Static("10"), sigmas=[4.0, 1.0, 0.0])
    strength = torch.tensor(1.0, requires_grad=True)
    for sigma in (4.0, 1.0):
        assert cached(start(sigma), torch.full((2,), sigma), strength=strength).requires_grad
    network = lambda x, sigma, cond: x * cond["crossattn"][0]  # noqa: E731
    cached = CachedDenoiser(network, Static("10"), sigmas=[4.0, 1.0, 0.0], scalings="denoised")
    for sigma in (4.0, 1.0):
        assert cached(start(sigma), torch.full((2,), sigma), cond={"crossattn": [strength]}).requires_grad
    with torch.no_grad():
        for sigma in (4.0, 1.0):
            cached(start(sigma), torch.full((2,), sigma), cond={"crossattn": [strength]})
    assert cached.report.decisions("guided") == "CS"


def test_a_guidance_wrapper_with_a_name_of_its_own_is_looked_through():
    class Renamed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.wrapped = model

        def forward(self, x, sigma):
            return self.wrapped(x, sigma)

    inner = K.external.DiscreteVDDPMDenoiser(Net(), ALPHAS, quantize=False)
    assert CachedDenoiser(Renamed(inner), UCache())._scalings.owner is inner
    plain = CachedDenoiser(lambda x, sigma: x * 0.5, UCache(), sigmas=[2.0, 1.0, 0.0])
    plain(start(2.0), torch.full((2,), 2.0))
    assert any("eps is assumed" in note for note in plain.report.notes)


def test_a_sampler_without_a_callback_runs_too():
    cached = CachedDenoiser(eps_model(), UCache(1.5))
    image = sample(euler, cached, start(), SIGMAS)
    torch.testing.assert_close(image, run("sample_euler", cached, cached))
    with pytest.raises(OptionError, match="'euler' takes no callback"):
        sample(euler, cached, start(), SIGMAS, callback=print)


def test_churn_without_a_plan_is_understood_from_the_callback():
    """The first churned sigma looks like a midpoint; after two noted steps every evaluation is known to be a step."""
    cached = CachedDenoiser(eps_model(), Static(ALTERNATE), sigmas=SIGMAS)
    sampling.sample_euler(cached, start(), SIGMAS, s_churn=3.0, callback=cached.callback(), disable=True)
    assert cached.report.steps == cached.report.evaluations == 12
    assert cached.report.decisions("guided")[2:] == "".join("CS"[digit == "0"] for digit in ALTERNATE)[2:]


@pytest.mark.parametrize("text", [True, False])
def test_a_prompt_that_changes_in_mid_run_drops_the_cache(text):
    prompts = ["a cat", "a dog"] if text else [torch.zeros(1, 3), torch.ones(1, 3)]
    network = lambda x, sigma, prompt: x + float(prompt is prompts[1])  # noqa: E731
    model = CachedDenoiser(network, Method(), scalings="denoised")
    with model.run([8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.0], 1):
        answers = [
            float(model(torch.full((1, 1, 2, 2), 5.0 + k), torch.tensor([sigma]), prompt=prompts[k > 2]).mean())
            for k, sigma in enumerate((8.0, 6.0, 4.0, 3.0, 2.0))
        ]
    assert answers == [5, 6, 7, 9, 10]
    assert model.report.decisions("guided") == "CSSCS"


def test_a_tensor_that_is_written_into_in_mid_run_drops_the_cache():
    model, prompt = CachedDenoiser(lambda x, sigma, prompt: x, Method(), scalings="denoised"), torch.zeros(1, 3)
    with model.run([8.0, 6.0, 4.0, 3.0, 2.0, 0.0], 1):
        for k, sigma in enumerate((8.0, 6.0, 4.0, 3.0)):
            if k == 2:
                prompt[0, 1] = 1
            model(start(sigma), torch.full((2,), sigma), prompt=prompt)
    assert model.report.decisions("guided") == "CSCS"


@pytest.mark.parametrize("argument", ["equal content", "another one in every call", "a number", "the same"])
def test_arguments_that_hosts_make_anew_in_every_call_cost_no_cache(argument):
    given = torch.ones(1, 3)
    arguments = {
        "equal content": lambda k: {"c": [torch.ones(1, 3)]},
        "another one in every call": lambda k: {"c": torch.full((1, 3), float(k))},
        "a number": lambda k: k,
        "the same": lambda k: given,
    }
    model = CachedDenoiser(lambda x, sigma, cond: x, Method(), scalings="denoised", sigmas=SIGMAS)
    for k, sigma in enumerate(SIGMAS[:-1]):
        model(start(float(sigma)), sigma.expand(2), cond=arguments[argument](k))
    assert model.report.decisions("guided") == "C" + "S" * (len(SIGMAS) - 2)


def test_a_new_prompt_begins_a_new_run_of_a_bare_loop_at_whatever_sigma():
    model = CachedDenoiser(lambda x, sigma, prompt: x, Method(), scalings="denoised")
    for sigma, prompt in ((8.0, "a cat"), (6.0, "a cat"), (4.0, "a dog"), (3.0, "a dog")):
        model(start(sigma), torch.full((2,), sigma), prompt=prompt)
    assert (model.report.run, model.report.decisions("guided")) == (1, "CS")


def test_a_loop_broken_off_between_its_branches_leaves_the_names_of_the_next_one_right():
    """Same sigma, another x: not the second branch, though it was its turn."""
    turns = InTurn("cond", "uncond")
    sigma = torch.ones(2)
    assert turns(start(), sigma) == "cond"
    assert [turns(x, sigma) for x in (start() + 1, start() + 1)] == ["cond", "uncond"]
    assert turns(x := start(), sigma) == "cond"
    assert turns(x, sigma) == "uncond"


def test_a_prediction_that_float16_cannot_hold_is_computed_instead():
    """denoised = x - 40 eps: eps = 2400 is a float16, -30,000 - 96,000 is none."""
    eps = iter([2400.0, 500.0])
    network = lambda x, sigma: (x - sigma.view(-1, 1, 1, 1) * next(eps)).to(x.dtype)  # noqa: E731
    method = Static("10", predictor=Lagrange(0, "zero"))
    model = CachedDenoiser(network, method, scalings="eps", sigmas=[50.0, 40.0, 0.0])
    model(torch.full((1, 1, 2, 2), 60000.0, dtype=torch.float16), torch.tensor([50.0]))
    answer = model(torch.full((1, 1, 2, 2), -30000.0, dtype=torch.float16), torch.tensor([40.0]))
    assert model.report.decisions("guided") == "CC"
    assert answer.isfinite().all()
    assert model.report.events[1].reason == "prediction not finite"


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, sigma):
        return self.scale * x


def test_gradients_wanted_for_the_models_parameters_are_not_cut():
    network = Scaled()
    model = CachedDenoiser(network, Method(), scalings="denoised", sigmas=SIGMAS)
    with pytest.warns(UserWarning, match="the model's parameters require gradients"):
        sum(model(start(float(s)), s.expand(2)).sum() for s in SIGMAS[:3]).backward()
    assert network.scale.grad == pytest.approx(sum(float(start(float(s)).sum()) for s in SIGMAS[:3]), rel=1e-4)
    assert model.report.decisions("guided") == "CCC"
    with torch.no_grad():
        for s in SIGMAS[:3]:
            model(start(float(s)), s.expand(2))
    assert model.report.decisions("guided") == "CSS"
    network.requires_grad_(False)
    for s in SIGMAS[:3]:
        model(start(float(s)), s.expand(2))
    assert model.report.decisions("guided") == "CSS"


def test_under_dpm_adaptive_everything_is_computed_and_the_report_says_why():
    model = CachedDenoiser(eps_model(), UCache(1.5))
    image, exact = (run("sample_dpm_adaptive", one, model) for one in (model, eps_model()))
    assert torch.equal(image, exact)
    assert {event.reason for event in model.report.events} == {"the sampler measures its error on it"}


@pytest.mark.parametrize(
    ("x", "sigma"),
    [
        (torch.ones(2, 3), 1.5),
        (torch.ones(0, 3), torch.ones(0, 1)),
        (torch.ones(5), torch.tensor(2.0)),
        (torch.tensor(3.0), torch.tensor(2.0)),
        (torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, 1)),
        (torch.ones(3, 1), torch.ones(3, 1)),
    ],
    ids=["a float sigma", "an empty batch", "1-D x", "0-D x", "complex x", "rows that do not divide"],
)
def test_with_the_cache_off_the_wrapper_takes_what_the_model_takes(x, sigma):
    network = lambda x, sigma: x * sigma  # noqa: E731
    for branches in (None, ("cond", "uncond")):
        model = CachedDenoiser(network, None, branches=branches)
        assert torch.equal(model(x, sigma), x * sigma)


def test_a_loop_that_shows_itself_to_be_another_begins_with_the_first_branch_and_goes_on_with_the_second():
    """x is not what a sampler could have made of the answers: another loop, unsaid. Its second call is uncond's."""

    def network(x: torch.Tensor, sigma: torch.Tensor, cond: float) -> torch.Tensor:
        return x / 2 + cond / 100

    model = CachedDenoiser(network, Method(), scalings="denoised", branches=InTurn("cond", "uncond"))
    noise = torch.Generator().manual_seed(0)
    for sigma in (10.0, 8.0, 6.0, 4.0):
        x = torch.randn(1, 4, 8, 8, generator=noise)
        for cond in (1.0, -1.0):
            model(x, torch.tensor([sigma]), cond=cond)
        assert [event.branch for event in model.report.events[-2:]] == ["cond", "uncond"]
