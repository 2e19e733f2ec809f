"""Criteria that look inside a network: the forward is begun, and left where it need not go on.

`Stack` adds `plus[k]` times a number that the test sets to its input in block k, so what a block adds is known, and
every block counts how often it ran.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from toys import SIX, decisions, drive, filled, level, plain, reasons

from stepcache import CacheDiT, DBCache, FBCache, Method, OptionError, StepMask, TaylorSeerCache, UCache
from stepcache.extend import Blocks, Engine
from stepcache.probe import CONTAINERS
from stepcache.samplers.k_diffusion import CachedDenoiser, InTurn, sample

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks. looks at")


class LayerByLayer(nn.Module):
    """Runs the layers of its blocks itself, never the blocks, as ComfyUI's U-Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(nn.Sequential(Add(), Add()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.input_blocks:
            for layer in block:
                x = layer(x)
        return x


def test_a_block_whose_layers_are_run_one_by_one_is_seen() -> None:
    network, seen = LayerByLayer(), []
    answer = Blocks().find(network).call(lambda: network(filled(1.0)), lambda signal: seen.append(float(signal.mean())))
    assert seen == [2.0]
    assert answer is not None


class Add(nn.Module):
    """x + signal: what it adds is known. As a tuple, with a text stream before or behind, where asked."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form, self.ran, self.signal = form, 0, 1.0

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None):
        self.ran += 1
        out = hidden_states + self.signal
        if self.form == "tensor":
            return out
        text = encoder_hidden_states + 100.0 * self.ran
        return (out, text) if self.form == "image first" else (text, out)


class Stack(nn.Module):
    """denoised = 2 x behind `n` blocks, the first of which adds what `signals` says for each call."""

    def __init__(self, n: int = 4, container: str = "transformer_blocks", form: str = "tensor") -> None:
        super().__init__()
        setattr(self, container, nn.ModuleList(Add(form) for _ in range(n)))
        self.blocks_list = [getattr(self, container)]
        self.form, self.signals, self.calls = form, [], 0

    @property
    def ran(self) -> list[int]:
        return [block.ran for block in self.blocks_list[0]]

    def forward(self, x: Tensor, sigma: Tensor, **extra) -> Tensor:
        h, text = x, torch.zeros_like(x)
        for k, block in enumerate(self.blocks_list[0]):
            block.signal = self.signals[min(self.calls, len(self.signals) - 1)] if self.signals and k == 0 else 1.0
            out = block(h) if self.form == "tensor" else block(h, encoder_hidden_states=text)
            h, text = (out, text) if self.form == "tensor" else out if self.form == "image first" else out[::-1]
        self.calls += 1
        return 2 * x


def cached(model, method, **keywords) -> CachedDenoiser:
    return CachedDenoiser(model, method, scalings=plain, **keywords)


class Signals(Stack):
    """Adds in its first block what `signals` says for each evaluation, begun or gone through."""

    def forward(self, x: Tensor, sigma: Tensor, **extra) -> Tensor:
        self.begun = getattr(self, "begun", -1) + 1
        self.calls = self.begun
        return super().forward(x, sigma, **extra)


SIGNALS = [1.0, 1.1, 1.25, 1.35, 1.5, 1.55]
"""Relative to the last computed one at a threshold of 0.2: -, 0.1, 0.25, 0.08, 0.2, 0.033."""


def test_the_first_block_decides_and_the_rest_is_left_out():
    """Computed at 1.0, 1.25 and 1.5 (0.25 / 1.25 = 0.2 is not below 0.2); nothing is computed twice."""
    stack = Signals()
    stack.signals = SIGNALS
    model = cached(stack, FBCache(0.2))
    answers = drive(model, SIX[:6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert decisions(model) == "CSCSCS"
    assert stack.ran == [6, 3, 3, 3]
    assert answers == [2.0, 2 * 1 + (2 - 1), 6.0, 4 + 3, 10.0, 6 + 5]
    estimates = [event.estimate for event in model.report.events]
    assert estimates == [None, *(pytest.approx(d, abs=1e-6) for d in (0.1, 0.25, 0.08, 0.2, 0.05 / 1.5))]
    assert model.report.calls == 3


@pytest.mark.parametrize("form", ["image first", "text first"])
def test_of_two_streams_of_one_shape_the_image_is_found(form):
    stack = Signals(form=form)
    stack.signals = SIGNALS
    model = cached(stack, FBCache(0.2))
    drive(model, SIX[:6], 1.0)
    assert decisions(model) == "CSCSCS"


def test_nothing_is_left_behind_and_off_is_off():
    stack = Signals()
    modules = {name: type(module) for name, module in stack.named_modules()}
    dicts = {name: set(module.__dict__) for name, module in stack.named_modules()}
    stack.signals = [1.0]
    model = cached(stack, FBCache(0.2))
    drive(model, SIX[:6], 1.0)
    assert "S" in decisions(model)
    assert {name: type(module) for name, module in stack.named_modules()} == modules
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    for name, module in stack.named_modules():
        assert set(module.__dict__) - {"begun"} == dicts[name]
        assert not any(getattr(module, hook) for hook in hooks)
    off = cached(stack, FBCache())  # the published default of the threshold: 0, which disables it
    x = torch.randn(2, 1, 2, 2)
    assert torch.equal(off(x, level(5.0, 2)), stack(x, level(5.0, 2)))
    assert off.report.events[0].reason == "off"


def test_a_failing_model_leaves_no_hook_and_the_next_run_is_clean():
    stack = Signals()
    stack.signals = [1.0]
    model = cached(stack, FBCache(0.2))
    drive(model, SIX[:2], 1.0)

    def fail(*args):
        raise ValueError("no")

    handle = stack.transformer_blocks[2].register_forward_pre_hook(fail)
    stack.signals = [9.0]
    with pytest.raises(ValueError, match="no"):
        drive(model, SIX[2:3], 1.0)
    handle.remove()
    assert not stack.transformer_blocks[0]._forward_hooks
    drive(model, SIX[:2], 1.0)
    assert decisions(model) == "CS"


class Guided(nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.inner_model = inner

    def forward(self, x, sigma, **extra):
        both = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), **extra)
        return both.chunk(2)[1]


class PerRow(nn.Module):
    """What its only counted block adds differs between the two halves of the batch: uncond first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Add(), Add()])
        self.signals, self.begun = [], -1

    def forward(self, x, sigma, **extra):
        self.begun += 1
        uncond, cond = self.signals[self.begun]
        rows = torch.ones(len(x), *[1] * (x.ndim - 1))
        rows[: len(x) // 2], rows[len(x) // 2 :] = uncond, cond
        self.blocks[0].signal = rows
        for block in self.blocks:
            x = block(x)
        return 2 * x


def test_batched_branches_are_told_apart_and_cond_decides():
    network = PerRow()
    network.signals = [(1.0, 1.0), (9.0, 1.05), (1.0, 2.0)]
    cache = cached(network, FBCache(0.2), branches=("uncond", "cond"))
    drive(Guided(cache), SIX[:3], 1.0)
    assert decisions(cache, "cond") == decisions(cache, "uncond") == "CSC"
    each = PerRow()
    each.signals = network.signals
    cache = cached(each, FBCache(0.2), branches=("uncond", "cond"), decide="each")
    drive(Guided(cache), SIX[:3], 1.0)
    assert decisions(cache, "cond") == "CCC"  # uncond would compute


class Turns(nn.Module):
    """Two calls an evaluation: cond, then uncond, each with signals of its own."""

    def __init__(self, signals: dict[str, list[float]]) -> None:
        super().__init__()
        self.blocks, self.signals, self.count = nn.ModuleList([Add(), Add()]), signals, {"cond": 0, "uncond": 0}

    def forward(self, x, sigma, which, **extra):
        self.blocks[0].signal = self.signals[which][self.count[which]]
        self.count[which] += 1
        for block in self.blocks:
            x = block(x)
        return 2 * x


@pytest.mark.parametrize(
    ("decide", "uncond", "begun", "gone"),
    [("batch", "CSCS", 2, 2), ("each", "CCSC", 4, 3)],
)
def test_branches_in_separate_calls_have_signals_of_their_own(decide, uncond, begun, gone):
    """Where the reference decides, an uncond that follows a skip is not begun at all."""
    network = Turns({"cond": [1.0, 1.1, 2.0, 2.1], "uncond": [1.0, 3.0, 3.1, 9.0]})
    cache = cached(network, FBCache(0.2), branches=lambda x, sigma, which: which, decide=decide)
    for s in SIX[:4]:
        for which in ("cond", "uncond"):
            cache(filled(1.0), level(s), which=which)
    assert decisions(cache, "cond") == "CSCS"
    assert decisions(cache, "uncond") == uncond
    assert network.count == {"cond": 4, "uncond": begun}
    assert network.blocks[1].ran == 2 + gone


@pytest.mark.parametrize("container", CONTAINERS)
def test_blocks_are_found_in_the_usual_containers(container):
    stack = Stack(container=container)
    watch = Blocks().find(nn.ModuleDict({"outer": nn.ModuleDict({"diffusion_model": stack})}))
    first = getattr(stack, container)[1 if container == "input_blocks" else 0]
    assert watch.first is watch.last is first
    assert watch.label == f"the first 1 of {3 if container == 'input_blocks' else 4} blocks ({container})"


def test_the_outermost_lists_are_taken_in_the_order_in_which_they_run():
    class Flux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.single_transformer_blocks = nn.ModuleList(Add() for _ in range(3))
            self.transformer_blocks = nn.ModuleList(Stack(1, "blocks") for _ in range(2))

    flux = Flux()
    watch = Blocks(3).find(flux)
    assert watch.first is flux.transformer_blocks[0]
    assert watch.last is flux.single_transformer_blocks[0]


def test_fn_chooses_how_many_blocks_are_run():
    """What the first n add, together: with Fn = 3 the 1.0 of the two others damp the change of the first."""
    for n, expected, ran in ((1, "CCCCCC", [6, 6, 6, 6]), (3, "CSCSCS", [6, 6, 6, 3])):
        stack = Signals()
        stack.signals = [1.0, 1.25, 1.75, 2.25, 3.0, 3.5]
        model = cached(stack, DBCache(Fn=n, threshold=0.14, warmup=0))
        drive(model, SIX[:6], 1.0)
        assert decisions(model) == expected
        assert stack.ran == ran
    assert model.report.events[1].estimate == pytest.approx(0.25 / 3)


def test_more_blocks_than_there_are_leave_the_last_one_out_and_say_so():
    with pytest.warns(UserWarning, match="Stack has 4 blocks: looks at 3, not 8"):
        model = cached(Stack(), DBCache())
    drive(model, SIX[:2], 1.0)
    assert "looks at the first 3 of 4 blocks (transformer_blocks): run on skipped evaluations too" in model.report.notes


def test_a_block_by_name():
    stack = Stack()
    assert Blocks(name="transformer_blocks.2").find(stack).last is stack.transformer_blocks[2]
    assert Blocks(name="2").find(stack).last is stack.transformer_blocks[2]
    with pytest.raises(
        OptionError, match=r"unknown block of Stack 'transformer_block.2'. Did you mean 'transformer_blo"
    ):
        cached(stack, FBCache(0.1, block="transformer_block.2"))


def test_the_object_to_patch_is_the_part_that_has_the_blocks():
    """Two parts with blocks: by default the outermost is taken, or the one called diffusion_model."""
    model = nn.ModuleDict({"first": Stack(2, "blocks"), "second": Stack(3, "blocks")})
    assert Blocks(within="second").find(model).last is model["second"].blocks[0]
    model["diffusion_model"] = Stack(3, "blocks")
    assert Blocks().find(model).last is model["diffusion_model"].blocks[0]
    with pytest.raises(OptionError, match=r"unknown object_to_patch 'secnd'. Did you mean 'second'"):
        cached(model, FBCache(0.1, object_to_patch="secnd"))


def test_an_unsupported_model_is_named_with_what_was_looked_for():
    class Plain(nn.Module):
        def forward(self, x, sigma):
            return 2 * x

    with pytest.raises(
        OptionError, match=r"^Unsupported model Plain: .*transformer_blocks, .*input_blocks.*block='path"
    ):
        cached(Plain(), FBCache(0.1))
    with pytest.raises(OptionError, match=r"^Unsupported model function: it is no torch module"):
        CachedDenoiser(lambda x, sigma: 2 * x, FBCache(0.1), scalings=plain)
    model = cached(Plain(), DBCache(threshold=0.5, warmup=0))  # looks at the input there
    drive(model, SIX[:3], [1.0, 1.2, 2.0])
    assert decisions(model) == "CSC"
    assert "Plain has no blocks that are known: the criterion looks at the network's input" in model.report.notes


def test_blocks_left_out_where_it_decides_are_refused():
    stack = Signals()
    model = cached(stack, FBCache(0.2), branches=lambda x, sigma, which="cond", **extra: which)
    model(filled(1.0), level(10.0))
    model(filled(1.0), level(10.0), which="stg", skip_layer_mask=filled(1.0))
    with pytest.raises(OptionError, match=r"^STG is not supported with fbcache .*skip_layer_mask.*Turn it off"):
        model(filled(1.0), level(8.0), skip_layer_mask=filled(1.0))


class Shy(Signals):
    """Goes past its blocks at the third evaluation; from the fourth on they have twice the channels."""

    def forward(self, x, sigma):
        if getattr(self, "begun", -1) == 1:
            self.begun += 1
            return 2 * x
        super().forward(x.repeat(1, 2, 1, 1) if getattr(self, "begun", -1) >= 2 else x, sigma)
        return 2 * x


def test_an_invalid_cache_state_is_computed_and_heals():
    model = cached(Shy(), FBCache(0.2))
    answers = drive(model, SIX[:6], 1.0)
    assert decisions(model) == "CSCCSS"
    assert answers == [2.0] * 6
    assert reasons(model) == [
        "no cache yet",
        "below threshold",
        "invalid cache state",
        "no estimate yet",
        "below threshold",
        "below threshold",
    ]
    assert sum("invalid cache state" in note for note in model.report.notes) == 1


def test_another_shape_of_the_signal_is_an_invalid_state():
    class Wider(Signals):
        def forward(self, x, sigma):
            wide = getattr(self, "begun", -1) >= 1
            super().forward(x.repeat(1, 2, 1, 1) if wide else x, sigma)
            return 2 * x

    model = cached(Wider(), FBCache(0.2))
    drive(model, SIX[:4], 1.0)
    assert reasons(model) == ["no cache yet", "below threshold", "invalid cache state", "below threshold"]
    assert decisions(model) == "CSCS"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_signal_that_is_not_finite_is_computed(bad):
    stack = Signals()
    stack.signals = [1.0, 1.0, bad, 1.0, 1.0]
    model = cached(stack, FBCache(0.2))
    drive(model, SIX[:5], 1.0)
    assert decisions(model) == "CSCCS"
    assert reasons(model)[2:4] == ["invalid cache state", "invalid cache state"]


def test_a_block_that_changes_shape_shows_what_it_returns():
    class Down(nn.Module):
        def forward(self, hidden_states):
            return hidden_states[..., ::2, ::2], (hidden_states,)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_blocks = nn.ModuleList([Down(), Down()])

        def forward(self, x, sigma):
            self.down_blocks[0](x)
            return 2 * x

    model = cached(UNet(), FBCache(0.2))
    drive(model, SIX[:4], [1.0, 1.1, 1.3, 1.5])
    assert decisions(model) == "CSCS"
    assert [e.estimate for e in model.report.events[1:]] == [pytest.approx(d, abs=1e-6) for d in (0.1, 0.3, 0.2 / 1.3)]


def test_window_limits_and_zero_consecutive_hits_act():
    def trial(n=6, **options) -> str:
        stack = Signals()
        stack.signals = [1.0]
        model = cached(stack, FBCache(0.5, **options))
        with model.run(SIX, 1):
            drive(model, SIX[:n], 1.0)
        return decisions(model)

    assert trial() == "CSSSSS"
    assert trial(max_consecutive_cache_hits=1) == "CSCSCS"
    assert trial(max_consecutive_cache_hits=2) == "CSSCSS"
    assert trial(max_consecutive_cache_hits=0) == "CCCCCC"
    assert trial(start=0.5, window="steps") == "CCCCSC"  # open from step 3, whose signal is the first kept, to 4
    assert trial(end=0.5, window="steps") == "CSSCCC"


def test_options_under_their_other_names():
    assert FBCache(threshold=0.2) == FBCache(residual_diff_threshold=0.2) == FBCache(0.2)
    with pytest.raises(OptionError, match="given twice, under two names"):
        FBCache(threshold=0.2, residual_diff_threshold=0.2)
    one = DBCache(
        Fn_compute_blocks=4,
        residual_diff_threshold=0.12,
        max_warmup_steps=4,
        max_cached_steps=9,
        max_continuous_cached_steps=3,
        steps_computation_mask=[1, 0],
        steps_computation_policy="static",
    )
    other = DBCache(Fn=4, threshold=0.12, warmup=4, max_cached=9, max_consecutive=3, mask=StepMask([1, 0], "static"))
    assert one == other
    with pytest.raises(OptionError, match="Did you mean 'Fn_compute_blocks'"):
        DBCache(Fn_compute_block=4)
    with pytest.raises(OptionError, match=r"attach\(pipe, method, enable_separate_cfg=...\)"):
        DBCache(enable_separate_cfg=True)


def test_the_defaults_are_the_published_ones():
    rule = DBCache().criterion
    assert (rule.blocks.count, rule.blocks.after, rule.threshold, DBCache().warmup) == (8, 0, 0.08, 8)
    assert (DBCache().max_cached, DBCache().max_consecutive, DBCache().mask) == (-1, -1, None)
    node = FBCache()
    assert (node.criterion.threshold, node.start, node.end, node.max_consecutive) == (0.0, 0.0, 1.0, -1)
    assert node.criterion.blocks == Blocks(1, None, "diffusion_model")


@pytest.mark.parametrize(
    ("name", "mask", "threshold", "warmup", "fn"),
    [
        ("slow", "slow", 0.2, 8, 8),
        ("m", "medium", 0.25, 6, 8),
        ("f", "fast", 0.3, 6, 6),
        ("ultra", "ultra", 0.34, 4, 4),
    ],
)
def test_presets_are_a_mask_a_threshold_a_warm_up_and_fn(name, mask, threshold, warmup, fn):
    for method in (DBCache, CacheDiT, TaylorSeerCache):
        made = method(preset=name)
        assert made.mask == StepMask(mask)
        assert (made.criterion.threshold, made.warmup, made.criterion.blocks.count) == (threshold, warmup, fn)
    made = CacheDiT(2, preset=name, threshold=0.1, mask="slow")
    assert (made.mask, made.criterion.threshold, made.criterion.blocks.count) == (StepMask("slow"), 0.1, 2)
    assert DBCache(2, 0, 0.1, 4, name) == DBCache(2, 0, 0.1, 4, preset=name)
    assert DBCache(2, 0, 0.1, 4, name).mask == StepMask(mask)
    with pytest.raises(OptionError, match="unknown mask preset '5'"):
        DBCache(preset=5)


def test_a_policy_needs_a_mask():
    assert DBCache(mask="110", policy="static").mask == StepMask("110", "static")
    assert CacheDiT(preset="fast", policy="static").mask == StepMask("fast", "static")
    with pytest.raises(OptionError, match=r"give a mask or a preset"):
        DBCache(policy="static")
    with pytest.raises(OptionError, match=r"unknown policy 'statc'. Did you mean 'static'"):
        DBCache(policy="statc")


def test_a_static_mask_and_a_threshold_of_one_look_at_nothing():
    for method in (DBCache(mask="100000", policy="static", warmup=1), DBCache(threshold=1.0, warmup=1)):
        stack = Signals()
        stack.signals = [1.0, 50.0, 1.0, 50.0, 1.0, 50.0]
        model = cached(stack, method)
        with model.run(SIX, 1):
            drive(model, SIX[:6], 1.0)
        assert decisions(model) == "CSSSSS"
        assert stack.ran == [1, 1, 1, 1]


def _line(x: Tensor, sigma: Tensor) -> Tensor:
    return x + 10.0 - sigma.reshape(-1, 1, 1, 1)  # its residual grows by one where sigma falls by one


class Line(Signals):
    def forward(self, x, sigma):
        super().forward(x, sigma)
        return _line(x, sigma)


LEVEL = (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 0.0)


def test_dbcache_reuses_and_cache_dit_and_taylorseer_continue():
    """The residual is 1, 2, 3, ...: reuse after two computed evaluations stays at 2, the series goes on."""
    given = {"threshold": 0.5, "warmup": 2}
    for method, expected in ((DBCache, [2, 2, 2, 2]), (CacheDiT, [3, 4, 5, 6]), (TaylorSeerCache, [3, 4, 5, 6])):
        model = cached(Line(), method(**given))
        with model.run(LEVEL, 1):
            answers = drive(model, LEVEL[:6], 0.0)
        assert decisions(model) == "CCSSSS"
        assert answers == [1, 2, *expected]


def test_cache_dit_continues_the_residual_and_taylorseer_the_output():
    """At x = 0 in the computed evaluations and x = 10 in the skipped ones, only the residual takes the 10 along."""
    given = {"threshold": 0.5, "warmup": 2}
    for method, expected in ((CacheDiT, 13.0), (TaylorSeerCache, 3.0)):
        model = cached(Line(), method(**given))
        with model.run(LEVEL, 1):
            assert drive(model, LEVEL[:3], [0.0, 0.0, 10.0])[2] == expected


def test_the_order_of_the_series_acts():
    model = cached(Line(), CacheDiT(threshold=0.5, warmup=2, order=0))
    with model.run(LEVEL, 1):
        assert drive(model, LEVEL[:4], 0.0) == [1, 2, 2, 2]
    assert CacheDiT(taylorseer_order=2).predictor.order == TaylorSeerCache(max_order=2).predictor.order == 2


def test_taylorseer_at_an_interval_looks_at_no_block():
    stack = Line()
    model = cached(stack, TaylorSeerCache(cache_interval=3, warmup=2))
    with model.run(LEVEL, 1):
        answers = drive(model, LEVEL[:6], 0.0)
    assert decisions(model) == "CCSSCS"
    assert answers == [1, 2, 3, 4, 5, 6]
    assert stack.ran == [3, 3, 3, 3]


def test_bn_is_refused_with_its_remedy_and_scales_the_threshold_of_the_input():
    with pytest.raises(OptionError, match=r"^Bn=8: outside of Stack nothing .*stepcache\[cache-dit\].*Bn=0"):
        cached(Stack(), DBCache(Bn=8))
    assert DBCache(Bn=8).criterion.at_input == pytest.approx(0.76)
    assert DBCache(Fn=12).criterion.at_input == pytest.approx(1.08)


def test_compiled_models_are_refused_and_compiled_blocks_behind_it_are_not():
    stack = Signals()
    with pytest.raises(OptionError, match=r"^OptimizedModule is compiled .*compile only the blocks behind"):
        cached(torch.compile(stack, backend="eager"), FBCache(0.1))
    stack.compile(backend="eager")
    with pytest.raises(OptionError, match=r"^Signals is compiled"):
        cached(stack, FBCache(0.1))
    stack._compiled_call_impl = None
    for block in stack.transformer_blocks[1:]:
        block.compile(backend="eager")
    stack.signals = SIGNALS
    model = cached(stack, FBCache(0.2))
    drive(model, SIX[:6], 1.0)
    assert decisions(model) == "CSCSCS"
    stack.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(OptionError, match=r"^Add is compiled"):
        cached(stack, FBCache(0.1))


def test_a_wrapper_that_looks_at_blocks_can_be_copied_and_pickled():
    stack = Signals()
    stack.signals = SIGNALS
    model = cached(stack, FBCache(0.2), branches=("all",))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        drive(other, SIX[:6], 1.0)
        assert decisions(other, "all") == "CSCSCS"
        assert other.inner_model.ran == [6, 3, 3, 3]
    assert stack.ran == [0] * 4


def test_other_threads_do_not_trip_the_hook():
    """A call of the same model from elsewhere, while the block is watched, is neither looked at nor left."""
    import threading

    stack = Signals()
    stack.signals = [1.0]
    outcome = []

    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = stack

        def forward(self, x, sigma):
            thread = threading.Thread(target=lambda: outcome.append(stack(x, sigma)))
            thread.start()
            thread.join()
            return self.net(x, sigma)

    model = cached(Busy(), FBCache(0.2))
    drive(model, SIX[:3], 1.0)
    assert decisions(model) == "CSS"
    assert len(outcome) == 3


def test_one_transfer_a_decided_evaluation(monkeypatch):
    from stepcache.extend import DeferredScalars

    fetched = []
    fetch = DeferredScalars.fetch
    monkeypatch.setattr(DeferredScalars, "fetch", lambda self: (fetched.append(len(self._pending)), fetch(self)))
    stack = Signals()
    stack.signals = SIGNALS
    model = cached(stack, FBCache(0.2))
    drive(model, SIX[:6], 1.0)
    assert decisions(model) == "CSCSCS"
    assert len(fetched) == 5  # the first evaluation has nothing to decide


def test_the_signal_is_freed_with_the_run():
    import gc
    import weakref

    kept = []

    class Noting(Add):
        def forward(self, hidden_states):
            out = super().forward(hidden_states)
            kept.append(weakref.ref(out))
            return out

    stack = Signals()
    stack.transformer_blocks[0] = Noting()
    stack.signals = [1.0]
    model = cached(stack, FBCache(0.2))
    with model.run(SIX, 1):
        drive(model, SIX[:6], 1.0)
        rules = dict(model.engine.runs.current.rules)
    assert rules == {}
    gc.collect()
    assert all(one() is None for one in kept)


def test_a_engine_without_blocks_in_its_method_looks_at_none():
    assert Engine(UCache(), network=Stack())._planner.looks_inside is False
    assert Engine(Method(), network=Stack())._planner.looks_inside is False


def test_gradients_go_past_it():
    stack = Signals()
    stack.signals = [1.0]
    model = cached(stack, FBCache(0.2))
    drive(model, SIX[:2], 1.0)
    x = filled(1.0).requires_grad_()
    model(x, level(6.0)).sum().backward()
    assert x.grad.mean() == 2
    assert reasons(model)[-1] == "gradients are asked for"


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_under_k_diffusions_samplers_on_the_shipped_transformer(sampler):
    """Two of four blocks are run on a skip; the image is near the full one, and nothing is computed twice."""
    from stepcache.demo import sampling

    chosen = sampling.subject("dit")
    blocks = chosen.model.inner_model.net.transformer_blocks
    ran = [0] * len(blocks)
    handles = []
    for k, block in enumerate(blocks):

        def count(*args, k=k):
            ran[k] += 1

        handles.append(block.register_forward_pre_hook(count))
    full = chosen.sample(sampler, 8, None, [1, 2])
    asked = ran[0]
    assert ran == [asked] * 4
    ran[:] = [0] * 4
    cached_run = chosen.sample(sampler, 8, DBCache(Fn=2, threshold=0.3, warmup=2), [1, 2])
    for handle in handles:
        handle.remove()
    computed = cached_run.report.decisions("cond").count("C")
    assert ran == [asked, asked, computed, computed]
    assert computed < asked
    error = (cached_run.images - full.images).square().mean()
    assert 10 * torch.log10(4 / error) > 25


def test_interrupts_pass_through_and_a_leaving_of_another_watch_too():
    """Two caches around one model, both looking: each leaves at its own hook only."""
    stack = Signals()
    stack.signals = [1.0]
    inner = cached(stack, FBCache(0.2))
    outer = CachedDenoiser(inner, FBCache(0.2, block="transformer_blocks.1"), scalings=plain)
    drive(outer, SIX[:3], 1.0)
    assert decisions(inner) == "CSS"
    assert reasons(outer)[1:] == ["invalid cache state"] * 2  # the inner one leaves before the outer one's block
    stack = Signals()
    stack.signals = [1.0]
    later = cached(stack, FBCache(0.2, block="transformer_blocks.1"))
    outer = CachedDenoiser(later, FBCache(0.2, block="transformer_blocks.0"), scalings=plain)
    drive(outer, SIX[:3], 1.0)
    assert decisions(outer) == "CSS"
    assert stack.ran == [3, 1, 1, 1]

    stack.transformer_blocks[0].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        drive(later, SIX[:1], 1.0)


def test_in_turn_and_sample_go_with_it():
    network = Turns({"cond": [1.0] * 6, "uncond": [1.0] * 6})

    class Separate(nn.Module):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner_model = inner

        def forward(self, x, sigma):
            return self.inner_model(x, sigma, which="cond") + 0 * self.inner_model(x, sigma, which="uncond")

    cache = cached(network, FBCache(0.2), branches=InTurn("cond", "uncond"))
    sample("euler", Separate(cache), filled(1.0), torch.tensor(SIX), disable=True)
    assert decisions(cache, "cond") == decisions(cache, "uncond") == "CSSSSS"
    assert network.count == {"cond": 6, "uncond": 1}
