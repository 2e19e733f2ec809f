"""A double of ComfyUI's contract (0.3.64, commit a125cd84), as far as the adapter meets it, on a small network.

Written from how ComfyUI behaves, for CI: the order of wrappers, branches with a uuid that lasts a run, branches
left out as None, branches with a time of their own, batched last first, ControlNets asked before the network,
windows, options deep-copied with the model. Samplers are k-diffusion's.
"""

from __future__ import annotations

import copy
import math
import types
import uuid
from collections.abc import Callable
from typing import Any

import k_diffusion.sampling as k_sampling
import torch
from torch import Tensor, nn

KINDS = ("outer_sample", "predict_noise", "calc_cond_batch")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.tanh(self.conv(x))


class Network(nn.Module):
    """Latent, log sigma and prompt, through three blocks. Counts the rows of every forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.told, self.time = nn.Linear(16, 8), nn.Linear(1, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        told = self.told(context.mean(1)) + self.time(t[:, None])
        h = self.first(x) + told[:, :, None, None]
        for block in self.blocks:
            h = block(h)
        return self.last(h)


class Sampling(nn.Module):
    """`model_sampling` of an eps, a v or a flow model."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        cumulated = (1 - betas).cumprod(0)
        table = torch.arange(1, 1001) / 1000 if kind == "flow" else ((1 - cumulated) / cumulated).sqrt()
        self.register_buffer("sigmas", table.float())

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    def percent_to_sigma(self, share: float) -> float:
        if share <= 0:
            return 1.0 if self.kind == "flow" else 999999999.9
        return 0.0 if share >= 1 else float(self.sigmas[round((1 - share) * 999)])

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        s = sigma.view(-1, *(1 for _ in x.shape[1:]))
        return x if self.kind == "flow" else x / (s**2 + 1) ** 0.5

    def calculate_denoised(self, sigma: Tensor, out: Tensor, x: Tensor) -> Tensor:
        s = sigma.view(-1, *(1 for _ in x.shape[1:]))
        if self.kind == "v":
            return x / (s**2 + 1) - out * s / (s**2 + 1) ** 0.5
        return x - out * s


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.diffusion_model, self.model_sampling = Network(), Sampling(kind)

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, **more: Any) -> Tensor:
        out = self.diffusion_model(self.model_sampling.calculate_input(t, x), t.log(), c_crossattn)
        return self.model_sampling.calculate_denoised(t, out, x)


class Patcher:
    def __init__(self, model: Model) -> None:
        self.model, self.model_options = model, {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}

    def clone(self) -> Patcher:
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(w) for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Callable]:
        return self.wrappers.get(kind, {}).get(key, [])


class Executor:
    """The chain of wrappers around one of the host's functions; the first added is the outermost."""

    def __init__(self, function: Callable, wrappers: list[Callable], class_obj: Any = None) -> None:
        self.function, self.wrappers, self.class_obj = function, wrappers, class_obj

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if not self.wrappers:
            return self.function(*args, **keywords)
        return self.wrappers[0](Executor(self.function, self.wrappers[1:], self.class_obj), *args, **keywords)


def wrappers_of(kind: str, options: dict[str, Any]) -> list[Callable]:
    return [w for kept in options["transformer_options"].get("wrappers", {}).get(kind, {}).values() for w in kept]


