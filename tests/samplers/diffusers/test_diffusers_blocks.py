"""First Block Cache and DBCache on real pipeline classes with tiny random weights."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from tiny_pipelines import PIPELINES, of_diffusers, run

from stepcache import CacheDiT, DBCache, FBCache, OptionError, attach, load_config
from stepcache.extend import Blocks, Interval
from stepcache.samplers.diffusers import StepCacheCallback

FIVE = ("cogview4", "hunyuan-video", "ltx", "wan", "flux")
THRESHOLDS = (0, 0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


def ran(pipe, name: str = "transformer") -> tuple[list[int], list]:
    """How often each of a denoiser's blocks is entered, from now on; and the hooks that count it."""
    module = getattr(pipe, name)
    from stepcache.probe import _listed

    _, _, blocks = _listed(module)
    counts, handles = [0] * len(blocks), []
    for k, block in enumerate(blocks):

        def count(*args, k=k):
            counts[k] += 1

        handles.append(block.register_forward_pre_hook(count))
    return counts, handles


ALTERNATE = FBCache(1e9, max_consecutive_cache_hits=1)
"""Every second evaluation is skipped, by the first block's word."""


@pytest.mark.parametrize(
    "name",
    ["sd", "sd-controlnet", "pix2pix", "sd-heun", "svd", "flux", "sd3", "hunyuan-dit", "mochi", "z-image", "ltx-2",
     "wan", "qwen-image", "cascade-prior", "hidream", "hunyuan-video-1.5", "kandinsky-5"],
)  # fmt: skip
def test_half_of_the_evaluations_are_left_after_the_first_block(name):
    """The reference's forward is begun at every evaluation, and goes on at every second one; nothing runs twice."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    (denoiser,) = tiny.denoisers
    counts, handles = ran(pipe, denoiser)
    full = run(pipe, tiny)
    calls = counts[0]
    before = {id(m): dict(m.__dict__) for m in getattr(pipe, denoiser).modules()}
    counts[:] = [0] * len(counts)
    with attach(pipe, ALTERNATE) as cache:
        first = run(pipe, tiny)
        begun, report = list(counts), cache.report
        assert torch.equal(run(pipe, tiny), first)
    for handle in handles:
        handle.remove()
    reference = "cond" if "cond" in report.branches else report.branches[0]
    decisions = report.decisions(reference)
    assert decisions == ("CS" * len(decisions))[: len(decisions)]
    evaluations = report.evaluations
    separate = calls // evaluations  # calls an evaluation; of these only the reference's is begun where it is skipped
    computed = decisions.count("C")
    assert begun[0] == computed * separate + (evaluations - computed)
    assert begun[-1] == (computed * separate if len(begun) > 1 else begun[0])
    assert not torch.equal(first, full)
    assert torch.isfinite(first).all()
    for module in getattr(pipe, denoiser).modules():
        assert module.__dict__.keys() == before[id(module)].keys()
        assert not module._forward_hooks
    assert torch.equal(run(pipe, tiny), full)


@pytest.mark.parametrize("name", FIVE)
def test_first_block_cache_config_is_accepted_at_the_documented_thresholds(name):
    """`FirstBlockCacheConfig(threshold=...)` as its announcement and its benchmarks use it, on their five models."""
    config = of_diffusers("hooks.FirstBlockCacheConfig")
    tiny = PIPELINES[name]
    pipe = tiny.build()
    full = run(pipe, tiny)
    for threshold in THRESHOLDS:
        with attach(pipe, config(threshold=threshold)) as cache:
            image = run(pipe, tiny)
        if threshold == 0:
            assert torch.equal(image, full)
            assert cache.report.skipped == 0
            continue
        asked = [e for e in cache.report.events if e.estimate is not None]
        assert asked
        assert all(e.computed == (e.estimate >= threshold) for e in asked)
        assert {e.threshold for e in asked} == {threshold}


def test_the_default_of_first_block_cache_config_is_diffusers_own():
    config = of_diffusers("hooks.FirstBlockCacheConfig")
    pipe = PIPELINES["flux"].build()
    with attach(pipe, config()) as cache:
        run(pipe, PIPELINES["flux"])
    assert {e.threshold for e in cache.report.events if e.threshold is not None} == {0.05}


@pytest.mark.parametrize("threshold", [0.45, 0.6, 0.8])
def test_the_first_decision_to_skip_is_diffusers_own(threshold):
    """Up to there both see the same numbers. Afterwards theirs runs the layers behind the blocks, ours does not."""
    config = of_diffusers("hooks.FirstBlockCacheConfig")
    tiny = PIPELINES["mochi"]  # two blocks: the second is left out, as ours leaves it out
    pipe = tiny.build()
    with attach(pipe, FBCache(threshold)) as cache:
        run(pipe, tiny)
    ours = cache.report.decisions("cond").index("S")
    tail, second = [], pipe.transformer.transformer_blocks[1]
    original = second.attn1.forward

    def noting(*args, **kwargs):
        tail.append(len(begun) - 1)
        return original(*args, **kwargs)

    begun, first = [], pipe.transformer.transformer_blocks[0].attn1
    first.register_forward_pre_hook(lambda *args: begun.append(1))
    second.attn1.forward = noting
    pipe.transformer.enable_cache(config(threshold=threshold))
    run(pipe, tiny)
    theirs = next(k for k in range(len(begun)) if k not in tail)
    assert ours == theirs


def test_the_callback_and_the_guidance_options_go_with_it():
    tiny = PIPELINES["wan"]
    pipe = tiny.build()
    cache = StepCacheCallback("fbcache", threshold=1e9, max_consecutive_cache_hits=1)
    pipe(**tiny.call(pipe), callback_on_step_end=cache)
    assert cache.report.decisions("cond") == "CCSCSC"
    counts, handles = ran(pipe)
    with attach(pipe, ALTERNATE, cfg_diff_compute_separate=True):
        run(pipe, tiny)
    assert counts[0] == 12  # each of both branches begins its own forward at every one of six steps
    for handle in handles:
        handle.remove()


def test_a_configuration_of_cache_dit_goes_to_attach():
    tiny = PIPELINES["wan"]
    pipe = tiny.build()
    fields = {
        "Fn_compute_blocks": 1,
        "residual_diff_threshold": 0.9,
        "max_warmup_steps": 2,
        "enable_separate_cfg": True,
    }
    with attach(pipe, **load_config(fields)) as cache:
        run(pipe, tiny)
    assert cache.report.decisions("cond")[:3] == "CCS"
    assert cache.report.method == "dbcache"


def test_an_unsupported_pipeline_is_refused_before_anything_is_attached():
    pipe = PIPELINES["flux"].build()
    pipe.transformer.transformer_blocks = torch.nn.ModuleDict()
    pipe.transformer.single_transformer_blocks = torch.nn.ModuleDict()
    with (
        pytest.raises(OptionError, match=r"^Unsupported model FluxTransformer2DModel: .*transformer_blocks"),
        attach(pipe, FBCache(0.1)),
    ):
        pass
    assert "_compiled_call_impl" not in pipe.transformer.__dict__


def deeper(name: str, blocks: int = 4):
    """A tiny pipeline whose transformer has so many blocks."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    for container in ("transformer_blocks", "single_transformer_blocks", "blocks"):
        listed = getattr(pipe.transformer, container, [])
        while 0 < len(listed) < blocks:
            listed.insert(0, copy.deepcopy(listed[0]))
    return tiny, pipe


