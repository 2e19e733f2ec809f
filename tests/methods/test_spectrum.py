"""Spectrum: decisions and predictions are those of the published implementation, traced in data/spectrum.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from closed_form import MODELS, Denoiser, schedule, x_open
from torch import Tensor
from toys import SIX, cached, drive, reasons

from stepcache import OptionError, Spectrum, method
from stepcache.extend import (
    Chebyshev,
    Position,
    RunInfo,
    SkipCounts,
    SpectrumCadence,
)
from stepcache.samplers.k_diffusion import CachedDenoiser, sample

SPECTRUM = json.loads((Path(__file__).parents[1] / "data" / "spectrum.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in SPECTRUM["cases"]}
REFUSED = {"sp/karras20/window_-1", "sp/karras20/window_0"}
SAMPLERS = {"euler": "euler", "heun": "heun", "dpm2": "dpm_2", "dpmpp2m": "dpmpp_2m"}


def follow(case: dict[str, Any]) -> tuple[CachedDenoiser, list[Tensor], list[str], Tensor]:
    """Runs a case of the original; also what was returned at every evaluation, and the network's calls."""
    model, calls, returned = MODELS[case["den"]](), [], []
    sigmas = schedule(case["sched"], model)
    network = Denoiser(model, calls)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        cond = network(x, sigma, "cond")
        if not case.get("scenario", {}).get("uncond", 1):
            return cond
        uncond = network(x, sigma, "uncond")
        return uncond + case["cfg"] * (cond - uncond)

    def seen(x: Tensor, sigma: Tensor) -> Tensor:
        returned.append(cache(x, sigma))
        return returned[-1]

    two = case["sampler"] in ("heun", "dpm2")
    options = case["p"] | ({"stop": case["p"]["stop"] / 2} if two else {})
    cache = CachedDenoiser(guided, Spectrum(**options, steps=50), scalings="denoised")
    x = sample(SAMPLERS[case["sampler"]], seen, x_open(0, float(sigmas[0])), sigmas, cache=cache, disable=True)
    return cache, returned, calls, x


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED and "lam_0" not in name])
def test_every_decision_and_every_prediction_of_spectrum_are_the_originals(name):
    """Around guidance, as there. With two evaluations a step the original stops at half the share that it is told."""
    case = CASES[name]
    cache, returned, calls, x = follow(case)
    assert cache.report.decisions("guided") == case["dec"]
    assert len(calls) == case["n_model"]
    sizes, firsts = case["col"]["oa"], case["col"]["o0"]
    assert [float(one.abs().sum()) for one in returned] == pytest.approx(sizes, rel=1e-4)
    assert [float(one[0, 0]) for one in returned] == pytest.approx(firsts, rel=1e-3, abs=1e-5 * max(sizes))
    total = case["xf"][1]
    assert [float(x.double().sum()), float(x.abs().sum())] == pytest.approx(case["xf"][:2], rel=1e-4, abs=1e-4 * total)


@pytest.mark.parametrize("name", ["sp/karras20/lam_0", "sp/flow50/lam_0"])
def test_without_a_ridge_the_originals_predictions_are_those_of_its_rounding(name):
    """Different on purpose: X'X of four neighbouring evaluations is singular in float32.

    The original then adds 1e-4 of the mean diagonal, or not, as its Cholesky factorization happens to end.
    """
    case = CASES[name]
    cache, returned, _, _ = follow(case)
    assert cache.report.decisions("guided") == case["dec"]
    assert [float(one.abs().sum()) for one in returned[:4]] == pytest.approx(case["col"]["oa"][:4], rel=1e-5)
    assert float(returned[4].abs().sum()) != pytest.approx(case["col"]["oa"][4], rel=1e-4)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_spectrum_refuses_a_window_that_cannot_be_meant(name):
    """Different on purpose: the original computes everything until such a window has grown to 2."""
    assert "S" not in CASES[name]["dec"][:8]
    with pytest.raises(OptionError, match=r"^window_size=-?\d: accepted is a number from 1 to 1000$"):
        Spectrum(**CASES[name]["p"])


def cadence(gate: SpectrumCadence, run: RunInfo, evaluations: int) -> str:
    answer, counts, letters = gate.begin(run), SkipCounts(), ""
    for n in range(evaluations):
        skip = answer(Position(0, n, 1.0), counts) is None
        letters += "CS"[skip]
        counts = SkipCounts(counts.computed + (not skip), counts.skipped + skip, counts.consecutive + 1 if skip else 0)
    return letters


def test_spectrums_cadence_is_the_originals():
    """Rows are [steps, window, flex, warm-up, letters], all with stop = 0.9."""
    for steps, window, flex, warmup, letters in SPECTRUM["tables"]["cadence"]:
        gate = SpectrumCadence(window, flex, warmup, 0.9)
        assert cadence(gate, RunInfo((1.0,) * (steps + 1)), steps) == letters, (steps, window, flex, warmup)


def test_spectrum_stops_at_a_share_of_the_evaluations_whatever_the_sampler():
    gate = SpectrumCadence(flex_window=0, stop=0.5)
    assert cadence(gate, RunInfo((1.0,) * 21), 20) == "CCCCSCSCSC" + "C" * 10
    assert cadence(gate, RunInfo((1.0,) * 11, stages=2), 19) == "CCCCSCSCSC" + "C" * 9


def test_spectrum_says_that_it_cannot_stop_without_a_schedule():
    run = RunInfo()
    assert cadence(SpectrumCadence(flex_window=0), run, 8) == "CCCCSCSC"
    assert run.warnings == ["stop=0.9 cannot act: this run's schedule is not known (pass sigmas=, or use sample())"]


def test_spectrum_by_name_and_with_other_gates():
    assert method("spectrum") == Spectrum()
    assert method("spectrum", "w=0.5,m=4,lam=0.1,flex_window=0.75,warmup=5,stop=1,steps=50").predictor == Chebyshev(
        0.5, 4, 0.1, 50
    )
    assert method("spectrum", "warmup=2,window_size=3").gates == (SpectrumCadence(3, 0.5, 2, 0.9),)
    model = cached(lambda x, sigma: 2 * x, Spectrum(warmup=0, flex_window=2, max_consecutive=1), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert reasons(model) == ["warm-up", "warm-up", "cadence", "max_consecutive", "cadence", "max_consecutive"]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("w", 2), ("m", 1.5), ("lam", -1), ("window_size", 0), ("flex_window", -1), ("warmup", 0.5), ("stop", 7)],
)
def test_spectrums_options_are_checked_by_name(name, bad):
    with pytest.raises(OptionError, match=f"^{name}="):
        Spectrum(**{name: bad})


def count(counts: SkipCounts, computed: bool) -> None:
    counts.computed += computed
    counts.skipped += not computed
    counts.consecutive = 0 if computed else counts.consecutive + 1
