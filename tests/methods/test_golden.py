"""Decision for decision what stable-diffusion.cpp (commit 97d29908) decides, on trajectories made of closed forms.

Expected values are the original's own figures, in data/golden.json. Set the variable STEPCACHE_GOLDEN to the path of
the full traces to run every case of them instead of the selection.

In `dec` (cond) and `dec_un` (uncond) there is one letter an evaluation: C computed, S served from the cache.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import MODELS, Denoiser, N, noise, schedule, x_open
from torch import Tensor

from stepcache import DBCache, EasyCache, Method, OptionError, Report, UCache
from stepcache.extend import Gate, Position, RunInfo, SkipCounts, Window, mean_abs, mean_abs_difference
from stepcache.samplers.k_diffusion import CachedDenoiser, sample

COMPACT = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text(encoding="utf-8"))
TABLES = COMPACT["tables"]
METHODS = {"ucache": UCache, "easycache": EasyCache, "cache-dit": DBCache, "taylorseer": DBCache}
"""In stable-diffusion.cpp all of `dbcache`, `taylorseer` and `cache-dit` decide and reuse as its `dbcache` does."""

REFUSED = {
    "uc/x/threshold_negative": "threshold=-1.0: accepted is a number of at least 0",
    "uc/x/threshold_nan": "threshold=nan: accepted is a number of at least 0",
    "uc/x/range_invalid_start_ge_end": "start=0.7, end=0.7: the window is empty",
    "uc/x/range_start_nan": "start=nan: accepted is a number from 0 to 1",
    "ec/x/threshold_negative": "threshold=-1.0: accepted is a number of at least 0",
    "ec/x/threshold_nan": "threshold=nan: accepted is a number of at least 0",
    "ec/x/range_invalid_start_ge_end": "start=0.7, end=0.7: the window is empty",
}
NEGATIVE = {"cd/opt/Fn_-5": "Fn=-5: accepted is a whole number", "cd/opt/Bn_-5": "Bn=-5: accepted is a whole number"}
DIFFERENT = {
    "uc/x/uncond_gap_stale",
    "uc/x/resize_mid_run",
    "ec/x/resize_mid_run",
    "uc/x/wrong_model_family",
    "cd/opt/nan_at_9",
    *NEGATIVE,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:UCache with reset=0 and decay=1"),
    pytest.mark.filterwarnings("ignore:branch .* is evaluated before the reference 'cond'"),
]


def load() -> list[dict[str, Any]]:
    path = os.environ.get("STEPCACHE_GOLDEN")
    golden = json.loads(Path(path).read_text(encoding="utf-8")) if path else COMPACT
    return [dual_block(case) for case in golden["cases"] if case["mode"] in METHODS]


def dual_block(case: dict[str, Any]) -> dict[str, Any]:
    """The original's `rdt` is DBCache's threshold; the threshold beside it is of other modes. Others: unchanged."""
    if METHODS[case["mode"]] is not DBCache or "rdt" not in case["p"]:
        return case
    return case | {"p": {"Fn": case["p"]["Fn"], "Bn": case["p"]["Bn"], "threshold": case["p"]["rdt"]}}


CASES = {case["id"]: case for case in load()}
COMPACT_CASES = {case["id"]: case for case in COMPACT["cases"]}
SAME = [
    name
    for name, case in CASES.items()
    if name not in REFUSED and name not in DIFFERENT and "slg" not in case.get("scenario", {})
]


def inert(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The sampler of open-loop cases: asks at every sigma and moves nothing."""
    for sigma in sigmas[:-1]:
        model(x, sigma * x.new_ones(1))
    return x


def flow_euler_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, noise_sampler=None):
    """Ancestral Euler at eta = 1 on x = (1 - sigma) x0 + sigma noise: to sigma_down without noise, then noised back."""
    for here, there in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        denoised = model(x, here * x.new_ones(1))
        if there == 0:
            return denoised
        down = there * there / here
        keep = (1 - there) / (1 - down)
        x = keep * torch.lerp(denoised, x, down / here) + math.sqrt(there**2 - (keep * down) ** 2) * noise_sampler()
    return x