def test_bn_without_cache_dit_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    _, pipe = deeper("flux")
    with pytest.raises(ImportError, match=r"pip install 'stepcache\[cache-dit\]'"), attach(pipe, DBCache(1, 1)):
        pass
    assert DBCache(1, 1).criterion.blocks == Blocks(1, required=False, after=1)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_cache_dit_runs_inside_and_steps_are_skipped_outside(name):
    """With Bn = 1: inside, blocks in the middle are left out at some calls; outside, whole steps by a static mask."""
    pytest.importorskip("cache_dit")
    tiny, pipe = deeper(name)
    counts, handles = ran(pipe)
    full = run(pipe, tiny)
    calls = counts[0]
    separate = calls // 6
    before = {id(m): m.__dict__.keys() for m in pipe.transformer.modules()}

    def trial(method):
        counts[:] = [0] * len(counts)
        with attach(pipe, method) as cache:
            image, report = run(pipe, tiny), cache.report
        assert {id(m): m.__dict__.keys() for m in pipe.transformer.modules()} == before
        return image, report, list(counts)

    options = {"threshold": 0.9, "warmup": 2}
    inside, report, entered = trial(DBCache(1, 1, **options))
    assert report.calls == report.evaluations * len(report.branches)
    assert "served its calls [2" in report.notes[-1]
    assert entered[0] == entered[-1] == calls > entered[1] == entered[2]

    both, report, entered = trial(DBCache(1, 1, **options, mask="111011", policy="static"))
    assert report.decisions(report.branches[0]) == "CCCSCC"
    assert entered[0] == calls - separate
    assert entered[1] < entered[0]
    assert "served its calls [2" in report.notes[-1]

    later = {**options, "max_consecutive": 1}
    series = [trial(method)[0] for method in (CacheDiT(1, 1, **later), DBCache(1, 1, **later))]
    masked, report, entered = trial(DBCache(1, 1, **options, mask="111101"))
    assert "served its calls [4]" in report.notes[-1]
    assert entered[1] == calls - separate
    images = [full, inside, both, *series, masked]
    assert [(j, k) for k, a in enumerate(images) for j, b in enumerate(images[:k]) if torch.equal(a, b)] == []
    assert torch.equal(run(pipe, tiny), full)
    for handle in handles:
        handle.remove()


