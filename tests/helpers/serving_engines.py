"""vLLM-Omni and SGLang-diffusion as far as the plug-ins touch them, where the engines are not installed.

Both need an accelerator to be installed as a whole. The classes here have the names, signatures and order of calls of
vLLM-Omni 0.30.0 and SGLang 0.5.23; the pipelines keep to their denoising loops. If the engine's own module can be
imported, it is taken.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def not_set_up(*_: Any) -> Any:
    raise AssertionError("group is not initialized")


def provide(monkeypatch: Any, name: str, **contents: Any) -> ModuleType:
    """The module of that name, or one with these contents where there is none."""
    try:
        return import_module(name)
    except ImportError:
        pass
    parent = ""
    for part in name.split("."):
        full = f"{parent}.{part}".lstrip(".")
        if full not in sys.modules:
            module = ModuleType(full)
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, full, module)
            if parent:
                monkeypatch.setattr(sys.modules[parent], part, module, raising=False)
        parent = full
    vars(sys.modules[name]).update(contents)
    return sys.modules[name]


# vLLM-Omni


@dataclass
class DiffusionCacheConfig:
    """vLLM-Omni's configuration: fields of its own backends, and whatever else was given."""

    rel_l1_thresh: float | None = None
    max_warmup_steps: int = 4
    _extra_params: dict[str, Any] = field(default_factory=dict)


class CacheBackend(ABC):
    def __init__(self, config: Any) -> None:
        self.config, self.enabled = config, False

    @abstractmethod
    def enable(self, pipeline: Any) -> None: ...

    @abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None: ...

    def is_enabled(self) -> bool:
        return self.enabled


def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
    if cache_backend in ("step_cache", "stepcache"):
        return "vLLM-Omni's own"
    if cache_backend in (None, "none"):
        return None
    raise ValueError(f"Unsupported cache backend: {cache_backend}")


def vllm_omni(monkeypatch: Any) -> SimpleNamespace:
    """Its modules, by the names that the tests use."""
    getters = dict.fromkeys(("get_sp_group", "get_cfg_group", "get_pp_group"), not_set_up)
    base = provide(monkeypatch, "vllm_omni.diffusion.cache.base", CacheBackend=CacheBackend)
    data = provide(monkeypatch, "vllm_omni.diffusion.data", DiffusionCacheConfig=DiffusionCacheConfig)
    selector = provide(monkeypatch, "vllm_omni.diffusion.cache.selector", get_cache_backend=get_cache_backend)
    runner = provide(
        monkeypatch,
        "vllm_omni.diffusion.worker.diffusion_model_runner",
        get_cache_backend=selector.get_cache_backend,
    )
    monkeypatch.setattr(selector, "get_cache_backend", selector.get_cache_backend)  # put back after the test
    monkeypatch.setattr(runner, "get_cache_backend", selector.get_cache_backend)
    state = provide(monkeypatch, "vllm_omni.diffusion.distributed.parallel_state", **getters)
    provide(monkeypatch, "vllm.distributed.parallel_state", get_tp_group=not_set_up)
    return SimpleNamespace(base=base, data=data, selector=selector, runner=runner, state=state)


