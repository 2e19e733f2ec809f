"""What users do around a cached pipeline: offloading, LoRA, copies, compilation, callbacks, other caches, schedulers.

Everything on real pipeline classes with tiny random weights. A run is checked twice: by its image, bit for bit, and by
the forwards that were really made, counted in the class, below hooks, adapters and compilation.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, SD_BETAS, of_diffusers, run, sched
from tiny_pipelines import image as picture

from stepcache import EasyCache, FBCache, Method, Off, Static, StepMask, UCache
from stepcache.samplers.diffusers import SLOT, StepCacheCallback, attach

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers' on configurations without the newest keys
    pytest.mark.filterwarnings("ignore:.*(meshgrid|peft_config|ta>=t0)"),
]

CPU = torch.device("cpu")
MASK = Static("101001")
NEVER = [Off(), UCache(1e-9, start=0)]
"""The first leaves the denoiser alone, the second remembers everything; neither ever skips."""


class Forwards:
    """Counts the forwards of classes of denoisers, below anything that stands in an instance."""

    def __init__(self, monkeypatch) -> None:
        self._monkeypatch, self._watched = monkeypatch, set()
        self.calls = self.compiled = 0

    def watch(self, module: torch.nn.Module) -> None:
        kind = type(module)
        if kind in self._watched:
            return
        self._watched.add(kind)
        forward = kind.forward

        @functools.wraps(forward)
        def counting(module, *args, **kwargs):
            if not torch.compiler.is_compiling():
                self.calls += 1
            return forward(module, *args, **kwargs)

        self._monkeypatch.setattr(kind, "forward", counting)

    def backend(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        """`backend="eager"`, counting the runs of what it compiled."""

        def counting(*args):
            self.calls += 1
            self.compiled += 1
            return graph(*args)

        return counting

    def of(self, work: Callable) -> tuple[torch.Tensor, int]:
        self.calls = self.compiled = 0
        return work(), self.calls


class Host:
    """A tiny pipeline, and the images that one like it draws without a cache and with MASK."""

    def __init__(self, name: str, forwards: Forwards) -> None:
        self.tiny, self.forwards = PIPELINES[name], forwards
        self.name, self.pipe = name, self.build()

    @property
    def full(self) -> torch.Tensor:
        return images(self.name)[0]

    @property
    def cached(self) -> torch.Tensor:
        return images(self.name)[1]

    def build(self):
        pipe = self.tiny.build()
        self.forwards.watch(getattr(pipe, self.tiny.denoisers[0]))
        return pipe

    def run(self, pipe=None, **more) -> tuple[torch.Tensor, int]:
        """The image and its forwards."""
        pipe = pipe or self.pipe
        if more:
            return self.forwards.of(lambda: pipe(**{**self.tiny.call(pipe), **more})[0])
        return self.forwards.of(lambda: run(pipe, self.tiny))

    def bare(self, pipe=None) -> bool:
        image, calls = self.run(pipe)
        return calls == self.tiny.forwards and torch.equal(image, self.full)

    def skips(self, pipe=None) -> bool:
        image, calls = self.run(pipe)
        return calls == self.tiny.forwards // 2 and torch.equal(image, self.cached)


@functools.cache
def images(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    full = run(pipe, tiny)
    with attach(pipe, MASK):
        cached = run(pipe, tiny)
    assert not torch.equal(full, cached)
    return full, cached


@pytest.fixture
def forwards(monkeypatch):
    return Forwards(monkeypatch)


@pytest.fixture
def sd(forwards):
    return Host("sd", forwards)


# --- offloading ------------------------------------------------------------------------------------------------------


def model_offload(pipe, folder) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe, folder) -> None:
    """`enable_sequential_cpu_offload` without its "cpu:0", for which accelerate makes a plain tensor of a parameter."""
    for part in (pipe.unet, pipe.vae):
        accelerate.cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)


def hooked_offload(pipe, folder) -> None:
    accelerate.cpu_offload_with_hook(pipe.unet, CPU)


def aligning_hook(pipe, folder) -> None:
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(pipe.unet, hook)


def group_offload(pipe, folder) -> None:
    of_diffusers("hooks.apply_group_offloading")
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def block_offload(pipe, folder) -> None:
    of_diffusers("hooks.apply_group_offloading")
    pipe.unet.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def disk_offload(pipe, folder) -> None:
    of_diffusers("hooks.apply_group_offloading")(
        pipe.unet, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder)
    )


OFFLOADS = pytest.mark.parametrize(
    "offload",
    [model_offload, sequential_offload, hooked_offload, aligning_hook, group_offload, block_offload, disk_offload],
    ids=lambda offload: offload.__name__,
)


@OFFLOADS
def test_attaching_to_an_offloaded_denoiser_skips_and_leaves_it_offloaded(sd, offload, tmp_path):
    offload(sd.pipe, tmp_path)
    before = dict(sd.pipe.unet.__dict__)
    with attach(sd.pipe, MASK):
        pass
    assert list(sd.pipe.unet.__dict__) == list(before)
    assert all(sd.pipe.unet.__dict__[name] is value for name, value in before.items())
    with attach(sd.pipe, MASK):
        assert sd.skips()
        assert sd.skips()
    assert sd.pipe.unet.__dict__.keys() == before.keys()
    assert sd.bare()


@OFFLOADS
def test_offloading_while_attached_loses_neither_the_cache_nor_the_offloading(sd, offload, tmp_path):
    other = sd.build()
    offload(other, tmp_path / "other")
    assert sd.bare(other)
    with attach(sd.pipe, MASK):
        assert sd.skips()
        offload(sd.pipe, tmp_path / "this")
        assert sd.skips()
        assert sd.skips()
    assert sd.pipe.unet.__dict__.keys() == other.unet.__dict__.keys()
    assert sd.bare()


@pytest.mark.parametrize("offload", [sequential_offload, block_offload, disk_offload], ids=lambda o: o.__name__)
def test_a_forward_that_is_left_at_a_block_leaves_the_offloading_whole(sd, offload, tmp_path):
    method = FBCache(1e9, max_consecutive_cache_hits=1)
    with attach(sd.pipe, method) as cache:
        expected, _ = sd.run()
    assert cache.report.decisions("cond") == "CSCSCS"
    offload(sd.pipe, tmp_path)
    with attach(sd.pipe, method):
        assert torch.equal(sd.run()[0], expected)
    assert sd.bare()


def test_taking_offloading_away_while_attached_keeps_the_cache(sd, tmp_path):
    model_offload(sd.pipe, tmp_path)
    with attach(sd.pipe, MASK):
        assert sd.skips()
        sd.pipe.remove_all_hooks()
        assert not hasattr(sd.pipe.unet, "_hf_hook")
        assert sd.skips()
    assert sd.bare()


@pytest.mark.parametrize("offload", [model_offload, sequential_offload, group_offload], ids=lambda o: o.__name__)
def test_never_skipping_on_an_offloaded_denoiser_is_bit_identical(sd, offload, tmp_path):
    offload(sd.pipe, tmp_path)
    for method in NEVER:
        with attach(sd.pipe, method):
            assert sd.bare()


def test_a_skipped_evaluation_brings_no_weights(sd, monkeypatch, tmp_path):
    brought = []
    original = accelerate.hooks.CpuOffload.pre_forward

    def bringing(self, module, *args, **kwargs):
        brought.append(type(module))
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", bringing)
    model_offload(sd.pipe, tmp_path)
    with attach(sd.pipe, MASK):
        assert sd.skips()
    assert brought == 3 * [type(sd.pipe.unet)]


@pytest.mark.parametrize("offload", [model_offload, sequential_offload, disk_offload], ids=lambda o: o.__name__)
def test_the_callback_on_an_offloaded_denoiser(sd, offload, tmp_path):
    expected, _ = sd.run(callback_on_step_end=StepCacheCallback(MASK))
    pipe = sd.build()
    offload(pipe, tmp_path)
    for _ in range(2):
        image, calls = sd.run(pipe, callback_on_step_end=StepCacheCallback(MASK))
        assert calls == 4
        assert torch.equal(image, expected)
        assert SLOT not in pipe.unet.__dict__
    assert sd.bare(pipe)


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> list[Path]:
    """Two LoRAs of the tiny U-Net, saved as diffusers saves them."""
    peft = pytest.importorskip("peft")
    folders = []
    for seed in (1, 2):
        pipe = PIPELINES["sd"].build()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config)
        folders.append(tmp_path_factory.mktemp("lora"))
        pipe.save_lora_weights(folders[-1], unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    return folders


@pytest.fixture
def adapted(sd, loras):
    """A pipeline with both LoRAs, and what it draws with the first: without the cache and with it."""
    pipe = sd.build()
    for name, folder in zip("ab", loras, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters("a")
    full, _ = sd.run(pipe)
    with attach(pipe, MASK):
        cached, calls = sd.run(pipe)
    assert calls == 3
    assert not torch.equal(full, sd.full)
    return pipe, full, cached


@pytest.mark.parametrize("method", NEVER, ids=lambda m: m.name)
def test_never_skipping_under_a_lora_is_the_loras_image(sd, adapted, method):
    pipe, full, _ = adapted
    with attach(pipe, method):
        image, calls = sd.run(pipe)
    assert calls == 6
    assert torch.equal(image, full)


def test_a_lora_loaded_switched_and_unloaded_while_attached_is_that_of_a_pipeline_that_had_it(sd, adapted, loras):
    both, _, cached = adapted
    pipe = sd.pipe
    with attach(pipe, MASK):
        assert sd.skips()
        pipe.load_lora_weights(loras[0], adapter_name="a")
        assert run_equal(sd, pipe, cached, 3)
        pipe.load_lora_weights(loras[1], adapter_name="b")
        pipe.set_adapters(["a", "b"], [1.0, 0.5])
        mixed, calls = sd.run()
        assert calls == 3
        pipe.disable_lora()
        assert sd.skips()
        pipe.enable_lora()
        pipe.set_adapters("a")
        assert run_equal(sd, pipe, cached, 3)
        pipe.unload_lora_weights()
        assert sd.skips()
    both.set_adapters(["a", "b"], [1.0, 0.5])
    with attach(both, MASK):
        assert run_equal(sd, both, mixed, 3)
    assert SLOT not in pipe.unet.__dict__
    assert sd.bare()


def test_a_lora_fused_while_attached_is_in_the_image(sd, adapted):
    pipe, full, cached = adapted
    with attach(pipe, MASK):
        pipe.fuse_lora(adapter_names=["a"])
        image, calls = sd.run(pipe)
        assert calls == 3
        torch.testing.assert_close(image, cached, rtol=0, atol=1e-3)
        pipe.unfuse_lora()
    image, calls = sd.run(pipe)
    assert calls == 6
    torch.testing.assert_close(image, full, rtol=0, atol=1e-3)


def run_equal(host: Host, pipe, image: torch.Tensor, calls: int) -> bool:
    found, made = host.run(pipe)
    return made == calls and torch.equal(found, image)


def run_with(host: Host, callback, image: torch.Tensor, calls: int) -> bool:
    found, made = host.run(callback_on_step_end=callback)
    return made == calls and torch.equal(found, image)


# --- dtypes, saving, copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_to_another_dtype_before_or_while_attached_is_the_same(sd, dtype):
    before = sd.build().to(dtype)
    full, _ = sd.run(before)
    for method in NEVER:
        with attach(before, method):
            assert run_equal(sd, before, full, 6)
    with attach(before, MASK):
        cached, calls = sd.run(before)
    assert calls == 3
    assert cached.dtype == dtype
    with attach(sd.pipe, MASK):
        assert sd.skips()
        sd.pipe.to("cpu")
        sd.pipe.to(dtype)
        assert run_equal(sd, sd.pipe, cached, 3)
    assert run_equal(sd, sd.pipe, full, 6)


def test_what_is_saved_while_attached_has_no_trace_of_the_cache(sd, tmp_path):
    with attach(sd.pipe, MASK):
        assert sd.skips()
        sd.pipe.save_pretrained(tmp_path)
        absent = dict.fromkeys(("text_encoder", "tokenizer"))
        loaded = type(sd.pipe).from_pretrained(tmp_path, **absent)
        assert sd.skips()
    assert "progress_bar" not in loaded.__dict__
    assert SLOT not in loaded.unet.__dict__
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"stepcache" in path.read_bytes()]
    loaded.set_progress_bar_config(disable=True)
    assert sd.bare(loaded)


@pytest.mark.parametrize(
    ("ran", "bar"),
    [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ],
)
def test_a_copy_of_an_attached_pipeline_works_by_itself_without_a_cache(sd, ran, bar):
    sd.pipe.set_progress_bar_config(disable=not bar)
    with attach(sd.pipe, MASK) as cache:
        if ran:
            assert sd.skips()
        copied = copy.deepcopy(sd.pipe)
        events = len(cache.report.events)
        assert sd.bare(copied)
        assert len(cache.report.events) == events
        assert sd.skips()
        with attach(copied, MASK):
            assert sd.skips(copied)
            assert sd.skips()
    assert sd.bare()
    assert sd.bare(copied)


def test_a_copy_of_an_attached_pipeline_has_no_trace_of_the_cache(sd):
    with attach(sd.pipe, MASK):
        assert sd.skips()
        copied = copy.deepcopy(sd.pipe)
    assert copied.__dict__.keys() == sd.pipe.__dict__.keys()
    assert copied.unet.__dict__.keys() == sd.pipe.unet.__dict__.keys()


def test_a_copy_made_in_the_middle_of_a_run_works_by_itself_and_does_not_disturb_it(sd):
    copies = []

    def copying(pipe, step, timestep, kwargs):
        if step == 2:
            copies.append(copy.deepcopy(pipe))
        return kwargs

    with attach(sd.pipe, MASK):
        assert run_equal(sd, sd.pipe, sd.cached, 3)
        image, calls = sd.run(callback_on_step_end=copying)
    assert calls == 3
    assert torch.equal(image, sd.cached)
    image, calls = sd.run(callback_on_step_end=StepCacheCallback(MASK, also=copying))
    assert calls == 4
    assert len(copies) == 2
    for copied in copies:
        copied.scheduler = sd.build().scheduler
        assert sd.bare(copied)


# --- pipelines that share a denoiser ---------------------------------------------------------------------------------


def sharing(pipe, kind=None, scheduler: str | None = None):
    """Another pipeline on the same denoiser: with the same scheduler object, or with one of its own."""
    own = {} if scheduler is None else {"scheduler": sched(scheduler, **SD_BETAS)}
    other = (kind or type(pipe)).from_pipe(pipe, **own)
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet
    return other


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_a_pipeline_made_from_an_attached_one_is_cached_with_it(sd, kind):
    tiny = PIPELINES["sd-img2img" if kind == "Img2Img" else "sd-inpaint"]
    with attach(sd.pipe, Static("fast")) as cache:
        other = sharing(sd.pipe, getattr(diffusers, f"StableDiffusion{kind}Pipeline"))
        assert "progress_bar" not in other.__dict__
        image, calls = sd.forwards.of(lambda: run(other, tiny))
        cached, steps = sd.run()[1], cache.report.scheduled_steps
        assert (cached, steps) == (StepMask("fast").for_steps(6).count(1), 6)
        again, _ = sd.forwards.of(lambda: run(other, tiny))
        assert torch.equal(again, image)
        assert calls == StepMask("fast").for_steps(cache.report.scheduled_steps).count(1) < tiny.forwards
    full, calls = sd.forwards.of(lambda: run(other, tiny))
    assert calls == tiny.forwards
    assert not torch.equal(full, image)
    with attach(other, Static("fast")):
        assert torch.equal(run(other, tiny), image)
    for method in NEVER:
        with attach(sd.pipe, method):
            assert torch.equal(run(other, tiny), full)


def nothing(host: Host) -> None:
    pass


def a_run(host: Host) -> None:
    host.run()


def a_broken_run(host: Host) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        host.run(callback_on_step_end=broken)


def a_run_that_broke_with_a_callback(host: Host) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        host.run(callback_on_step_end=StepCacheCallback(MASK, also=broken))


def broken(pipe, step, timestep, kwargs):
    if step == 2:
        raise RuntimeError("stop")
    return kwargs


def interrupting(pipe, step, timestep, kwargs):
    if step == 2:
        pipe._interrupt = True
    return kwargs


@pytest.mark.parametrize(
    ("ours", "before"),
    [
        ("DDIM", nothing),
        ("EulerDiscrete", nothing),
        ("DDIM", a_run),
        ("EulerDiscrete", a_run),
        *[
            (ours, before)
            for before in (a_broken_run, a_run_that_broke_with_a_callback)
            for ours in ("DDIM", "EulerDiscrete")
        ],
    ],
)
def test_another_pipeline_with_its_own_scheduler_draws_as_alone_or_as_cached_for_itself(sd, ours, before):
    """The denoiser is shared, the attached pipeline does not run: nothing of its last run may answer for the other."""
    sd.pipe.scheduler = sched(ours, **SD_BETAS, steps_offset=1)
    other = sharing(sd.pipe, scheduler="DDIM")
    prompt = {"prompt_embeds": torch.ones(1, 5, 16)}
    full, _ = sd.run(other, **prompt)
    with attach(other, MASK):
        own, _ = sd.run(other, **prompt)
    with nullcontext() if before is a_run_that_broke_with_a_callback else attach(sd.pipe, MASK):
        before(sd)
        for _ in range(2):
            image, calls = sd.run(other, **prompt)
            assert calls == (6 if torch.equal(image, full) else 3)
            assert torch.equal(image, full) or torch.equal(image, own)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiling():
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    "name",
    ["flux", "sd"],
)
def test_an_optimized_module_in_the_pipeline_is_cached(forwards, name):
    host = Host(name, forwards)
    component = host.tiny.denoisers[0]
    optimized = torch.compile(getattr(host.pipe, component), backend=forwards.backend)
    setattr(host.pipe, component, optimized)
    before = dict(optimized.__dict__)
    assert host.bare()
    with attach(host.pipe, MASK):
        assert host.skips()
        assert forwards.compiled == 3
        assert SLOT not in optimized._orig_mod.__dict__
    for method in NEVER:
        with attach(host.pipe, method):
            assert host.bare()
            assert forwards.compiled == 6
    assert optimized.__dict__.keys() == before.keys()
    assert getattr(host.pipe, component) is optimized
    assert host.bare()


@pytest.mark.usefixtures("compiling")
def test_a_denoiser_compiled_in_place_is_cached_and_stays_compiled(sd):
    sd.pipe.unet.compile(backend=sd.forwards.backend)
    compiled = sd.pipe.unet.__dict__[SLOT]
    assert sd.bare()
    with attach(sd.pipe, MASK):
        assert sd.skips()
        assert sd.forwards.compiled == 3
        assert sd.bare(copy.deepcopy(sd.pipe))
        assert sd.forwards.compiled == 0  # as without the cache: torch leaves the compilation out of copies
    assert sd.pipe.unet.__dict__[SLOT] is compiled
    for method in NEVER:
        with attach(sd.pipe, method):
            assert sd.bare()
            assert sd.forwards.compiled == 6
    assert sd.bare()


@pytest.mark.usefixtures("compiling")
def test_compiling_while_attached_computes_everything_and_stays_when_the_cache_leaves(sd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(sd.pipe, MASK):
            assert sd.skips()
            sd.pipe.unet.compile(backend=sd.forwards.backend)
            compiled = sd.pipe.unet.__dict__[SLOT]
            assert sd.bare()
            assert not [w for w in caught if "took the place of the cache" in str(w.message)]
    assert len([w for w in caught if "took the place of the cache" in str(w.message)]) == 1
    assert sd.pipe.unet.__dict__[SLOT] is compiled
    with attach(sd.pipe, MASK):
        assert sd.skips()
        assert sd.forwards.compiled == 3
    assert sd.bare()
    assert sd.forwards.compiled == 6


@pytest.mark.usefixtures("compiling")
def test_compiling_around_an_attached_cache_is_noticed_and_skips_all_the_same(sd):
    with attach(sd.pipe, MASK) as cache:
        unet, sd.pipe.unet = sd.pipe.unet, torch.compile(sd.pipe.unet, backend=sd.forwards.backend)
        with pytest.warns(UserWarning, match=r"compile first, then attach, pipe\.unet\.compile\(\) before attach"):
            assert sd.skips()
        sd.pipe.unet = unet
        assert sd.forwards.compiled == 0
        assert any("compile first, then attach" in note for note in cache.report.notes)


# --- diffusers' own callbacks ----------------------------------------------------------------------------------------


def cutoff(name: str):
    """Guidance ends after the third step of six."""
    kind = getattr(diffusers.callbacks, {"sd": "SDCFGCutoffCallback", "sdxl": "SDXLCFGCutoffCallback"}[name])
    return kind(cutoff_step_ratio=None, cutoff_step_index=2)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("method", NEVER, ids=lambda m: m.name)
def test_guidance_that_ends_within_a_never_skipping_run_is_bit_identical(forwards, name, method):
    host = Host(name, forwards)
    ended, calls = host.run(callback_on_step_end=cutoff(name))
    assert calls == 6
    assert not torch.equal(ended, host.full)
    cache = StepCacheCallback(method, also=cutoff(name))
    image, calls = host.run(callback_on_step_end=cache, callback_on_step_end_tensor_inputs=cache.tensor_inputs)
    assert calls == 6
    assert torch.equal(image, ended)
    with attach(host.pipe, method):
        image, calls = host.run(callback_on_step_end=cutoff(name))
    assert calls == 6
    assert torch.equal(image, ended)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("way", ["also", "before", "after"])
def test_the_cache_and_a_callback_that_ends_guidance(forwards, name, way):
    """Through `also`, and through diffusers' MultiPipelineCallbacks, whose order does not matter."""
    host = Host(name, forwards)
    with attach(host.pipe, Static("111001")) as cache:
        expected, _ = host.run(callback_on_step_end=cutoff(name))
    assert (cache.report.decisions("cond"), cache.report.decisions("uncond")) == ("CCCSSC", "CCC")
    mine = StepCacheCallback(MASK, also=cutoff(name) if way == "also" else None)
    if way == "also":
        more = {"callback_on_step_end": mine, "callback_on_step_end_tensor_inputs": mine.tensor_inputs}
    else:
        both = [mine, cutoff(name)] if way == "before" else [cutoff(name), mine]
        more = {"callback_on_step_end": diffusers.callbacks.MultiPipelineCallbacks(both)}
    for _ in range(2):
        image, calls = host.run(**more)
        assert calls == 4
        assert (mine.report.decisions("cond"), mine.report.decisions("uncond")) == ("CCCSSC", "CCC")
        assert torch.equal(image, expected)
        assert SLOT not in host.pipe.unet.__dict__
    assert host.bare()


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_pipeline_callback_in_also_gets_the_tensors_it_asks_for(forwards, name):
    host = Host(name, forwards)
    ended, _ = host.run(callback_on_step_end=cutoff(name))
    image, _ = host.run(callback_on_step_end=StepCacheCallback(Off(), also=cutoff(name)))
    assert torch.equal(image, ended)