def flow_2s(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++(2S), eta = 0, on x = (1 - sigma) x0 + sigma noise: the midpoint is taken in log-SNR.

    At sigma = 1 log-SNR is infinite, so the step from there has one evaluation.
    """
    for step, (here, there) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        denoised = model(x, here * x.new_ones(1))
        callback({"i": step, "x": x, "denoised": denoised})
        if there == 0:
            return denoised
        if here < 1:
            middle = 1 / (1 + math.sqrt((1 / here - 1) * (1 / there - 1)))
            between = torch.lerp(denoised, x, middle / here)
            denoised = model(between, middle * x.new_ones(1))
        x = torch.lerp(denoised, x, there / here)
    return x


def res_2s(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """RES, second order, eta = 0: the exponential Runge-Kutta step with its node c2 at 1/2, in t = -ln sigma."""
    for step, (here, there) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        denoised = model(x, here * x.new_ones(1))
        callback({"i": step, "x": x, "denoised": denoised})
        if there == 0:
            return denoised
        h = math.log(here / there)
        phi1, phi1_middle = (1 - math.exp(-h)) / h, (1 - math.exp(-h / 2)) / (h / 2)
        b2 = 2 * (1 - phi1) / h
        toward = denoised - x
        middle = math.exp(-h / 2) * here
        toward_2 = model(x + h / 2 * phi1_middle * toward, middle * x.new_ones(1)) - x
        x = x + h * ((phi1 - b2) * toward + b2 * toward_2)
    return x


SAMPLERS: dict[str, tuple[str | Callable[..., Tensor], int, dict[str, Any]]] = {
    "euler": ("euler", 1, {}),
    "euler_a_eta1": ("euler_ancestral", 1, {"eta": 1.0}),
    "dpmpp2m": ("dpmpp_2m", 1, {}),
    "heun": ("heun", 2, {}),
    "dpm2": ("dpm_2", 2, {}),
    "dpmpp2s_a_eta0": ("dpmpp_2s_ancestral", 2, {"eta": 0.0}),
    "dpmpp2s_a_flow_eta0": (flow_2s, 2, {}),
    "res_2s_eta0": (res_2s, 2, {}),
}
"""The sampler of a case (k-diffusion's by name, or one that k-diffusion lacks), evaluations of a step, options."""


@dataclass
class Guided:
    """Classifier-free guidance around the cached model, as a case asks for it, with what its scenario changes."""

    cached: CachedDenoiser
    case: dict[str, Any]
    sigmas: Tensor
    evaluation: int = -1
    reports: list[Report] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        self.evaluation += 1
        scenario, cfg = self.case.get("scenario", {}), self.case["cfg"]
        never = len(self.sigmas) * 2
        if self.case["loop"] == "open":
            x = self.open_input(sigma).to(x.dtype)
        absent = scenario.get("un_gap0", never) <= self.evaluation < scenario.get("un_gap1", never)
        swapped = self.evaluation >= scenario.get("swap_at", never)
        cond = self.ask(x, sigma, "swapped" if swapped else "cond")
        uncond = self.ask(x, sigma, "uncond") if scenario.get("uncond", 1) and not absent else None
        if "img" in scenario:
            self.ask(x, sigma, "image")  # at image guidance 1 it cancels out of what is returned
        return cond if uncond is None else uncond + cfg * (cond - uncond)

    def open_input(self, sigma: Tensor) -> Tensor:
        """x from its closed form; at `freeze_at` the one before, from `resize_at` on a shorter one."""
        scenario, i = self.case.get("scenario", {}), self.evaluation
        if i == scenario.get("freeze_at"):
            return x_open(i - 1, float(self.sigmas[i - 1]))
        return x_open(i, float(sigma), scenario["resize_to"] if i >= scenario.get("resize_at", i + 1) else N)

    def ask(self, x: Tensor, sigma: Tensor, branch: str) -> Tensor:
        denoised = self.cached(x, sigma, branch=branch)
        if not self.reports or self.reports[-1] is not self.cached.report:
            self.reports.append(self.cached.report)
        return denoised

    def spoil(self, out: Tensor) -> None:
        scenario = self.case.get("scenario", {})
        if self.evaluation == scenario.get("nan_at"):
            out[0, 5] = math.nan
        if self.evaluation == scenario.get("zero_at"):
            out.zero_()


@dataclass
class Trace:
    """What happened: the reports, of one run or several, the calls that the network got, and the sampler's result."""

    reports: list[Report]
    calls: list[str]
    x: Tensor

    def decisions(self, *branches: str) -> str:
        events = (event for report in self.reports for event in report.events if event.branch in branches)
        return "".join("C" if event.computed else "S" for event in events)

    @property
    def dec(self) -> str:
        return self.decisions("cond", "swapped")

    @property
    def dec_un(self) -> str:
        return self.decisions("uncond")


def method_of(case: dict[str, Any], **common: Any) -> Method:
    """The case's method. Its threshold "inf" means the default; null stands for NaN."""
    options = {key: math.nan if value is None else value for key, value in case["p"].items()}
    if METHODS[case["mode"]] is DBCache:
        window = {"start": 0.15, "end": 0.95, "window": "steps"}
        return METHODS[case["mode"]](**options, **{"warmup": 0, "evaluations": "second", **window, **common})
    accepted = ("threshold", "start", "end") + (("decay", "relative", "reset") if case["mode"] == "ucache" else ())
    options = {key: float(options[key]) for key in accepted if options[key] != "inf"}
    for key in ("relative", "reset"):
        if key in options:
            options[key] = bool(options[key])
    return METHODS[case["mode"]](**options, **{"evaluations": "second", **common})


def follow(case: dict[str, Any], method: Method | None = None, dtype: torch.dtype = torch.float32) -> Trace:
    """Runs a case, by default with the method it names, through the k-diffusion adapter, everything in `dtype`."""
    model = MODELS[case["den"]]()
    sigmas = schedule(case["sched"], model)
    calls: list[str] = []
    network = Denoiser(model, calls)
    cached = CachedDenoiser(
        network,
        method_of(case) if method is None else method,
        branches=lambda x, sigma, branch: branch,
        scalings=model.scalings,
    )
    guided = Guided(cached, case, sigmas)
    network.spoil = guided.spoil
    x = x_open(0, float(sigmas[0])).to(dtype)
    sigmas = sigmas.to(dtype)
    sampler, stages, options = (inert, 1, {}) if case["loop"] == "open" else SAMPLERS[case["sampler"]]
    if case["sampler"] == "euler_a_eta1":
        drawn = itertools.count()
        options = options | {"noise_sampler": lambda *sigmas: noise(next(drawn)).to(dtype)}
        sampler = flow_euler_ancestral if model.scalings == "flow" else sampler
    if isinstance(sampler, str):
        x = sample(sampler, guided, x, sigmas, cache=cached, disable=True, **options)
    else:
        with cached.run(sigmas, stages):
            x = sampler(guided, x, sigmas, callback=cached.callback(), **options)
    return Trace(guided.reports, calls, x)


def figures(x: Tensor) -> list[float]:
    """Sum, sum of magnitudes and first three elements: what the original tells of its result."""
    x = x.double().flatten()
    return [float(x.sum()), float(x.abs().sum()), *x[:3].tolist()]


@pytest.mark.parametrize("name", SAME)
def test_every_decision_every_call_and_the_result_are_the_originals(name):
    case = CASES[name]
    trace = follow(case)
    assert trace.dec == case["dec"]
    assert trace.dec_un == case["dec_un"]
    assert len(trace.calls) == case["n_model"]
    if case["loop"] == "closed":
        assert figures(trace.x) == pytest.approx(case["xf"], rel=2e-5, abs=1e-5 * case["xf"][1])


WITH_COLUMNS = [name for name, case in COMPACT_CASES.items() if "col" in case]


@pytest.mark.parametrize("name", [name for name in WITH_COLUMNS if not name.startswith("cd/")])
def test_estimates_and_thresholds_are_the_originals(name):
    """The original's error is read after the evaluation, so it is 0 where a failed test has just reset it."""
    case = COMPACT_CASES[name]
    columns, default = case["col"], {"ucache": 1.0, "easycache": 0.2}[case["mode"]]
    fixed = default if case["p"]["threshold"] == "inf" else case["p"]["threshold"]
    resets = case["mode"] == "easycache" or case["p"]["reset"]
    events = [event for event in follow(case).reports[0].events if event.branch == "cond"]
    thresholds = columns.get("thr", [fixed] * len(events))
    asked = 0
    for event, error, threshold in zip(events, columns["err"], thresholds, strict=True):
        if event.estimate is None:
            continue
        asked += 1
        assert event.threshold == pytest.approx(threshold, rel=1e-4)
        if event.computed and resets:
            assert error == 0
            assert event.estimate >= event.threshold
        else:
            assert event.estimate == pytest.approx(error, rel=1e-4)
    assert asked > 0


@pytest.mark.parametrize("name", [name for name in WITH_COLUMNS if name.startswith("cd/")])
def test_the_relative_changes_of_skipped_evaluations_are_the_originals(name):
    """It keeps their sum. Fn and Bn only scale the threshold: by 1.00 at F8B0, by 0.5 at F8B20, which is the least."""
    case = COMPACT_CASES[name]
    events = [event for event in follow(dual_block(case)).reports[0].events if event.branch == "cond"]
    skipped = [0.0 if event.computed else event.estimate for event in events]
    assert list(itertools.accumulate(skipped)) == pytest.approx(case["col"]["err"], rel=1e-4)
    thresholds = {event.threshold for event in events if event.threshold is not None}
    assert thresholds == {case["p"]["threshold"] * (0.5 if case["p"]["Bn"] == 20 else 1)}


@pytest.mark.parametrize(
    ("option", "dec"),
    [
        ({"warmup": 20}, r"C{20}(S+C)+S+C{3}"),
        ({"max_cached": 3}, r"C{8}S{3}C{39}"),
        ({"max_consecutive": 2}, r"C{8}(S{2}C){13}C{3}"),
        ({"mask": "1" * 30 + "0" * 20}, r"C{30}(S+C)+S+C{3}"),
        ({"mask": "0" * 50, "policy": "static"}, r"C{7}S{40}C{3}"),
    ],
)
def test_warm_up_limits_mask_and_policy_act(option, dec):
    """Different on purpose: in the original all of them leave the decisions as they are."""
    case = CASES["cd/opt/max_cached_0"]
    assert case["dec"] == CASES["cd/opt/warmup_1000"]["dec"] == CASES["cd/opt/mask_all_cacheable_static"]["dec"]
    assert re.fullmatch(dec, follow(case, method_of(case, **option)).dec)
    assert not re.fullmatch(dec, case["dec"])


def test_what_is_not_finite_is_not_reused():
    """Different on purpose: the original adds the NaN of evaluation 9 to the input of evaluation 10."""
    case = CASES["cd/opt/nan_at_9"]
    assert case["dec"][8:12] == "SCSC"
    trace = follow(case)
    assert trace.dec[8:12] == "SCCS"
    assert [e.reason for e in trace.reports[0].events if e.branch == "cond"][10] == "prediction not finite"


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_negative_number_of_blocks_is_refused(name):
    """Different on purpose: the original takes it for 0."""
    with pytest.raises(OptionError, match=NEGATIVE[name]):
        method_of(CASES[name])


MARGINS = {torch.float64: 0.0, torch.float16: 0.03, torch.bfloat16: 0.15}
"""How near to its threshold an error may come for the decision to survive latents and sigmas rounded to a dtype."""


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(dtype, name) for dtype in MARGINS for name in SAME if CASES[name].get("margin", 1.0) > MARGINS[dtype]],
)
def test_decisions_do_not_depend_on_the_dtype(dtype, name):
    """Latents, what the network returns and sigmas are all of the dtype; the arithmetic is not."""
    case = CASES[name]
    trace = follow(case, dtype=dtype)
    assert trace.x.dtype == dtype
    assert (trace.dec, trace.dec_un) == (case["dec"], case["dec_un"])


