"""SGLang-diffusion's plug-in: it is inert unless asked for, and each request's loop has a cache of its own."""

from __future__ import annotations

import logging

import pytest
import serving_engines
import torch

import stepcache
from stepcache.samplers import sglang
from stepcache.samplers.diffusers import SLOT

pytest.importorskip("diffusers")


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.delenv(sglang.METHOD, raising=False)
    monkeypatch.delenv(sglang.OPTIONS, raising=False)
    engine = serving_engines.sglang(monkeypatch)
    monkeypatch.setattr(
        engine.DenoisingStage, "_run_denoising_loop", engine.DenoisingStage._run_denoising_loop
    )  # put back after the test
    return engine


@pytest.fixture
def started(engine, monkeypatch):
    def start(method, options=""):
        monkeypatch.setenv(sglang.METHOD, method)
        monkeypatch.setenv(sglang.OPTIONS, options)
        sglang.register()
        engine.plugins.HookRegistry.apply_hooks()
        return engine.DenoisingStage()

    yield start
    engine.plugins.HookRegistry.reset()


def plain(steps, **keywords):
    return serving_engines.DenoisingStage().forward(steps, **keywords)


def test_without_the_variable_it_registers_nothing(engine):
    sglang.register()
    assert not engine.plugins.HookRegistry._hooks


@pytest.mark.parametrize("isolated", [False, True])
def test_the_mask_decides_which_calls_of_both_branches_are_made(started, isolated):
    stage = started("static", "mask=101010")
    stage.forward(6, isolated=isolated)
    assert stage.transformer.forwards == 6


def test_without_skips_the_image_is_the_stages_own(started):
    assert torch.equal(started("static", "mask=111111").forward(6), plain(6))


def test_requests_do_not_see_each_other_and_nothing_is_left(started):
    stage = started("forecast")
    alone = type(stage)().forward(12, seed=5)
    for steps in (20, 6, 12):
        stage.forward(steps, seed=1)
    stage.transformer.fail_at = stage.transformer.forwards + 4
    with pytest.raises(RuntimeError, match="out of memory"):
        stage.forward(12, seed=2)
    assert SLOT not in stage.transformer.__dict__
    before = stage.transformer.forwards
    assert torch.equal(stage.forward(12, seed=5), alone)
    assert stage.transformer.forwards - before < 24
    assert SLOT not in stage.transformer.__dict__


def test_a_warm_up_is_not_cached(started):
    stage = started("forecast")
    assert torch.equal(stage.forward(12, warmup=True), plain(12))
    assert stage.transformer.forwards == 24


def test_breakable_cuda_graphs_are_left_alone_with_a_warning(started, caplog):
    stage = started("forecast")
    stage.server_args.enable_breakable_cuda_graph = True
    with caplog.at_level(logging.WARNING):
        assert torch.equal(stage.forward(12), plain(12))
    assert "do not call the transformer" in caplog.text


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("forcast", "", "Did you mean 'forecast'"),
        ("forecast", "intervall=3", "intervall"),
        ("fbcache", "", "can skip nothing"),
        ("", "interval=3", sglang.METHOD),
    ],
)
def test_wrong_variables_are_refused_when_the_worker_starts(started, method, options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        started(method, options)


def test_ranks_that_split_a_call_decide_together(engine, monkeypatch):
    class Coordinator:
        device_group, world_size = "sequence", 2

    monkeypatch.setattr(engine.state, "get_sp_group", Coordinator)
    monkeypatch.setattr(engine.state, "get_cfg_group", Coordinator)
    assert sglang.image_ranks(stepcache.Forecast()) == ["sequence"]
    assert sglang.image_ranks(stepcache.UCache()) == ["sequence", "sequence"]