def test_a_pipeline_callback_without_tensors_in_also(sd, monkeypatch):
    scales = []
    monkeypatch.setattr(sd.pipe, "set_ip_adapter_scale", scales.append)
    callback = diffusers.callbacks.IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5)
    cache = StepCacheCallback(MASK, also=callback)
    image, calls = sd.run(callback_on_step_end=cache)
    assert scales == [0.0]
    assert calls == 4
    assert run_with(sd, StepCacheCallback(MASK), image, 4)


# --- diffusers' own caches -------------------------------------------------------------------------------------------


def first_block(pipe):
    return of_diffusers("hooks.FirstBlockCacheConfig")(threshold=0.5)


def mag(pipe):
    return of_diffusers("hooks.MagCacheConfig")(
        threshold=0.5, num_inference_steps=6, mag_ratios=torch.linspace(1.0, 0.9, 6)
    )


def taylor_seer(pipe):
    return of_diffusers("hooks.TaylorSeerCacheConfig")(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    )


ALL_TIMESTEPS = (-1, 2000)


def broadcast(pipe):
    ranges = {f"{kind}_attention_block_skip_range": 2 for kind in ("spatial", "temporal", "cross")}
    ranges |= {name.replace("block", "timestep"): ALL_TIMESTEPS for name in ranges}
    return of_diffusers("hooks.PyramidAttentionBroadcastConfig")(
        **ranges, current_timestep_callback=lambda: pipe.current_timestep
    )