def test_half_precision_latents_are_measured_in_float32():
    """At 262,144 elements a sum of magnitudes in float16 overflows."""
    case = CASES["uc/open/karras20/t1/d1/rel1/rst1/0-1"]
    case = case | {"sched": "karras10tail", "scenario": {"resize_at": 0, "resize_to": 1 << 18, "uncond": 0}}
    exact, half = follow(case), follow(case, dtype=torch.float16)
    assert half.dec == exact.dec == "CCSCSCSSCC"
    estimates = [[event.estimate for event in trace.reports[0].events if event.estimate] for trace in (half, exact)]
    assert estimates[0] == pytest.approx(estimates[1], rel=0.01)


@pytest.mark.parametrize(("name", "at"), [("uc/x/few_steps_8", 3), ("ec/x/few_steps_8", 4)])
def test_an_error_that_equals_the_threshold_is_computed(name, at):
    case = CASES[name]
    [event] = [e for e in follow(case).reports[0].events if e.position.step == at and e.branch == "cond"]
    assert case["dec"][at] == "S"
    share = event.threshold / case["p"]["threshold"]
    equal = case | {"p": case["p"] | {"threshold": event.estimate / share}}
    above = case | {"p": case["p"] | {"threshold": math.nextafter(event.estimate, math.inf) / share}}
    assert [follow(changed).dec[at] for changed in (equal, above)] == ["C", "S"]