class Transformer(nn.Module):
    """A small flow network with the arguments that both engines use. `forwards` counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(8, 8, generator=generator) / 8**0.5, requires_grad=False)
        self.forwards, self.fail_at = 0, -1

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        self.forwards += 1
        if self.forwards == self.fail_at:
            raise RuntimeError("out of memory")
        return (torch.tanh(hidden_states @ self.mix + encoder_hidden_states) * (1 + timestep.reshape(-1, 1, 1)),)


def scheduler() -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


class OmniPipeline(nn.Module):
    """A pipeline as vLLM-Omni writes them: a module with the loop of QwenImagePipeline, guidance in separate calls."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.scheduler = Transformer(), scheduler()

    @torch.no_grad()
    def forward(self, steps: int, seed: int = 0, rows: int = 4, guided: bool = True) -> Tensor:
        latents = torch.randn(1, rows, 8, generator=torch.Generator().manual_seed(seed))
        prompt, negative = torch.full((1, 1, 8), 0.3), torch.full((1, 1, 8), -0.2)
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(0)
        return self.diffuse(latents, self.scheduler.timesteps, prompt, negative if guided else None)

    def diffuse(self, latents: Tensor, timesteps: Tensor, prompt: Tensor, negative: Tensor | None) -> Tensor:
        for t in timesteps:
            noise_pred = self.predict_noise(latents, t, prompt)
            if negative is not None:
                base = self.predict_noise(latents, t, negative)
                noise_pred = base + 2.0 * (noise_pred - base)
            latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
        return latents

    def predict_noise(self, latents: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        given = {"hidden_states": latents, "timestep": t.expand(1) / 1000, "encoder_hidden_states": prompt}
        return self.transformer(**given, return_dict=False)[0]


# SGLang-diffusion


class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """Only hooks of type AROUND."""

    _hooks: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType = HookType.AFTER, *, source: Any = None) -> None:
        assert hook_type is HookType.AROUND
        assert not isinstance(hook, type)
        cls._hooks[target] = hook

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook in cls._hooks.items():
            module, kind, name = target.rsplit(".", 2)
            owner = getattr(sys.modules[module], kind)
            setattr(owner, name, around(getattr(owner, name), hook))

    @classmethod
    def reset(cls) -> None:
        cls._hooks.clear()


def around(original: Any, hook: Any) -> Any:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


class DenoisingStage:
    """SGLang's stage, as far as its loop goes: the request's scheduler is a copy, and branches are called in a row."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2, self.scheduler = Transformer(), None, scheduler()
        self.server_args = SimpleNamespace(enable_breakable_cuda_graph=False)

    @torch.no_grad()
    def forward(self, steps: int, seed: int = 0, isolated: bool = False, warmup: bool = False) -> Tensor:
        own = scheduler() if isolated else self.scheduler
        own.set_timesteps(steps)
        latents = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))
        context = SimpleNamespace(scheduler=own, timesteps=own.timesteps, latents=latents, is_warmup=warmup)
        self._run_denoising_loop(context, None, self.server_args)
        return context.latents

    def _run_denoising_loop(
        self, ctx: Any, batch: Any, server_args: Any, *, collect_trajectory: bool = True
    ) -> torch.Tensor:
        ctx.scheduler._step_index = None
        ctx.scheduler.set_begin_index(0)
        for t in ctx.timesteps:
            predictions = [self._predict_noise(ctx.latents, t, torch.full((1, 1, 8), text)) for text in (0.3, -0.2)]
            noise_pred = predictions[1] + 2.0 * (predictions[0] - predictions[1])
            ctx.latents = ctx.scheduler.step(model_output=noise_pred, timestep=t, sample=ctx.latents)[0]
        return ctx.timesteps.cpu()

    def _predict_noise(self, latents: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return self.transformer(hidden_states=latents, timestep=t.expand(1) / 1000, encoder_hidden_states=prompt)[0]


def sglang(monkeypatch: Any) -> SimpleNamespace:
    """Its modules, by the names that the tests use. The stage is always the one above."""
    plugins = provide(
        monkeypatch, "sglang.multimodal_gen.runtime.platforms.plugins", HookRegistry=HookRegistry, HookType=HookType
    )
    kind = type("DenoisingStage", (DenoisingStage,), {"_run_denoising_loop": DenoisingStage._run_denoising_loop})
    stages = provide(monkeypatch, "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising")
    monkeypatch.setattr(stages, "DenoisingStage", kind, raising=False)
    getters = dict.fromkeys(("get_sp_group", "get_tp_group", "get_cfg_group"), not_set_up)
    state = provide(monkeypatch, "sglang.multimodal_gen.runtime.distributed.parallel_state", **getters)
    plugins.HookRegistry.reset()
    return SimpleNamespace(plugins=plugins, DenoisingStage=stages.DenoisingStage, state=state)