def faster(pipe):
    return of_diffusers("hooks.FasterCacheConfig")(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=ALL_TIMESTEPS,
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=ALL_TIMESTEPS,
        attention_weight_callback=lambda module: 0.3,
        tensor_format="BFCHW",
        current_timestep_callback=lambda: pipe.current_timestep,
    )


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("flux", first_block),
        ("flux", mag),
        ("flux", taylor_seer),
        ("flux", broadcast),
        ("wan", mag),
        ("wan", broadcast),
        ("hunyuan-video", first_block),
        ("hunyuan-video", taylor_seer),
        ("cogvideox", faster),
        ("cogvideox", broadcast),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_another_cache_inside_works_as_alone_and_both_together_skip_exactly(forwards, name, config):
    host = Host(name, forwards)
    if not hasattr(host.pipe.transformer, "enable_cache"):
        pytest.skip("this diffusers has no caches of its own for it")
    host.pipe.transformer.enable_cache(config(host.pipe))
    inner, calls = host.run()
    assert not torch.equal(inner, host.full)  # it does something
    for method in NEVER:
        with attach(host.pipe, method):
            assert run_equal(host, host.pipe, inner, calls)
    with attach(host.pipe, MASK) as cache:
        both, made = host.run()
        assert made == calls // 2
        assert {cache.report.decisions(name) for name in cache.report.branches} == {"CSCSSC"}
        assert torch.isfinite(both).all()
        assert run_equal(host, host.pipe, both, made)
    assert run_equal(host, host.pipe, inner, calls)
    host.pipe.transformer.disable_cache()
    assert host.bare()