def test_a_branch_that_was_absent_is_computed_not_served_from_its_old_cache():
    """Different on purpose: the original serves uncond at step 12 from step 6, past cond's computations at 8 and 11.

    A residual from another part of the run is no prediction. From there on the two trajectories differ.
    """
    case = CASES["uc/x/uncond_gap_stale"]
    trace = follow(case)
    assert case["dec"] == "CCCCCCCSCSSCSCSSSCSC"
    assert trace.dec == "CCCCCCCSCSSCSSCSSSCC"
    gap = case["scenario"]["un_gap1"] - case["scenario"]["un_gap0"]
    assert case["dec_un"][12 - gap] == "S"
    assert trace.dec_un == "CCCCCCCSCSCSSSCC"
    back = next(e for e in trace.reports[0].events if e.position.step == 12 and e.branch == "uncond")
    assert (back.computed, back.reason) == (True, "no cache yet")


def test_the_report_blames_missing_cache_only_where_cache_is_missing():
    """Branches in separate calls: where cond is computed because its test failed, that is why uncond is, too."""
    trace = follow(CASES["uc/x/uncond_gap_stale"])
    without = [e.position.step for e in trace.reports[0].events if e.branch == "uncond" and e.reason == "no cache yet"]
    assert without == [12]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("uc/x/resize_mid_run", "CCCCCSCSCS", "CCSCSCSSCC"),
        ("ec/x/resize_mid_run", "CCCCCCCCCCSSCSSCSSCS", "CCSSCSSCSSCSSCSSCSSCSSCSSCSSCC"),
    ],
)
def test_a_size_change_begins_with_a_clean_cache(name, before, after):
    """Different on purpose: the original compares the first elements of the two sizes and keeps its error and rate.

    Here the first two evaluations at the new size are computed, as at the beginning of any run: nothing is remembered,
    and no rate is known. The run and its steps go on, because it was announced.
    """
    case = CASES[name]
    trace = follow(case)
    change, n = case["scenario"]["resize_at"], len(case["dec"])
    assert case["dec"][:change] == before
    assert case["dec"][change:] != after
    [report] = trace.reports
    assert report.run == 0
    assert report.decisions("cond") == before + after
    cond = [event for event in report.events if event.branch == "cond"]
    assert [event.position.step for event in cond] == list(range(n))
    assert cond[change].reason == "no cache yet"
    assert (cond[change + 1].reason, cond[change + 1].estimate) == ("no estimate yet", None)
    assert report.scheduled_steps == report.steps == report.evaluations == n
    assert any("the cache was dropped" in note for note in report.notes)


