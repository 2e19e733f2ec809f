"""Doubles of what A1111 and Forge promise an extension, for tests without a host.

Written from reading and running A1111 1.6.1, 1.7.0 and 1.10.1 and Forge (commit dfdcbab6); none of their code is here.
`Host` takes "a1111-1.10", "a1111-1.7" (no hook before sampling), "a1111-1.6" (no `denoiser` in the callback either) and
"forge". What is doubled: the order of a script's hooks, the sampler object and how it calls its function, the guidance
wrapper with its callback, layouts of branches, split calls, refiner, NGMS, and in Forge the U-Net patcher, the noise
of inpainting, and PAG, SAG and MultiDiffusion as its own extensions do them.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from k_diffusion import sampling
from k_diffusion.external import CompVisDenoiser, DiscreteSchedule
from torch import Tensor, nn

from stepcache.samplers import webui
from stepcache.samplers.webui.run import on_cfg_denoiser

Scheduled = namedtuple("Scheduled", ["end_at_step", "cond"])
STEPS = 10


class Interrupted(BaseException):
    """As in the hosts: not an Exception, so that no script swallows it."""


class Network(nn.Module):
    """out = tanh(W x) + prompt + time, row by row; counts its rows, and fails at a call if asked to."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(5)) * 0.3
        self.offset, self.calls, self.texts, self.fails_at = offset, [], [], None

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.calls.append(len(x))
        self.texts.append([round(one, 4) for one in text.tolist()])
        if self.fails_at is not None and self.fails_at(len(self.calls)):
            raise torch.OutOfMemoryError("pretended")
        mixed = (self.weight @ x.flatten(2)).view(x.shape)
        return torch.tanh(mixed) + text[:, None, None, None] + torch.sin(t / 200)[:, None, None, None] + self.offset


def products() -> Tensor:
    """The cumulative products of Stable Diffusion 1's timetable."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


SIGMAS = ((1 - products()) / products()).sqrt()


class Predictor:
    """Forge's parametrisation of an eps model."""

    def __init__(self) -> None:
        table = products()
        self.schedule = DiscreteSchedule(((1 - table) / table).sqrt(), quantize=False)
        self.sigmas = self.schedule.sigmas
        self.timestep = self.schedule.sigma_to_t

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * sigma.view(-1, 1, 1, 1)

    def percent_to_sigma(self, share: float) -> Tensor:
        return self.schedule.t_to_sigma(torch.tensor((1 - share) * 999))


