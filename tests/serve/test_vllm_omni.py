"""vLLM-Omni's cache backend `forecast_cache`: its contract, and what it does in a denoising loop of vLLM-Omni's."""

from __future__ import annotations

import inspect

import pytest
import serving_engines
import torch

import stepcache
from stepcache.samplers import vllm_omni

pytest.importorskip("diffusers")

MASK = {"method": "static", "mask": "101010"}


@pytest.fixture
def omni(monkeypatch):
    vllm_omni.backend.cache_clear()
    yield serving_engines.vllm_omni(monkeypatch)
    vllm_omni.backend.cache_clear()


@pytest.fixture
def enabled(omni):
    def enable(pipe, **options):
        cache = vllm_omni.backend()(options)
        cache.enable(pipe)
        made.append(cache)
        return cache

    made = []
    yield enable
    for cache in made:
        cache.disable()


def test_it_is_a_cache_backend_with_the_contracts_signatures(omni):
    kind = vllm_omni.backend()
    assert issubclass(kind, omni.base.CacheBackend)
    assert not inspect.isabstract(kind)
    for name in ("enable", "refresh"):
        theirs, ours = (inspect.signature(getattr(one, name)).parameters for one in (omni.base.CacheBackend, kind))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
    assert not kind({}).is_enabled()


def test_registering_adds_one_name_and_leaves_the_others_their_own(omni):
    before = omni.selector.get_cache_backend("step_cache", {})
    vllm_omni.register()
    vllm_omni.register()
    config = omni.data.DiffusionCacheConfig(_extra_params={"interval": 3})
    for module in (omni.selector, omni.runner):  # the worker has imported the function by name
        chosen = module.get_cache_backend("forecast_cache", config)
        assert type(chosen) is vllm_omni.backend()
        assert chosen.config is config
        assert type(module.get_cache_backend("step_cache", {})) is type(before)
        assert module.get_cache_backend("none", config) is None
        with pytest.raises(ValueError, match="Unsupported cache backend"):
            module.get_cache_backend("forecast", config)


def test_a_vllm_omni_without_the_selection_is_left_alone_with_a_warning(omni, monkeypatch, caplog):
    monkeypatch.delattr(omni.selector, "get_cache_backend")
    vllm_omni.register()
    assert "forecast_cache is not available" in caplog.text


def test_the_mask_decides_which_calls_of_both_branches_are_made(enabled):
    pipe = serving_engines.OmniPipeline()
    cache = enabled(pipe, **MASK)
    assert cache.is_enabled()
    cache.refresh(pipe, 6)
    pipe(6)
    assert pipe.transformer.forwards == 6
    assert [cache.report.decisions(name) for name in ("cond", "uncond")] == ["CSCSCS", "CSCSCS"]


def test_options_come_from_what_the_user_wrote_and_not_from_other_backends_fields(omni):
    pipe = serving_engines.OmniPipeline()
    cache = vllm_omni.backend()(omni.data.DiffusionCacheConfig(_extra_params={"interval": 3}))
    cache.enable(pipe)
    pipe(20, guided=False)
    assert cache.report.method == stepcache.Forecast(3).name
    assert pipe.transformer.forwards == cache.report.calls < 10
    cache.disable()


def test_without_skips_the_image_is_the_pipelines_own(enabled):
    pipe, plain = serving_engines.OmniPipeline(), serving_engines.OmniPipeline()
    enabled(pipe, method="static", mask="111111")
    assert torch.equal(pipe(6), plain(6))


def test_a_request_is_as_it_is_alone_whatever_came_before(enabled):
    pipe = serving_engines.OmniPipeline()
    cache, alone = enabled(pipe), serving_engines.OmniPipeline()
    once = enabled(alone)
    once.refresh(alone, 12)
    wanted = alone(12, seed=5)
    for steps, seed, rows in ((20, 1, 4), (6, 2, 9), (12, 3, 4)):
        cache.refresh(pipe, steps)
        pipe(steps, seed=seed, rows=rows)
    pipe.transformer.fail_at = pipe.transformer.forwards + 4
    cache.refresh(pipe, 12)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe(12, seed=4)
    cache.refresh(pipe, 12, verbose=False)
    assert torch.equal(pipe(12, seed=5), wanted)
    assert cache.report.calls == once.report.calls


def test_refresh_drops_what_a_broken_off_request_has_cached(enabled):
    pipe = serving_engines.OmniPipeline()
    cache = enabled(pipe)
    engine = cache._attachment._denoisers["transformer"].engine
    pipe.transformer.fail_at = 7
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe(12)
    cache.refresh(pipe, 12)
    assert engine.runs.current is None
    assert not engine.runs.clock.announced
    assert cache._attachment._runs["scheduler"]._set is None


def test_disabled_it_leaves_nothing(enabled):
    pipe = serving_engines.OmniPipeline()
    before = {**pipe.transformer.__dict__}
    cache = enabled(pipe)
    pipe(6)
    cache.disable()
    assert not cache.is_enabled()
    assert {**pipe.transformer.__dict__} == before | {"forwards": pipe.transformer.forwards}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"methd": "forecast"}, "unknown option 'methd'"),
        ({"method": "forcast"}, "Did you mean 'forecast'"),
        ({"interval": 0}, "interval=0"),
        ({"method": "fbcache"}, "can skip nothing"),
    ],
)
def test_wrong_options_are_refused_when_the_worker_starts(omni, options, sentence):
    with pytest.raises(stepcache.OptionError, match=sentence):
        vllm_omni.backend()(options).enable(serving_engines.OmniPipeline())


def test_a_backend_serves_one_pipeline_and_is_enabled_first(omni, enabled):
    pipe = serving_engines.OmniPipeline()
    with pytest.raises(stepcache.OptionError, match="enable"):
        vllm_omni.backend()({}).refresh(pipe, 6)
    cache = enabled(pipe)
    with pytest.raises(stepcache.OptionError, match="enabled already"):
        cache.enable(pipe)


class Coordinator:
    def __init__(self, name: str, world_size: int = 2) -> None:
        self.device_group, self.world_size = name, world_size


def test_ranks_that_split_a_call_decide_together_and_pipeline_stages_are_refused(omni, monkeypatch):
    monkeypatch.setattr(omni.state, "get_sp_group", lambda: Coordinator("sequence"))
    monkeypatch.setattr(omni.state, "get_cfg_group", lambda: Coordinator("guidance"))
    assert vllm_omni.image_ranks(stepcache.Forecast()) == ["sequence"]
    assert vllm_omni.image_ranks(stepcache.UCache()) == ["sequence", "guidance"]
    monkeypatch.setattr(omni.state, "get_sp_group", lambda: Coordinator("sequence", 1))
    assert vllm_omni.image_ranks(stepcache.Forecast()) == []
    monkeypatch.setattr(omni.state, "get_pp_group", lambda: Coordinator("stages"))
    with pytest.raises(stepcache.OptionError, match="pipeline parallelism"):
        vllm_omni.backend()({}).enable(serving_engines.OmniPipeline())