def test_a_branch_of_another_size_gets_the_models_own_answer():
    """Different on purpose: where cond is skipped, the original answers an uncond of another size with no elements."""
    model = MODELS["compvis"]()
    sigmas, calls = schedule("karras20", model), []
    bare = Denoiser(model, calls)
    cached = CachedDenoiser(
        bare, UCache(threshold=100.0, start=0.0), branches=lambda x, sigma, branch: branch, scalings="eps"
    )
    with cached.run(sigmas, 1):
        for step in range(4):
            cond = cached(x_open(step, float(sigmas[step])), sigmas[step : step + 1], branch="cond")
        assert calls == ["cond"] * 2
        shorter = x_open(3, float(sigmas[3]), 192)
        uncond = cached(shorter, sigmas[3:4], branch="uncond")
    assert cond.shape == (1, 256)
    assert torch.equal(uncond, bare(shorter, sigmas[3:4], branch="uncond"))


@pytest.mark.parametrize(
    ("name", "ours", "calls"),
    [
        ("uc/x/sampler_dpm2", "CCCCCCCCSCSCSCSCSSCSSCSSSCSSSSCSSSSSSCC", 36),
        ("uc/x/sampler_res_2s_eta0", "CCCCCCCCSCSCSCSCSSCSSCSSSCSSSSCSSSSSSCC", 36),
        (
            "ec/x/sampler_heun",
            "CCCCCCCCCCCCCCCCCSSSSSSCSSSSSSSCSSSSSSSCSSSSSSSCSSSSSSCSSSSSCSSSSSCSSSSSCSSSSSCSSSSSCSSSSCSSSSSCCCC",
            64,
        ),
    ],
)
def test_both_evaluations_of_a_step_are_cached_by_default(name, ours, calls):
    """Different on purpose: the original never serves the first evaluation of a Heun, DPM2 or DPM++ 2S step.

    So it computes at least half of all evaluations. `evaluations="second"` is its rule and gives its decisions.

    UCache's threshold rises with the share of evaluations that were computed. With both evaluations of a step before
    it, that is a share of 2 n - 1 evaluations, 39 here; of n, it would be at its highest before half the run is over
    (and the row be CCCCCCCCSCSCSSCSSCSSSCSSSCSSSSCSSSSSSCC).
    """
    case = CASES[name]
    assert "S" not in case["dec"][::2]
    trace = follow(case, method_of(case, evaluations="all"))
    assert trace.dec == trace.dec_un == ours
    assert len(trace.calls) == calls < case["n_model"]