def test_what_cannot_go_with_bn_is_refused():
    pytest.importorskip("cache_dit")
    tiny, pipe = deeper("flux")
    with pytest.raises(OptionError, match="cache-dit must know its digits"), attach(pipe, DBCache(1, 1, preset="fast")):
        pass
    with pytest.raises(OptionError, match=r"^Bn: .*use attach\(\)"):
        pipe(**tiny.call(pipe), callback_on_step_end=StepCacheCallback(DBCache(1, 1)))


@pytest.mark.parametrize(
    "option",
    [{"start": 0.5}, {"end": 0.5}, {"window": "steps"}, {"last_step": True}, {"evaluations": "second"},
     {"skip": "uncond"}, {"gates": (Interval(2),)}],
    ids=str,
)  # fmt: skip
def test_options_that_cache_dit_does_not_have_are_refused_with_bn(option):
    pytest.importorskip("cache_dit")
    _, pipe = deeper("flux")
    (name,) = option
    with (
        pytest.raises(OptionError, match=f"^{name}=.* with Bn: .* leave it out, or"),
        attach(pipe, DBCache(1, 1, **option)),
    ):
        pass


def test_an_attachment_that_fails_leaves_cache_dit_outside_too(monkeypatch):
    pytest.importorskip("cache_dit")
    tiny, pipe = deeper("flux")
    full, before = run(pipe, tiny), {id(m): m.__dict__.keys() for m in pipe.transformer.modules()}
    monkeypatch.setattr("stepcache.samplers.diffusers.patch.slot_is_called", lambda: False)
    with pytest.raises(RuntimeError, match="does not call"), attach(pipe, DBCache(1, 1, threshold=0.9, warmup=2)):
        pass
    assert {id(m): m.__dict__.keys() for m in pipe.transformer.modules()} == before
    assert torch.equal(run(pipe, tiny), full)