class ForgeModel:
    def __init__(self, network: Network) -> None:
        self.network, self.predictor = network, Predictor()

    def apply_model(
        self, x: Tensor, t: Tensor, text: Tensor, control: Any = None, transformer_options: Any = None, **objects: Any
    ) -> Tensor:
        """Patches are asked with the options; a ControlNet's lists are emptied, as the U-Net does it."""
        labels, images = transformer_options["cond_or_uncond"], len(transformer_options["sigmas"])
        assert [label for label in labels for _ in range(images)] == transformer_options["cond_mark"].tolist()
        assert len(x) == len(t) == len(text) == images * len(labels)
        marks = {"cond_indices": 0, "uncond_indices": 1}
        for key, label in marks.items():
            assert transformer_options[key] == [k for k in range(len(x)) if labels[k // images] == label]
        out = self.network(self.predictor.calculate_input(t, x), self.predictor.timestep(t), text)
        for patch in transformer_options.get("patches", {}).get("output", []):
            out = patch(out, transformer_options)
        for place in ("middle", "output") if control is not None else ():
            while control[place]:
                added = control[place].pop()
                out = out if added is None else out + added
        return self.predictor.calculate_denoised(t, out, x)


class Unet:
    """Forge's patcher: options, one slot for a wrapper, and clones whose options are deep copies."""

    def __init__(self, model: ForgeModel) -> None:
        self.model, self.model_options, self.control = model, {}, None

    def clone(self) -> Unet:
        other = Unet(self.model)
        other.model_options, other.control = copy.deepcopy(self.model_options), self.control
        return other

    def set_model_unet_function_wrapper(self, wrapper: Callable[..., Tensor]) -> None:
        self.model_options["model_function_wrapper"] = wrapper


class A1111Model:
    """The parts of LatentDiffusion that samplers ask for."""

    parameterization = "eps"

    def __init__(self, network: Network) -> None:
        self.network, self.alphas_cumprod = network, products()

    def apply_model(self, x: Tensor, t: Tensor, cond: dict[str, list[Tensor]]) -> Tensor:
        assert [len(one) for one in cond["c_concat"]] == [len(x)]
        (text,) = cond["c_crossattn"]
        return self.network(x, t, text)


class Timesteps(nn.Module):
    """A1111's inner model under DDIM, PLMS and UniPC: timesteps in, eps out."""

    def __init__(self, model: A1111Model) -> None:
        super().__init__()
        self.inner_model = model

    def forward(self, x: Tensor, t: Tensor, **extra: Any) -> Tensor:
        return self.inner_model.apply_model(x, t, **extra)


def ddim(model: Any, x: Tensor, timesteps: Tensor, extra_args: Any = None, callback: Any = None) -> Tensor:
    """Ascending timesteps, walked down: one evaluation a step, n timesteps are n - 1 steps."""
    table = products()
    for i in range(len(timesteps) - 1):
        at, to = (table[timesteps[len(timesteps) - 1 - i - k]] for k in (0, 1))
        eps = model(x, timesteps[len(timesteps) - 1 - i].float() * x.new_ones(len(x)), **extra_args)
        x0 = (x - (1 - at).sqrt() * eps) / at.sqrt()
        x = to.sqrt() * x0 + (1 - to).sqrt() * eps
        callback({"i": i, "x": x, "denoised": x0})
    return x


def plms(model: Any, x: Tensor, timesteps: Tensor, extra_args: Any = None, callback: Any = None) -> Tensor:
    """As ddim, with a second evaluation in the first step."""
    ones = x.new_ones(len(x))
    model(x, timesteps[-1].float() * ones, **extra_args)
    return ddim(lambda x, t, **extra: model(x, (t - 50).clamp(min=1), **extra), x, timesteps, extra_args, callback)


def unipc(model: Any, x: Tensor, timesteps: Tensor, extra_args: Any = None, callback: Any = None) -> Tensor:
    """Only the number of timesteps counts: n evaluations at times of its own, equally spaced."""
    for i, time in enumerate(torch.linspace(1, 1 / 1000, len(timesteps) + 1)[:-1]):
        x = 0.9 * x + 0.1 * model(x, (time - 1 / 1000) * 1000 * x.new_ones(len(x)), **extra_args)
        callback({"i": max(i - 1, 0), "x": x})
    return x


SAMPLERS = {
    "Euler": sampling.sample_euler,
    "Euler a": sampling.sample_euler_ancestral,
    "DPM++ 2M": sampling.sample_dpmpp_2m,
    "DPM++ 2M SDE": sampling.sample_dpmpp_2m_sde,
    "Heun": sampling.sample_heun,
    "DPM2": sampling.sample_dpm_2,
    "DPM++ SDE": sampling.sample_dpmpp_sde,
    "DPM fast": sampling.sample_dpm_fast,
    "DPM adaptive": sampling.sample_dpm_adaptive,
    "DDIM": ddim,
    "PLMS": plms,
    "UniPC": unipc,
}


class Sampler:
    """What hosts keep as `p.sampler`: a new one for every pass, one for all batches in img2img."""

    def __init__(self, host: Host, p: Any, name: str) -> None:
        self.host, self.p, self.func = host, p, SAMPLERS[name]
        self.timesteps = name in ("DDIM", "PLMS", "UniPC")
        self.model_wrap_cfg = Denoiser(self)
        self.sampler_extra_args: dict[str, Any] = {}

    def run(self, x: Tensor, steps: int, skip: int = 0) -> Tensor:
        """One pass of `steps` steps of a schedule that is `skip` steps longer."""
        p, denoiser = self.p, self.model_wrap_cfg
        denoiser.step, denoiser.steps = 0, steps
        parameters = inspect.signature(self.func).parameters
        keywords: dict[str, Any] = {}
        if "timesteps" in parameters:
            keywords["timesteps"] = torch.arange(0, 1000, 1000 // (steps + skip))[: steps + 1] + 1
        else:
            x = x * float(SIGMAS[-1])
            sigmas = sampling.get_sigmas_karras(steps + skip, float(SIGMAS[0]), float(SIGMAS[-1]))[skip:]
            keywords |= {"sigmas": sigmas} if "sigmas" in parameters else {}
            keywords |= (
                {"sigma_min": float(SIGMAS[0]), "sigma_max": float(SIGMAS[-1])} if "sigma_min" in parameters else {}
            )
            keywords |= {"n": steps} if "n" in parameters else {}
            keywords |= {"disable": True}
        if "noise_sampler" in parameters:
            noise = torch.Generator().manual_seed(p.seed)
            keywords["noise_sampler"] = lambda *sigmas: torch.randn(x.shape, generator=noise)
        self.sampler_extra_args = {
            "cond": p.cond,
            "uncond": p.uncond,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": p.s_min_uncond,
        }
        try:
            return self.func(denoiser, x, extra_args=self.sampler_extra_args, callback=lambda info: None, **keywords)
        except Interrupted:
            return x


class Denoiser(nn.Module):
    """The guidance wrapper, `model_wrap_cfg`: counts its evaluations in `step`, fires the callback, calls the model."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self.sampler, self.step, self.steps, self.kept = sampler, 0, 0, None

    @property
    def inner_model(self) -> Any:
        host = self.sampler.host
        if self.kept is None:
            if host.forge:
                self.kept = types.SimpleNamespace(inner_model=host.model)
                host.model.alphas_cumprod = products()
            else:
                self.kept = Timesteps(host.model) if self.sampler.timesteps else CompVisDenoiser(host.model)
        return self.kept

    def forward(
        self, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, cond_scale: float, s_min_uncond: float
    ) -> Tensor:
        host, p = self.sampler.host, self.sampler.p
        if host.stop_at is not None and self.step == host.stop_at:
            raise Interrupted
        if p.refiner_at is not None and self.step == p.refiner_at:
            host.model, self.kept = host.refiner, None
        weights = [[weight for weight, _ in prompt] for prompt in p.prompt]
        text = [self.now(one.schedules) for prompt in cond.batch for one in prompt]
        negative = [self.now(schedule) for schedule in uncond]
        level = self.sigma_at(sigma)
        self.sampler.p.saw.append(float(level[0]))
        drop = bool(self.step % 2 and level[0] < s_min_uncond) or cond_scale == 1
        answer = (self.forge if host.forge else self.a1111)(
            x, sigma, torch.stack(text), torch.stack(negative), weights, cond_scale, drop
        )
        self.step += 1
        return answer

    def now(self, timetable: list[Scheduled]) -> Tensor:
        return next((one for one in timetable if self.step <= one.end_at_step), timetable[0]).cond

    def sigma_at(self, sigma: Tensor) -> Tensor:
        return SIGMAS[sigma.round().long()] if self.sampler.timesteps else sigma

    def announce(self, x: Tensor, sigma: Tensor, text: Tensor, negative: Tensor) -> Any:
        host = self.sampler.host
        params = types.SimpleNamespace(x=x, sigma=sigma, text_cond=text, text_uncond=negative)
        if host.version != "1.6":
            params.denoiser = self
        for callback in host.callbacks:
            callback(params)
        return params

    def a1111(
        self, x: Tensor, sigma: Tensor, text: Tensor, negative: Tensor, weights: Any, scale: float, drop: bool
    ) -> Tensor:
        """Rows: the branches of image 0, of image 1, ..., then uncond of every image; split in slices of a batch."""
        host = self.sampler.host
        owners = [image for image, own in enumerate(weights) for _ in own]
        rows, level = torch.cat([x[owners], x]), torch.cat([sigma[owners], sigma])
        self.announce(rows, level, text, negative)
        texts = torch.cat([text, negative])
        drop = drop and scale != 1  # at CFG 1 A1111 computes both
        if drop:
            rows, level, texts = rows[: -len(x)], level[: -len(x)], text
        size = len(x) if host.low_memory() else len(rows)
        parts = [slice(at, at + size) for at in range(0, len(rows), size)]
        out = torch.cat([self.inner_model(rows[at], level[at], cond=self.dictionary(texts[at])) for at in parts])
        base = x.new_zeros(x.shape) if drop else out[-len(x) :]
        firsts = [owners.index(image) for image in range(len(x))]
        if drop:
            base = out[firsts]
        answer = base.clone()
        for image, own in enumerate(weights):
            for k, weight in enumerate(own):
                answer[image] += (out[firsts[image] + k] - base[image]) * weight * (1 if drop else scale)
        return answer

    def dictionary(self, texts: Tensor) -> dict[str, list[Tensor]]:
        return {"c_crossattn": [texts], "c_concat": [texts.new_zeros(len(texts), 5, 1, 1)]}

    def forge(
        self, x: Tensor, sigma: Tensor, text: Tensor, negative: Tensor, weights: Any, scale: float, drop: bool
    ) -> Tensor:
        """One branch a chunk, by labels; timesteps are translated to sigma first, and denoised back to eps."""
        host, given = self.sampler.host, x
        level = self.sigma_at(sigma)
        if self.sampler.timesteps:
            x = x * (level**2 + 1).sqrt()[:, None, None, None]
        unet = host.model.forge_objects.unet
        if host.inpainting:
            x = x + 0.01 * torch.randn(x.shape, generator=host.generator)
        self.announce(x, level, text, negative)
        unet = host.model.forge_objects.unet
        images, each = len(x), min(len(one) for one in weights)
        firsts = [sum(len(one) for one in weights[:image]) for image in range(images)]
        conds = [torch.stack([text[first + k] for first in firsts]) for k in range(each)]
        cond, uncond = host.calculate(
            unet, x, level, conds, None if drop and not unet.model_options.get("sag") else negative
        )
        uncond = cond[0] if uncond is None else uncond
        denoised = uncond + sum((one - uncond) * weights[0][k] * (1 if drop else scale) for k, one in enumerate(cond))
        for extra in unet.model_options.get("post_cfg", []):
            denoised = extra(denoised, unet, x, level, conds, negative, cond)
        if self.sampler.timesteps:
            return (x - denoised) / level[:, None, None, None]
        return denoised if given is x else denoised.to(given.dtype)


class Processing:
    """The job that hosts call `p`. `prompt`: for each image its branches, (weight, ((last step, vector), ...))."""

    def __init__(self, model: Any, fields: dict[str, Any]) -> None:
        self.seed, self.steps, self.cfg_scale, self.s_min_uncond = 3, STEPS, 4.0, 0.0
        self.sampler_name, self.n_iter, self.refiner_at, self.img2img, self.hr = "Euler", 1, None, False, None
        self.hr_sampler: str | None = None
        self.prompt: Any = [[(1.0, ((STEPS * 4, 0.3),))]]
        vars(self).update(fields)
        self.sd_model, self.is_hr_pass, self.sampler = model, False, None
        if self.img2img:
            self.init_images = [None]
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: list[str] = []
        self.saw: list[float] = []
        self.latents: list[Tensor] = []

    def comment(self, text: str) -> None:
        self.comments.append(text)

    def txt2img_image_conditioning(self, x: Tensor) -> None:
        return None


class Host:
    """One web UI with one model, one script and the job in progress."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.forge, self.version = name == "forge", name.partition("-")[2]
        self.network, self.other = Network(), Network(offset=0.1)
        self.other.calls, self.other.texts = self.network.calls, self.network.texts
        self.model, self.refiner = self.load(self.network), self.load(self.other)
        self.first = self.model
        self.callbacks: list[Callable[[Any], None]] = [on_cfg_denoiser]
        self.extensions: list[Callable[[Any], None]] = []
        self.low_memory: Callable[[], bool] = lambda: False
        self.stop_at: int | None = None
        self.inpainting = False
        self.script = self.make_script()

    def load(self, network: Network) -> Any:
        if not self.forge:
            return A1111Model(network)
        return types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=Unet(ForgeModel(network))))

    def make_script(self) -> Any:
        """Our mixin on a base class with this version's hooks."""
        hooks: dict[str, Any] = dict.fromkeys(("process", "process_batch", "before_hr"), lambda self, *a, **k: None)
        if self.version not in ("1.6", "1.7"):
            hooks["process_before_every_sampling"] = lambda self, *a, **k: None
        return type("Ours", (webui.Extension, type("Script", (), hooks)), {})()

    def calculate(
        self, unet: Unet, x: Tensor, level: Tensor, conds: list[Tensor], uncond: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Forge's batching: uncond, then the last branch first; in one call, or one each if memory is short."""
        waiting = [(1, 0, uncond)] if uncond is not None else []
        waiting += [(0, k, cond) for k, cond in reversed(list(enumerate(conds)))]
        groups = [[one] for one in waiting] if self.low_memory() else [waiting]
        answers: dict[tuple[int, int], Tensor] = {}
        for group in groups:
            labels, text = [label for label, _, _ in group], torch.cat([text for _, _, text in group])
            marks = [label for label in labels for _ in range(len(x))]
            options = {
                **unet.model_options.get("transformer_options", {}),
                "cond_or_uncond": labels[:],
                "sigmas": level,
                "cond_mark": torch.tensor(marks, dtype=x.dtype),
                "cond_indices": [k for k, mark in enumerate(marks) if not mark],
                "uncond_indices": [k for k, mark in enumerate(marks) if mark],
            }
            c = {"text": text, "transformer_options": options}
            if unet.control is not None:
                c["control"], c["control_model"] = unet.control(text), unet
            arguments = {
                "input": torch.cat([x] * len(group)),
                "timestep": torch.cat([level] * len(group)),
                "c": c,
                "cond_or_uncond": labels,
            }
            wrapper = unet.model_options.get("model_function_wrapper")
            if wrapper is not None:
                out = wrapper(unet.model.apply_model, arguments)
            else:
                out = unet.model.apply_model(arguments["input"], arguments["timestep"], **c)
            for (label, k, _), part in zip(group, out.chunk(len(group)), strict=True):
                answers[label, k] = part
        return [answers[0, k] for k in range(len(conds))], answers.get((1, 0))

    def job(self, arguments: list[Any] | None = None, **fields: Any) -> Any:
        """One press of Generate. `arguments` are our script's; None: the script is not there at all."""
        p = Processing(self.model, fields)
        self.network.calls.clear()
        self.network.texts.clear()
        self.generator = torch.Generator().manual_seed(11)
        scheduled = [
            [
                types.SimpleNamespace(schedules=[Scheduled(end, torch.tensor(text)) for end, text in plan])
                for _, plan in one
            ]
            for one in p.prompt
        ]
        p.cond = types.SimpleNamespace(batch=scheduled)
        p.uncond = [[Scheduled(STEPS * 4, torch.tensor(-0.2))] for _ in p.prompt]
        self.hook(p, arguments, "process")
        try:
            if p.img2img:
                p.sampler = Sampler(self, p, p.sampler_name)
            for batch in range(p.n_iter):
                self.model = p.sd_model = self.first
                if self.forge:
                    self.model.forge_objects = types.SimpleNamespace(unet=self.original)
                self.hook(p, arguments, "process_batch")
                p.latents.append(self.sample(p, arguments, batch))
        finally:
            self.model = self.first
        return p

    @property
    def original(self) -> Unet:
        if not hasattr(self, "_original"):
            self._original = self.first.forge_objects.unet
        return self._original

    def hook(self, p: Any, arguments: list[Any] | None, name: str) -> None:
        hook = getattr(self.script, name, None)
        if arguments is not None and hook is not None:
            hook(p, *arguments)

    def sample(self, p: Any, arguments: list[Any] | None, batch: int) -> Tensor:
        noise = torch.randn(len(p.prompt), 4, 6, 6, generator=torch.Generator().manual_seed(p.seed + batch))
        if not p.img2img:
            p.sampler = Sampler(self, p, p.sampler_name)
        self.before_sampling(p, arguments)
        if not p.img2img:
            p.txt2img_image_conditioning(noise)
        latents = p.sampler.run(noise, p.steps, skip=4 if p.img2img else 0)
        if p.hr is None:
            return latents
        p.is_hr_pass, p.sampler = True, Sampler(self, p, p.hr_sampler or p.sampler_name)
        self.hook(p, arguments, "before_hr")
        if self.forge:  # called twice; what the first call patched is thrown away
            self.before_sampling(p, arguments)
        self.before_sampling(p, arguments)
        larger = nn.functional.interpolate(latents, scale_factor=2) * 0.01 + 1
        latents, p.is_hr_pass = p.sampler.run(larger, p.hr, skip=3), False
        return latents

    def before_sampling(self, p: Any, arguments: list[Any] | None) -> None:
        if self.forge:
            self.model.forge_objects = types.SimpleNamespace(unet=self.original)
        if self.version in ("1.6", "1.7"):
            return
        self.hook(p, arguments, "process_before_every_sampling")
        for extension in self.extensions:
            extension(p)


def pag(host: Host) -> Callable[[Any], None]:
    """Forge's own PAG: after guidance it calls again, with the labels of cond alone."""

    def extension(p: Any) -> None:
        unet = host.model.forge_objects.unet.clone()

        def after(
            denoised: Tensor, unet: Unet, x: Tensor, level: Tensor, conds: Any, negative: Any, cond: Any
        ) -> Tensor:
            worse, _ = host.calculate(unet, x, level, [one * 0.5 for one in conds], None)
            return denoised + (cond[0] - worse[0]) * 0.5

        unet.model_options["post_cfg"] = [after]
        host.model.forge_objects.unet = unet

    return extension


def sag(host: Host) -> Callable[[Any], None]:
    """Forge's own SAG: it calls again with uncond's prompt and a blurred latent, under the label of cond."""

    def extension(p: Any) -> None:
        unet = host.model.forge_objects.unet.clone()

        def after(
            denoised: Tensor, unet: Unet, x: Tensor, level: Tensor, conds: Any, negative: Any, cond: Any
        ) -> Tensor:
            blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
            worse, _ = host.calculate(unet, blurred, level, [negative], None)
            return denoised + (denoised - worse[0]) * 0.2

        unet.model_options["post_cfg"], unet.model_options["sag"] = [after], True
        host.model.forge_objects.unet = unet

    return extension


class Tiles:
    """MultiDiffusion: an object in the slot, which calls the model once a tile and blends."""

    def __call__(self, apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        x = arguments["input"]
        halves = [
            apply_model(x[:, :, at : at + 3], arguments["timestep"], **arguments["c"]) for at in range(0, x.shape[2], 3)
        ]
        return torch.cat(halves, 2)


def multidiffusion(host: Host) -> Callable[[Any], None]:
    def extension(p: Any) -> None:
        unet = host.model.forge_objects.unet.clone()
        unet.set_model_unet_function_wrapper(Tiles())
        host.model.forge_objects.unet = unet

    return extension


def controlnet(host: Host, until: int) -> Callable[[Any], None]:
    """A ControlNet that is there for the first `until` evaluations; it adds something else in every row."""

    def extension(p: Any) -> None:
        def control(text: Tensor) -> Any:
            if p.sampler.model_wrap_cfg.step >= until:
                return None
            added = 0.5 * text.view(-1, 1, 1, 1).expand(-1, 4, 6, 6)
            return {"input": [], "middle": [0.1 * added[:1] + 0.2], "output": [None, added]}

        unet = host.model.forge_objects.unet.clone()
        unet.control = control
        host.model.forge_objects.unet = unet

    return extension


def patched(host: Host, **options: Any) -> Callable[[Any], None]:
    """Two patches of the U-Net, as many as an image has branches, which look at the labels."""

    def extension(p: Any) -> None:
        unet = host.model.forge_objects.unet.clone()

        def by_label(out: Tensor, options: dict[str, Any]) -> Tensor:
            return out + 0.1 * options["cond_mark"][:, None, None, None]

        def by_index(out: Tensor, options: dict[str, Any]) -> Tensor:
            added = torch.zeros(len(out), 1, 1, 1)
            added[options["cond_indices"]] = 0.3
            return out + added

        unet.model_options["transformer_options"] = {"patches": {"output": [by_label, by_index]}, **options}
        host.model.forge_objects.unet = unet

    return extension


def occupied(host: Host) -> Callable[[Any], None]:
    """Something else in the slot, which calls the model as it was asked."""

    def extension(p: Any) -> None:
        unet = host.model.forge_objects.unet.clone()

        def wrapper(apply_model: Callable[..., Tensor], asked: dict[str, Any]) -> Tensor:
            assert asked["cond_or_uncond"] == asked["c"]["transformer_options"]["cond_or_uncond"]
            return apply_model(asked["input"], asked["timestep"], **asked["c"])

        unet.set_model_unet_function_wrapper(wrapper)
        host.model.forge_objects.unet = unet

    return extension