def test_the_published_rule_skips_second_evaluations_only():
    trace = follow(CASES["uc/x/sampler_dpm2"])
    assert {event.position.stage for event in trace.reports[0].events if not event.computed} == {1}


def test_ucache_is_accepted_whatever_the_family_of_the_model():
    """Different on purpose: told that the model is not a U-Net, the original refuses UCache and computes everything.

    The rule looks at inputs and outputs only, and a wrapper cannot know what is inside. Which is better for a model is
    for docs/measurements.md to say.
    """
    case = CASES["uc/x/wrong_model_family"]
    assert case["dec"] == "C" * 20
    assert follow(case).dec == "CCCCCCCSCSSCSSCSSSCC"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name_and_value(name):
    """Different on purpose: the original runs with a negative or NaN threshold, and drops the cache for a bad window.

    In all of these it computes everything, which is not what a user who chose a method asked for.
    """
    case = CASES[name]
    assert set(case["dec"]) == {"C"}
    with pytest.raises(OptionError) as refusal:
        method_of(case)
    assert str(refusal.value).startswith(REFUSED[name])


def test_a_branch_swapped_after_the_reference_was_chosen_is_computed_and_said_aloud():
    """The decisions are the original's, which says nothing: from the swap on it computes everything."""
    case = CASES["ec/x/cond_object_swapped_after_anchor"]
    with pytest.warns(UserWarning, match="branch 'swapped' is evaluated before the reference 'cond'"):
        trace = follow(case)
    assert trace.dec == case["dec"] == "C" * 50
    assert {event.reason for event in trace.reports[0].events if event.branch == "swapped"} == {
        "before the reference",
        "after window",
    }


