"""A host in a dozen lines: examples/own_sampler.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from stepcache import Forecast, Off, Static
from stepcache.extend import Engine, Parametrization

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_sampler.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("own_sampler", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, method, calls: list | None = None):
    """Ten steps of v = x - t, noting the times at which the network runs."""

    def net(x, t):
        if calls is not None:
            calls.append(round(float(t), 6))
        return x - t

    engine = Engine(method, parametrization=Parametrization.flow)
    times = torch.linspace(1, 0, 11)
    return example.sample(net, torch.ones(2, 3), times, engine), engine.report


def test_off_is_the_loop_itself(example):
    bare = example.sample(lambda x, t: x - t, torch.ones(2, 3), torch.linspace(1, 0, 11))
    assert torch.equal(run(example, Off())[0], bare)


def test_a_mask_leaves_out_exactly_its_zeros(example):
    calls: list[float] = []
    _, report = run(example, Static("1001010101"), calls)
    assert report.decisions("v") == "CSSCSCSCSC"
    assert calls == [1.0, 0.7, 0.5, 0.3, 0.1]


def test_forecast_is_nearer_than_reuse_at_the_same_calls(example):
    """The derivative is nearly linear in the step; repeating the last residual is not."""
    full, _ = run(example, Off())
    mask = "1101010101"
    errors = [
        (run(example, method)[0] - full).abs().max()
        for method in (Static(mask, predictor=Forecast().predictor), Static(mask))
    ]
    assert errors[0] < 0.2 * errors[1]


def test_a_host_is_a_dozen_lines():
    """What a newcomer writes: the class without its docstring and blank lines, and two lines around the loop."""
    text = EXAMPLE.read_text(encoding="utf-8")
    body = text[text.index("class FlowCall") : text.index("@torch.no_grad()")].splitlines()
    assert len([line for line in body if line.strip() and not line.strip().startswith('"""')]) + 2 < 15