# --- runs that do not end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "PNDM"])
@pytest.mark.parametrize("ending", [broken, interrupting], ids=lambda ending: ending.__name__)
def test_after_a_run_that_was_not_finished_the_next_is_as_if_it_had_not_been(sd, ending, scheduler):
    def unfinished(callback):
        try:
            return sd.run(callback_on_step_end=callback)
        except RuntimeError as error:
            assert str(error) == "stop"  # noqa: PT017 - some endings raise, some do not
            return None

    sd.pipe.scheduler = sched(scheduler, **SD_BETAS, steps_offset=1)
    full, calls = sd.run()
    alone = unfinished(ending)
    callback = StepCacheCallback(Off(), also=ending)
    ended = unfinished(callback)
    assert (alone is None) == (ended is None)
    assert alone is None or (torch.equal(alone[0], ended[0]) and alone[1] == ended[1] == 3)
    assert run_equal(sd, sd.pipe, full, calls)

    callback = StepCacheCallback(Static("fast"), also=ending)
    unfinished(callback)
    assert SLOT in sd.pipe.unet.__dict__
    assert run_equal(sd, sd.pipe, full, calls)
    assert SLOT not in sd.pipe.unet.__dict__
    assert "progress_bar" not in sd.pipe.__dict__
    assert run_equal(sd, sd.pipe, full, calls)

    expected, made = sd.run(callback_on_step_end=StepCacheCallback(Static("fast")))
    assert made < calls
    unfinished(callback)
    assert run_with(sd, StepCacheCallback(Static("fast")), expected, made)  # another callback
    unfinished(callback)
    callback._also = None
    assert run_with(sd, callback, expected, made)  # the same one again

    with attach(sd.pipe, Static("fast")):
        expected, made = sd.run()
        unfinished(ending)
        assert run_equal(sd, sd.pipe, expected, made)
    assert run_equal(sd, sd.pipe, full, calls)