def test_with_reset_0_and_decay_1_skipping_returns_only_when_the_threshold_rises():
    """The error only grows, but the effective threshold doubles once a fifth of the steps has been computed."""
    case = CASES["uc/closed/flow50/t1.5/d1/rel0/rst0/0-1"]
    assert case["dec"] == "CC" + "S" * 6 + "C" * 8 + "S" * 5 + "C" * 29
    trace = follow(case)
    assert trace.dec == case["dec"]
    events = [event for event in trace.reports[0].events if event.branch == "cond" and event.estimate is not None]
    estimates = [event.estimate for event in events]
    assert estimates == sorted(estimates)
    assert events[14].threshold / events[13].threshold == pytest.approx(1.9746, abs=1e-4)


def test_a_third_branch_follows_the_reference():
    for name in ("uc/x/img_uncond_third_condition", "ec/x/img_uncond_third_condition"):
        assert follow(CASES[name]).decisions("image") == CASES[name]["dec"]


def test_a_window_in_steps_covers_the_originals_steps():
    """Rows are [steps, start, end, first active step, first step after]; shares times steps is a float32 product."""
    for steps, start, end, first, after in TABLES["ucache_window"]:
        sigmas = tuple(float(steps - i) for i in range(steps + 1))
        answer = Window(start, end, "steps").begin(RunInfo(sigmas))
        active = [i for i in range(steps) if answer(Position(0, i, sigmas[i], i), SkipCounts()) is None]
        assert active == list(range(first, after)), (steps, start, end)


@pytest.mark.parametrize("key", TABLES["easycache_active"])
def test_a_window_of_the_training_timetable_covers_the_originals_steps(key):
    place, _, shares = key.partition("/")
    sched, _, den = place.partition("@")
    start, end = map(float, shares.split("-"))
    case = {"den": den, "sched": sched, "sampler": "euler", "loop": "open", "cfg": 3, "scenario": {"uncond": 0}}
    trace = follow(case, EasyCache(start=start, end=end))
    outside = ("before window", "after window")
    active = "".join("01"[event.reason not in outside] for event in trace.reports[0].events)
    assert active == TABLES["easycache_active"][key]


class Probe(Gate):
    """Lets everything through and shows what is known of the run."""

    def begin(self, run: RunInfo) -> Callable[..., None]:
        self.run = run
        return lambda position, counts: None


