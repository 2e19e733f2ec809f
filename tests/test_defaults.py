"""Whoever chooses nothing gets Forecast; and every example lets them choose."""

from __future__ import annotations

import diffusers
import pytest
import torch
from package import EXAMPLES

from stepcache import METHODS
from stepcache.samplers.k_diffusion import CachedDenoiser

SAMPLING = sorted(
    path.name for path in EXAMPLES.glob("*.py") if "--steps" in path.read_text() and "train" not in path.name
)
"""The examples that sample; `tiny_diffusers.py` has the command line of diffusers'."""

RUN = [name for name in SAMPLING if name != "tiny_diffusers.py"]
RUN += sorted(path.name for path in EXAMPLES.glob("diffusers_*.py"))
NO_WAN = pytest.mark.skipif(not hasattr(diffusers, "WanPipeline"), reason="Wan came with diffusers 0.33")
RUNNABLE = [pytest.param(name, marks=NO_WAN) if name == "diffusers_wan.py" else name for name in RUN]


def line(name: str) -> list[str]:
    return [] if name == "own_sampler.py" else ["--tiny", "--device=cpu"]


def test_the_examples_are_all_here():
    assert RUN == ["k_diffusion_sd.py", "own_sampler.py", "diffusers_flux.py", "diffusers_sdxl.py", "diffusers_wan.py"]


def test_a_denoiser_is_cached_by_forecast():
    cached = CachedDenoiser(lambda x, sigma: x)
    with cached.run([2.0, 1.0, 0.0]):
        cached(torch.ones(1, 1, 4, 4), torch.full((1,), 2.0))
    assert cached.report.method == "forecast"


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_example_takes_every_method_and_says_that_forecast_is_the_default(example, capsys, name):
    with pytest.raises(SystemExit) as ended:
        example(name, "--help")
    assert ended.value.code == 0
    said = "".join(capsys.readouterr().out.split())
    assert f"--method{{{','.join(METHODS)}}}" in said
    assert "(defaultforecast)" in said
    assert "--optionsOPTIONS" in said


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method=ucache", "--options=threshold=much"], "threshold='much': accepted is a number"),
        (["--options=intervals=3"], "unknown option 'intervals'. Did you mean 'interval'"),
        (["--method=magcache"], "magcache|ratios"),
    ],
    ids=["number", "name", "missing"],
)
def test_options_that_cannot_be_used_end_an_example_with_a_sentence(example, name, options, said):
    with pytest.raises(SystemExit, match=said):
        example(name, *line(name), *options)


@pytest.mark.parametrize("name", RUNNABLE)
def test_options_reach_the_method(example, capsys, tmp_path, name):
    out = [] if name == "own_sampler.py" else [f"--out={tmp_path / 'image.png'}"]
    example(name, *line(name), "--steps=9", "--options=interval=4", *out)
    assert "interval of 4" in capsys.readouterr().out