def test_attaching_after_a_callbacks_run_was_not_finished(sd):
    sd.run(callback_on_step_end=StepCacheCallback(MASK, also=interrupting))
    with attach(sd.pipe, MASK):
        assert sd.skips()
    assert SLOT not in sd.pipe.unet.__dict__
    assert sd.bare()


def test_an_exception_inside_the_denoiser_leaves_nothing(sd, monkeypatch):
    block = sd.pipe.unet.mid_block
    forward, calls = type(block).forward, []

    def failing(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("stop")
        return forward(self, *args, **kwargs)

    with attach(sd.pipe, MASK):
        monkeypatch.setattr(type(block), "forward", failing)
        with pytest.raises(RuntimeError, match="stop"):
            sd.run()
        assert sd.skips()
    assert sd.bare()


# --- runs that begin in the middle -----------------------------------------------------------------------------------

OPEN_LATE = Method(start=0.5, window="steps", name="always, from half of the run on")


def half_a_run(name: str, forwards: Forwards) -> tuple[Any, Callable]:
    """A pipeline that begins in the middle, and a run of twelve steps of which it makes six."""
    tiny = PIPELINES[name.replace("flux-img2img", "flux")]
    pipe = tiny.build()
    if name == "flux-img2img":
        pipe = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
        pipe.set_progress_bar_config(disable=True)
    if name.startswith("sd-"):
        pipe.scheduler = sched("EulerDiscrete", **SD_BETAS, steps_offset=1)
    forwards.watch(getattr(pipe, tiny.denoisers[0]))
    if "strength" not in inspect.signature(pipe.__call__).parameters:
        pytest.skip("this diffusers' pipeline always begins at the first step")
    more = {"image": picture(), "num_inference_steps": 12, "strength": 0.5}
    return pipe, lambda: forwards.of(lambda: pipe(**{**tiny.call(pipe), **more})[0])


@pytest.mark.parametrize("name", ["sd-img2img", "sdxl-img2img", "sd-inpaint", "flux-img2img", "flux-fill"])
def test_window_and_mask_are_of_the_steps_that_really_run(forwards, name):
    pipe, draw = half_a_run(name, forwards)
    full, calls = draw()
    assert calls == 6
    for method in NEVER:
        with attach(pipe, method):
            assert torch.equal(draw()[0], full)
    for method, decisions in [(OPEN_LATE, "CCCSSC"), (MASK, "CSCSSC")]:
        with attach(pipe, method) as cache:
            cached, calls = draw()
            assert torch.equal(draw()[0], cached)
        assert calls == decisions.count("C")
        assert {cache.report.decisions(branch) for branch in cache.report.branches} == {decisions}
        assert {event.position.step for event in cache.report.events} == set(range(6))
        assert cache.report.scheduled_steps == 6
        if method is OPEN_LATE:
            assert any("0.5 to 1 as shares of this run's 6 steps" in note for note in cache.report.notes)
    assert torch.equal(draw()[0], full)


@pytest.mark.parametrize(
    "scheduler",
    [
        "EulerDiscrete",
        "HeunDiscrete",
        "DPMSolverMultistep",
        "DDIM",
        "DDPM",
        "PNDM",
    ],
)
@pytest.mark.parametrize("steps", [6, 20])
def test_a_window_opens_and_closes_at_the_very_step(sd, scheduler, steps):
    sd.pipe.scheduler = sched(scheduler, **SD_BETAS)
    with attach(sd.pipe, OPEN_LATE) as cache:
        sd.run(num_inference_steps=steps)
    skipped = {event.position.step for event in cache.report.events if not event.computed and event.position.stage == 0}
    assert skipped == set(range(steps // 2, steps - 1))


@pytest.mark.parametrize("scheduler", ["HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"])
def test_img2img_with_two_calls_a_step_begins_with_a_whole_step(forwards, scheduler):
    host = Host("sd-img2img", forwards)
    pipe = host.pipe
    pipe.scheduler = sched(scheduler, **SD_BETAS)
    more = {"num_inference_steps": 8, "strength": 0.5}
    full, calls = host.run(**more)
    assert calls == 7
    with attach(pipe, NEVER[1]):
        assert torch.equal(host.run(**more)[0], full)
    with attach(pipe, Static("1010")) as cache:
        _, calls = host.run(**more)
    assert calls == 4
    assert cache.report.decisions("cond") == "CCSSCCS"
    assert places(cache.report) == [(k // 2, k % 2) for k in range(7)]
    assert cache.report.scheduled_steps == 4


def places(report) -> list[tuple[int, int]]:
    first = report.branches[0]
    return [(event.position.step, event.position.stage) for event in report.events if event.branch == first]


@pytest.mark.parametrize(
    ("skip_prk", "expected"),
    [
        (True, [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]),
        (False, [(i, s) for i in range(3) for s in range(4)] + [(3, 0)]),
    ],
)
def test_img2img_under_pndm_has_its_first_steps_where_the_run_begins(forwards, skip_prk, expected):
    """The default scheduler of Stable Diffusion 1.5."""
    host = Host("sd-img2img", forwards)
    host.pipe.scheduler = sched("PNDM", skip_prk_steps=skip_prk, **SD_BETAS)
    more = {"num_inference_steps": 8, "strength": 0.5}
    _, calls = host.run(**more)
    assert calls == len(expected)
    with attach(host.pipe, Static("fast")) as cache:
        host.run(**more)
    assert places(cache.report) == expected
    assert cache.report.scheduled_steps == 4


def test_a_refiner_runs_from_where_the_base_stopped(forwards):
    host = Host("sdxl-img2img", forwards)
    with attach(host.pipe, Static("101")) as cache:
        _, calls = host.run(denoising_start=0.5)
    assert calls == 2
    assert cache.report.decisions("cond") == "CSC"
    assert cache.report.scheduled_steps == 3


def test_a_base_model_that_stops_early_has_the_steps_that_it_runs(forwards):
    host = Host("sdxl", forwards)
    _, calls = host.run(denoising_end=0.5)
    assert calls == 3
    with attach(host.pipe, Static("101")) as cache:
        _, calls = host.run(denoising_end=0.5)
    assert calls == 2
    assert cache.report.scheduled_steps == 3


# --- schedulers ------------------------------------------------------------------------------------------------------

ONE = [(i, 0) for i in range(6)]
TWO = [(k // 2, k % 2) for k in range(11)]
PLMS = [(0, 0), (0, 1), *ONE[1:]]
PRK = [(i, s) for i in range(3) for s in range(4)] + ONE[3:]


@pytest.mark.parametrize(
    ("scheduler", "config", "expected"),
    [
        ("HeunDiscrete", {}, TWO),
        ("KDPM2Discrete", {}, TWO),
        ("KDPM2AncestralDiscrete", {}, TWO),
        ("DPMSolverSDE", {"noise_sampler_seed": 0}, TWO),
        ("FlowMatchHeunDiscrete", {}, TWO),
        ("PNDM", {"skip_prk_steps": True}, PLMS),
        ("PNDM", {"skip_prk_steps": False}, PRK),
        ("DPMSolverSinglestep", {"lower_order_final": True}, ONE),
        ("LMSDiscrete", {}, ONE),
    ],
)
def test_a_mask_is_over_steps_whatever_the_calls_of_a_step(forwards, scheduler, config, expected):
    if scheduler == "DPMSolverSDE":
        pytest.importorskip("torchsde")
    host = Host("sd3" if "Flow" in scheduler else "sd", forwards)
    host.pipe.scheduler = sched(scheduler, **config, **({} if "Flow" in scheduler else SD_BETAS))
    full, calls = host.run()
    assert calls == len(expected)
    for method in NEVER:
        with attach(host.pipe, method) as cache:
            assert run_equal(host, host.pipe, full, calls)
    assert places(cache.report) == expected
    decisions = "".join("C" if step in (0, 2, 5) else "S" for step, _ in expected)
    with attach(host.pipe, MASK) as cache:
        cached, made = host.run()
        assert run_equal(host, host.pipe, cached, made)
    assert made == decisions.count("C")
    assert cache.report.decisions("cond") == cache.report.decisions("uncond") == decisions
    assert places(cache.report) == expected
    assert (cache.report.steps, cache.report.scheduled_steps, cache.report.evaluations) == (6, 6, calls)
    assert run_equal(host, host.pipe, full, calls)

    callback = StepCacheCallback(MASK)
    _, made = host.run(callback_on_step_end=callback)
    assert places(callback.report) == expected
    assert made == callback.report.decisions("cond").count("C")
    assert SLOT not in getattr(host.pipe, host.tiny.denoisers[0]).__dict__
    assert run_equal(host, host.pipe, full, calls)


# --- pipelines without callback_on_step_end --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dit", "ldm", "consistency", "marigold"])
def test_a_pipeline_that_takes_no_callback_is_cached_by_attaching(forwards, name):
    host = Host(name, forwards)
    assert host.bare()
    for method in NEVER:
        with attach(host.pipe, method):
            assert host.bare()
    with attach(host.pipe, MASK) as cache:
        assert host.skips()
        assert host.skips()
    assert cache.report.decisions(cache.report.branches[-1]) == "CSCSSC"
    assert (cache.report.steps, cache.report.evaluations) == (6, 6)
    with attach(host.pipe, EasyCache(0.0)):
        assert host.bare()
    assert host.bare()


@pytest.fixture
def modular(forwards):
    """Flux from blocks: its components are attributes like any pipeline's, but it has no progress bar of its own."""
    pytest.importorskip("diffusers.modular_pipelines.flux")
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.flux import modular_blocks_flux as blocks

    names = {"text": "FluxTextInputStep", "before": "FluxBeforeDenoiseStep", "denoise": "FluxDenoiseStep"}
    pipe = SequentialPipelineBlocks.from_blocks_dict(
        {name: getattr(blocks, kind)() for name, kind in names.items()}
    ).init_pipeline()
    tiny = PIPELINES["flux"]
    parts = tiny.build()
    pipe.update_components(transformer=parts.transformer, scheduler=parts.scheduler)
    pipe.set_progress_bar_config(disable=True)
    forwards.watch(parts.transformer)

    def draw():
        given = {name: value for name, value in tiny.call(parts).items() if name != "output_type"}
        return forwards.of(lambda: pipe(**given, output="latents"))

    return pipe, draw


def test_a_modular_pipeline_is_cached_by_attaching(modular):
    pipe, draw = modular
    full, calls = draw()
    assert calls == 6
    for method in NEVER:
        with attach(pipe, method):
            image, calls = draw()
        assert calls == 6
        assert torch.equal(image, full)
    before = dict(pipe.__dict__)
    with attach(pipe, MASK) as cache:
        cached, calls = draw()
        again, _ = draw()
        copied = copy.deepcopy(pipe)
    assert calls == 3
    assert torch.equal(cached, again)
    assert not torch.equal(cached, full)
    assert cache.report.decisions("call") == "CSCSSC"
    assert cache.report.scheduled_steps == 6
    assert pipe.__dict__.keys() == before.keys() == copied.__dict__.keys()
    assert SLOT not in pipe.transformer.__dict__
    image, calls = draw()
    assert calls == 6
    assert torch.equal(image, full)