@pytest.mark.parametrize("den", TABLES["percent_to_sigma"])
def test_a_share_of_the_training_timetable_is_the_originals_sigma(den):
    """The largest float32 stands for infinity there. Shares outside 0 to 1, which it clamps, are refused here."""
    probe = Probe()
    case = {"den": den, "sched": "flow50", "sampler": "euler", "loop": "open", "cfg": 3, "scenario": {"uncond": 0}}
    follow(case, Method(gates=(probe,)))
    for share, sigma in TABLES["percent_to_sigma"][den]:
        if not 0 <= share <= 1:
            with pytest.raises(OptionError, match=rf"^start={share}: accepted is a number from 0 to 1$"):
                EasyCache(start=share)
            continue
        if share < 1:
            high = Window(share, 1.0, "training").place(probe.run)[0]
            assert high == (math.inf if share == 0 else pytest.approx(sigma, rel=1e-6))
        if share > 0:
            assert Window(0.0, share, "training").place(probe.run)[1] == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize(("steps", "factors"), TABLES["adaptive_threshold"])
def test_the_threshold_follows_how_many_evaluations_were_computed(steps, factors):
    """`factors[k]` after k computed evaluations of a run of n steps, one evaluation each, of which all are computed.

    To reach k = n, the walk goes back up once, to the second step, as a Restart interval does. Where a step has two
    evaluations, the original's rule sees one of them, and n stays the number of steps; test_rules has the rest.
    """

    def thresholds(**window: float) -> list[float]:
        model = MODELS["flow1"]()
        sigmas = torch.linspace(1, 0, steps + 1)
        cached = CachedDenoiser(
            Denoiser(model, []),
            UCache(threshold=1e-9, **window),
            branches=lambda x, sigma, branch: branch,
            scalings="flow",
        )
        asked = [*sigmas[: steps - 1], *sigmas[1:steps]]
        with cached.run(sigmas):
            for i, sigma in enumerate(asked):
                cached(x_open(i, float(sigma)), sigma.reshape(1), branch="cond")
        assert cached.report.calls == len(asked)
        return [event.threshold * 1e9 for event in cached.report.events if event.threshold is not None]

    assert thresholds(start=0.3)[0] == pytest.approx(factors[0])
    reached = thresholds(start=0.0, end=1.0)
    assert reached[:steps] == pytest.approx(factors[1:])
    assert reached[steps:] == pytest.approx([factors[-1]] * (len(reached) - steps))


def test_large_latents_are_summed_without_drift():
    """Different on purpose: the original adds up one by one in float32 and is 0.65 % off at 4.8 million elements."""
    elements, _, _, off = next(row for row in TABLES["float32_sequential_mean_abs"] if row[0] == 4838400)
    assert off == -0.00652272592
    x = torch.linspace(-1.6, 1.6, elements)
    assert float(mean_abs(x)) == pytest.approx(float(x.double().abs().mean()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 21, 90, 160), (2, 4, 64, 64), (3, 5, 7), (1,)])
def test_the_mean_of_a_change_is_exact_for_every_shape_and_dtype(shape, dtype):
    """Both ways of summing: in lines if the elements divide into some, else at once; and not contiguous."""
    a, b = (
        torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(k)).to(dtype) for k in (0, 1)
    )
    for x, y in ((a, b), (a[..., ::2], b[..., ::2])):
        exact = float((x.double() - y.double()).abs().mean())
        assert float(mean_abs_difference(x, y)) == pytest.approx(exact, rel=1e-6)
        assert float(mean_abs(x)) == pytest.approx(float(x.double().abs().mean()), rel=1e-6)
    y[0] = float("nan")
    assert math.isnan(mean_abs(y))
    assert math.isnan(mean_abs_difference(x, y))


def test_evidence_is_asked_only_inside_the_window():
    """Outside it nothing is measured for a decision: the first decision has no rate yet, and tells no estimate."""
    trace = follow(CASES["uc/x/range_.29-.58_n50"])
    cond = [event for event in trace.reports[0].events if event.branch == "cond"]
    assert [event.position.step for event in cond if event.threshold is not None] == list(range(14, 29))
    assert [event.position.step for event in cond if event.estimate is not None] == list(range(16, 29))