def calc_cond_batch(model: Model, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Through the window handler, if there is one, and the wrappers."""

    def wrapped(*args: Any) -> list[Tensor]:
        return Executor(_calc_cond_batch, wrappers_of("calc_cond_batch", options))(*args)

    length = options.get("context_length")
    if length is None or x.shape[-1] <= length:
        return wrapped(model, conds, x, timestep, options)
    parts = []
    for start in range(0, x.shape[-1], length):
        columns = list(range(start, min(start + length, x.shape[-1])))
        options["transformer_options"]["context_window"] = types.SimpleNamespace(index_list=columns)
        copies = [None if cond is None else [entry.copy() for entry in cond] for cond in conds]
        parts.append(wrapped(model, copies, x[..., columns], timestep, options))
    return [torch.cat(part, -1) for part in zip(*parts, strict=True)]


def _calc_cond_batch(model: Model, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    total = [torch.zeros_like(x) for _ in conds]
    weight = [torch.full_like(x, 1e-37) for _ in conds]
    asked = []
    for place, cond in enumerate(conds):
        for entry in cond or ():
            late = "timestep_start" in entry and timestep[0] > entry["timestep_start"]
            if not late and not ("timestep_end" in entry and timestep[0] < entry["timestep_end"]):
                asked.append((place, entry))
    asked.reverse()
    for control in {id(entry.get("control")): entry.get("control") for _, entry in asked}.values():
        batch = [(place, entry) for place, entry in asked if entry.get("control") is control]
        rows, times = torch.cat([x] * len(batch)), torch.cat([timestep] * len(batch))
        if control is not None:
            control.get_control(rows, times, {}, len(batch), {})
        context = torch.cat([entry["cross_attn"].repeat(len(x), 1, 1) for _, entry in batch])
        answer = model.apply_model(rows, times, c_crossattn=context).chunk(len(batch))
        for (place, _), one in zip(batch, answer, strict=True):
            total[place] += one
            weight[place] += 1
    return [one / w for one, w in zip(total, weight, strict=True)]


class Guider:
    def __init__(self, patcher: Patcher, positive: list, negative: list, cfg: float) -> None:
        self.model_patcher, self.model_options, self.cfg = patcher, patcher.model_options, cfg
        self.original_conds = {
            name: [{**more, "cross_attn": context, "uuid": uuid.uuid4()} for context, more in given]
            for name, given in (("positive", positive), ("negative", negative))
        }

    def __call__(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None) -> Tensor:
        return Executor(self.predict_noise, wrappers_of("predict_noise", self.model_options), self)(
            x, timestep, model_options, seed
        )

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None) -> Tensor:
        cond, uncond = self.conds["positive"], self.conds["negative"]
        conds, model = [cond, None if math.isclose(self.cfg, 1.0) else uncond], self.model_patcher.model
        if own := model_options.get("sampler_calc_cond_batch_function"):
            args = {"conds": conds, "input": x, "sigma": timestep, "model": model, "model_options": model_options}
            of_cond, of_uncond = own(args)
        else:
            of_cond, of_uncond = calc_cond_batch(model, conds, x, timestep, model_options)
        denoised = of_uncond + (of_cond - of_uncond) * self.cfg
        for function in model_options.get("sampler_post_cfg_function", ()):
            args = {"denoised": denoised, "cond": cond, "uncond": uncond, "model": model, "input": x}
            denoised = function({**args, "sigma": timestep, "model_options": model_options})
        return denoised

    def outer_sample(
        self,
        noise: Tensor,
        latent: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        percent = self.model_patcher.model.model_sampling.percent_to_sigma
        for entry in (entry for cond in self.conds.values() for entry in cond):
            for edge in ("start", "end"):
                if f"{edge}_percent" in entry:
                    entry[f"timestep_{edge}"] = percent(entry[f"{edge}_percent"])
            if "control" in entry:
                entry["control"].pre_run(self.model_patcher.model, percent)
        options = copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        return sampler.sample(self, sigmas, {"model_options": options, "seed": seed}, callback, noise, latent)

    def sample(self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, **more: Any) -> Tensor:
        self.conds = {name: [entry.copy() for entry in cond] for name, cond in self.original_conds.items()}
        usual, self.model_options = self.model_options, copied(self.model_options)
        kinds = self.model_options["transformer_options"].setdefault("wrappers", {})
        for kind, keys in self.model_patcher.wrappers.items():
            for key, kept in keys.items():
                kinds.setdefault(kind, {}).setdefault(key, []).extend(kept)
        try:
            wrappers = wrappers_of("outer_sample", self.model_options)
            return Executor(self.outer_sample, wrappers, self)(
                noise,
                latent,
                sampler,
                sigmas,
                more.get("denoise_mask"),
                more.get("callback"),
                True,
                more.get("seed"),
            )
        finally:
            self.model_options = usual
            del self.conds


def copied(options: Any) -> Any:
    """Dictionaries and lists anew, what is in them as it is."""
    if isinstance(options, dict):
        return {key: copied(value) for key, value in options.items()}
    return list(options) if isinstance(options, list) else options


class Sampler:
    def __init__(self, function: Callable, extra_options: dict[str, Any] | None = None) -> None:
        self.sampler_function, self.extra_options = function, extra_options or {}

    def sample(self, guider: Guider, sigmas: Tensor, extra: dict[str, Any], callback: Any, noise: Any, latent: Any):
        flow = guider.model_patcher.model.model_sampling.kind == "flow"
        x = noise * sigmas[0] + latent * (1 - sigmas[0] if flow else 1)

        def told(info: dict[str, Any]) -> None:
            if callback is not None:
                callback(info["i"], info["denoised"], info["x"], len(sigmas) - 1)

        def model(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            return guider(x, sigma, **extra)

        return self.sampler_function(
            model, x, sigmas, extra_args=extra, callback=told, disable=True, **self.extra_options
        )


def dpm_adaptive_function(model: Any, noise: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool):
    low = float(sigmas[-1] or sigmas[-2])
    return k_sampling.sample_dpm_adaptive(model, noise, low, float(sigmas[0]), extra_args, callback, disable)


@torch.no_grad()
def sample_heunpp2(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool) -> Tensor:
    """Evaluates as ComfyUI's heunpp2 does: at the next sigma too, and at the one after that."""
    for i in range(len(sigmas) - 1):
        ahead = [sigmas[k] for k in range(i, min(i + 3, len(sigmas))) if k == i or sigmas[k] > 0]
        slopes = []
        for sigma in ahead:
            there = x + (slopes[-1] * (sigma - sigmas[i]) if slopes else 0)
            denoised = model(there, sigma * x.new_ones(len(x)), **extra_args)
            slopes.append((there - denoised) / sigma)
            if sigma is ahead[0]:
                callback({"x": x, "i": i, "sigma": sigma, "denoised": denoised})
        x = x + sum(slopes) / len(slopes) * (sigmas[i + 1] - sigmas[i])
    return x


class Control:
    """Counts how often it is asked; `span` is its share of the training timetable."""

    def __init__(self, span: tuple[float, float]) -> None:
        self.span, self.asked, self.previous_controlnet, self.timestep_range = span, 0, None, None

    def pre_run(self, model: Any, percent_to_sigma: Callable[[float], float]) -> None:
        self.timestep_range = tuple(percent_to_sigma(share) for share in self.span)

    def get_control(self, *args: Any) -> None:
        self.asked += 1


class Double:
    """What the situations ask of a host."""

    name = "double of ComfyUI 0.3.64"
    samplers = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "heun", "dpm_2", "dpmpp_sde")
    kinds = ("eps", "v", "flow")

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.calc_cond_batch = calc_cond_batch

    def model(self, kind: str = "eps") -> Patcher:
        patcher = Patcher(Model(kind))
        patcher.model.diffusion_model.register_forward_pre_hook(lambda m, args: self.rows.append(len(args[0])))
        return patcher

    def cond(self, seed: int, **more: Any) -> list:
        return [[torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed)), more]]

    def part(self, value: Any) -> Any:
        """A part of a prompt for the network."""
        return types.SimpleNamespace(cond=value, _copy_with=self.part)

    def guider(self, patcher: Patcher, positive: list, negative: list, cfg: float = 5.0) -> Guider:
        return Guider(patcher, positive, negative, cfg)

    def own_sampler(self, function: Callable[..., Tensor]) -> Sampler:
        return Sampler(function)

    def sampler(self, name: str) -> Sampler:
        own = {"dpm_adaptive": dpm_adaptive_function, "heunpp2": sample_heunpp2}
        return Sampler(own.get(name) or getattr(k_sampling, f"sample_{name}"))

    def control(self, span: tuple[float, float] = (0.0, 1.0)) -> Control:
        return Control(span)

    def controlled(self, control: Control) -> tuple[list, list]:
        """Positive and negative with the ControlNet on both."""
        return self.cond(1, control=control), self.cond(2, control=control)

    def windows(self, patcher: Patcher, length: int) -> Patcher:
        clone = patcher.clone()
        clone.model_options["context_length"] = length
        return clone


def modules() -> dict[str, types.ModuleType]:
    """Stand-ins for what the adapter imports of the host."""
    comfy, extension = types.ModuleType("comfy"), types.ModuleType("comfy.patcher_extension")
    extension.WrappersMP = type("WrappersMP", (), {kind.upper(): kind for kind in KINDS})
    comfy.patcher_extension = extension
    return {"comfy": comfy, "comfy.patcher_extension": extension}
