"""What is run on a real web UI, and what it came to: `python situations.py HOST CHECKOUT [SITUATION ...]` prints JSON
after RESULT. With situations named, only those, and no comparison with the k-diffusion adapter.

HOST is a1111, forge, reforge, classic or neo. `test_webui.py` runs this and judges it.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hosted import HOSTS, REPOSITORY, Host
from PIL import Image

SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "Heun", "DPM2", "DPM++ SDE", "DDIM", "PLMS", "UniPC")
SAMPLERS += ("LMS", "DPM adaptive", "Restart", "DPM++ 2S a", "DPM++ 3M SDE")
COMPARED = ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "Heun", "DPM2", "DPM++ SDE")
WHOLE_STEPS, NEGATIVE = "whole steps", "negative prompt only"
NEVER = [True, "custom", "forecast", 1]
WHOLE = [True, "2x", None, None, WHOLE_STEPS]
NEGATIVE_ONLY = [True, "2x", None, None, NEGATIVE]
MASKED = [True, "custom", "static", None, None, None, None, None, "medium"]
METHODS = {
    "forecast": WHOLE,
    "ucache": [True, "custom", "ucache", 0.3],
    "easycache": [True, "custom", "easycache", 0.2],
    "static": MASKED,
    NEGATIVE: NEGATIVE_ONLY,
}
ON = [True]
"""Everything as the panel has it, but Enable: at 2x, and what is skipped is chosen by the sampler."""


def picture(mask: bool = False) -> Image.Image:
    """A gradient; as a mask, its left half."""
    image = Image.new("L" if mask else "RGB", (128, 128))
    image.putdata([(255 * (x < 64) if mask else (2 * x, 2 * y, 90)) for y in range(128) for x in range(128)])
    return image


class At:
    """Does something at one evaluation of a job, from within the host's own callback."""

    def __init__(self, host: Host, step: int, action: Callable[[], None]) -> None:
        self.step, self.action, self.count = step, action, 0
        host.watchers.append(self)

    def __call__(self, params: Any) -> None:
        self.count += 1
        if self.count == self.step + 1:
            self.action()


def prepared(name: str, checkout: Path) -> Host:
    host = HOSTS[name](checkout)
    host.watchers = []
    host.callbacks.on_cfg_denoiser(lambda params: [watcher(params) for watcher in list(host.watchers)])
    host.network_hook = None
    from modules import sd_models

    if host.refiner is not None:
        sd_models.get_closet_checkpoint_match = lambda name: host.refiner.sd_checkpoint_info if name else None
    return host


def jobs(host: Host) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every situation by name, as the fields of a job."""
    for sampler in SAMPLERS:
        if sampler in host.lacks:
            continue
        yield sampler, {"sampler_name": sampler}
    image = picture()
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": host.upscaler, "denoising_strength": 0.6}
    yield "hires", hires
    yield "hires, other steps and sampler", {**hires, "hr_second_pass_steps": 9, "hr_sampler_name": "DPM++ 2M"}
    yield "img2img", {"image": image, "denoising_strength": 0.7}
    yield "img2img, DDIM", {"image": image, "denoising_strength": 0.7, "sampler_name": "DDIM"}
    yield "img2img, UniPC", {"image": image, "denoising_strength": 0.7, "sampler_name": "UniPC"}
    yield "img2img, twice", {"image": image, "denoising_strength": 0.7, "n_iter": 2}
    inpaint = {"image": image, "denoising_strength": 0.8, "mask": picture(mask=True), "inpainting_fill": 1}
    yield "inpainting", inpaint
    yield "inpainting, DDIM", {**inpaint, "sampler_name": "DDIM"}
    yield "batch of 2", {"batch_size": 2}
    yield "2 batches", {"n_iter": 2}
    yield "AND", {"prompt": "a cat AND a red house :0.7"}
    yield "AND, batch of 2", {"prompt": "a cat AND a red house :0.7", "batch_size": 2}
    yield "AND, unequal batch", {"prompt": ["a cat AND a house", "a cat"], "batch_size": 2, "seed": [7, 8]}
    yield "prompt editing", {"prompt": "a [cat:house:0.5] by a lake"}
    yield "alternating words", {"prompt": "a [cat|house] by a lake"}
    yield "prompts of two lengths", {"prompt": "word " * 60}
    yield "CFG 1", {"cfg_scale": 1.0}
    yield "NGMS", {"s_min_uncond": 3.0, "steps": 16}
    if host.refiner is not None:
        yield "refiner", {"refiner_checkpoint": "refiner", "refiner_switch_at": 0.5}
    yield from host_jobs(host)


def host_jobs(host: Host) -> Iterator[tuple[str, dict[str, Any]]]:
    if host.family == "a1111":
        split = {"watch": lambda p: host.shared.opts.data.update(batch_cond_uncond=False)}
        yield "low memory", split
        yield "low memory, AND, batch of 2", {"prompt": "a cat AND a house", "batch_size": 2, **split}
        yield "low memory, Heun, NGMS", {"s_min_uncond": 5.0, "sampler_name": "Heun", **split}
        return
    free = host.memory.get_free_memory
    turns = iter(range(10**9))

    def scarce(watch: Callable[[], bool]) -> Callable[[Any], None]:
        def set_memory(p: Any) -> None:
            def left(device: Any = None, torch_free_too: bool = False) -> Any:
                return free(device, torch_free_too) if torch_free_too or not watch() else 1.0

            host.memory.get_free_memory = left

        return set_memory

    yield "low memory", {"watch": scarce(lambda: True)}
    yield "low memory, AND", {"prompt": "a cat AND a house", "watch": scarce(lambda: True)}
    yield "low memory at times", {"watch": scarce(lambda: next(turns) % 5 in (0, 3))}
    yield "low memory, Heun, NGMS", {"s_min_uncond": 5.0, "sampler_name": "Heun", "watch": scarce(lambda: True)}
    titles = [script.title() for script in host.runner(False).scripts]
    for situation, begins, arguments, fields in (
        ("PAG", "PerturbedAttention", [True], {}),
        ("PAG, AND", "PerturbedAttention", [True], {"prompt": "a cat AND a house"}),
        ("SAG", "SelfAttention", [True], {}),
        ("MultiDiffusion", "MultiDiffusion", [True, "MultiDiffusion", 64, 64, 16, 4], {}),
    ):
        for title in titles:
            if title.startswith(begins):
                yield situation, {"given": {title: arguments}, **fields}


def reset(host: Host) -> None:
    host.watchers.clear()
    host.shared.opts.data["batch_cond_uncond"] = True
    if host.family == "forge":
        if not hasattr(host, "free"):
            host.free = host.memory.get_free_memory
        host.memory.get_free_memory = host.free
    else:
        host.switched(info=host.model.sd_checkpoint_info)


def run(host: Host, fields: dict[str, Any], arguments: list[Any] | None, **more: Any) -> Any:
    reset(host)
    given = dict(fields.get("given", {}))
    if arguments is not None:
        given["StepCache"] = arguments
    return host.job(**{**fields, **more, "given": given})


def left(host: Host, objects: list[Any]) -> list[str]:
    """What of ours is left in the host after a run; nothing should be."""
    from stepcache.samplers.webui import run as run_module

    found = [f"{type(run).__name__} running" for run in run_module._running]
    for denoiser in objects:
        if "forward" in vars(denoiser.inner_model):
            found.append("forward of the inner model")
        if hasattr(getattr(denoiser.sampler, "func", None), "stepcache_wrapper"):
            found.append("func of the sampler")
    if host.family == "forge":
        engine = host.model
        for which in ("forge_objects", "forge_objects_original", "forge_objects_after_applying_lora"):
            wrapper = getattr(engine, which).unet.model_options.get("model_function_wrapper")
            if hasattr(wrapper, "stepcache_patch"):
                found.append(f"wrapper in {which}")
    return found


def summary(result: Any) -> dict[str, Any]:
    counts = [re.search(r"(\d+) of (\d+) (?:steps|evaluations)", line) for line in result.said]
    runs = [(int(count[1]), int(count[2])) for count in counts if count is not None]
    return {
        "error": result.error,
        "digest": result.digest,
        "calls": sum(result.calls),
        "rows": result.calls,
        "said": result.said,
        "skipped": [total - computed for computed, total in runs],
        "evaluations": [total for _, total in runs],
        "infotext": result.infotexts[-1].splitlines()[-1] if result.infotexts else "",
    }


def compare(host: Host, sampler: str, method: list[Any], seen: dict[str, Any]) -> dict[str, Any]:
    """The same schedule, noise and network through the k-diffusion adapter: decisions, and how far latents are off."""
    from modules import rng, sd_samplers_common

    from stepcache.samplers import k_diffusion as adapter
    from stepcache.samplers.webui import Options

    caught: dict[str, Any] = {}
    seen["spy"] = caught.update
    result = run(host, {"sampler_name": sampler}, method)
    seen["spy"] = None
    assert result.error is None, result.error
    report = seen["runs"][-1].engine.report
    func, x, keywords = caught["func"], caught["x"], dict(caught["keywords"])
    extra = keywords.pop("extra_args")
    cond = extra["cond"].batch[0][0].schedules[0].cond[None]
    uncond = extra["uncond"][0][0].cond[None]
    chosen = Options.of(method).as_method(func.__name__)
    if host.family == "forge":
        kmodel = host.model.forge_objects.unet.model
        order, more = ("uncond", "cond"), {"c_crossattn": torch.cat([uncond, cond])}
        inner = lambda x, sigma, c_crossattn: kmodel.apply_model(x, sigma, c_crossattn=c_crossattn)  # noqa: E731
        table = kmodel.predictor if hasattr(kmodel, "predictor") else kmodel.model_sampling
        wrapped = torch.nn.Module()
        wrapped.forward, wrapped.sigmas = inner, table.sigmas
        wrapped.t_to_sigma = lambda t: table.sigma(t)
        cached = adapter.CachedDenoiser(wrapped, chosen, branches=order, scalings="eps")
    else:
        denoiser = seen["runs"][-1].denoiser.inner_model
        both = {"c_crossattn": [torch.cat([cond, uncond])], "c_concat": [torch.cat([extra["image_cond"]] * 2)]}
        order, more = ("cond", "uncond"), {"cond": both}
        cached = adapter.CachedDenoiser(denoiser, chosen, branches=order)

    class Guided(torch.nn.Module):
        inner_model = seen["runs"][-1].denoiser.inner_model

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            answers = cached(torch.cat([x, x]), torch.cat([sigma, sigma]), **more).chunk(2)
            parts = dict(zip(order, answers, strict=True))
            return parts["uncond"] + (parts["cond"] - parts["uncond"]) * extra["cond_scale"]

    p = result.p
    fresh = rng.ImageRNG((4, 16, 16), [7])
    fresh.next()
    inspect.unwrap(func).__globals__["torch"] = sd_samplers_common.TorchHijack(types.SimpleNamespace(rng=fresh))
    keywords["callback"], keywords["disable"] = lambda info: None, True
    if sampler in ("DPM++ 2M SDE", "DPM++ SDE"):
        sigmas = keywords["sigmas"]
        p.all_seeds, p.iteration = [7], 0
        keywords["noise_sampler"] = caught["noise"](x, sigmas, p)
    with torch.inference_mode() if host.family == "forge" else torch.no_grad():
        latents = adapter.sample(func, Guided(), x, cache=cached, **keywords)
    return {
        "host": [report.decisions(branch) for branch in order],
        "adapter": [cached.report.decisions(branch) for branch in order],
        "latents off": float((latents - caught["x0"]).abs().max() / latents.abs().max()),
    }


def main(name: str, checkout: Path, only: list[str]) -> None:
    host = prepared(name, checkout)
    if host.family == "forge":
        wanted = ("perturbed_attention", "sag", "multidiffusion")
        found = [checkout.glob(f"extensions-builtin/sd_forge_{name}/scripts/*.py") for name in wanted]
        host.load(*(path for paths in found for path in paths))
    else:
        host.load()
    reset(host)
    found: dict[str, Any] = {"situations": {}, "compared": {}, "broken off": {}}
    chosen = [(situation, fields) for situation, fields in jobs(host) if not only or situation in (*only, "Euler")]
    for situation, fields in chosen:
        found["situations"][situation] = {"without": summary(run(host, fields, None))}

    (plot,) = [*checkout.glob("scripts/xyz_grid.py"), *checkout.glob("extensions-builtin/*/scripts/xyz_grid.py")]
    host.load(REPOSITORY / "scripts" / "stepcache_webui.py", plot)
    from stepcache.samplers.webui import sampler as sampler_module
    from stepcache.samplers.webui.axes import add_axes
    from stepcache.samplers.webui.run import Run

    seen: dict[str, Any] = {"runs": [], "spy": None}
    begin = Run.__init__

    def noted(self: Any, *arguments: Any, **keywords: Any) -> None:
        begin(self, *arguments, **keywords)
        seen["runs"].append(self)

    Run.__init__ = noted
    running = sampler_module.running
    from modules import sd_samplers_common as sampling

    def launched(self: Any, steps: int, func: Any, launch: Any = sampling.Sampler.launch_sampling) -> Any:
        answer = launch(self, steps, func)
        if seen["spy"] is not None:
            seen["spy"]({"x0": answer.clone()})
        return answer

    sampling.Sampler.launch_sampling = launched

    def spied(p: Any, job: Any, func: Any, denoiser: Any, keywords: Any, hires: bool) -> Any:
        if seen["spy"] is not None:
            frame = sys._getframe(1)
            noise = denoiser.sampler.create_noise_sampler
            seen["spy"]({"func": func, "x": frame.f_locals["x"].clone(), "keywords": dict(keywords), "noise": noise})
        return running(p, job, func, denoiser, keywords, hires)

    sampler_module.running = spied
    again = dict(jobs(host))  # the host's scripts have new places among the arguments
    for situation, fields in ((situation, again[situation]) for situation, _ in chosen):
        entry = found["situations"][situation]
        seen["runs"].clear()
        entry["never"] = summary(run(host, fields, NEVER))
        entry["on"] = summary(run(host, fields, ON))
        entry["whole"] = summary(run(host, fields, WHOLE))
        entry["mask"] = summary(run(host, fields, MASKED))
        entry["negative only"] = summary(run(host, fields, NEGATIVE_ONLY))
        entry["left"] = left(host, [one.denoiser for one in seen["runs"]])
        entry["auxiliary"] = sum(one.patch.auxiliary for one in seen["runs"])
        entry["notes"] = sorted({note for one in seen["runs"] for note in one.engine.report.notes})
        entry["off"] = [summary(run(host, fields, [False]))["digest"] for _ in range(2)]

    for sampler in COMPARED if not only else ():
        for what, method in METHODS.items():
            found["compared"][f"{sampler}, {what}"] = compare(host, sampler, method, seen)

    def interrupt() -> None:
        host.shared.state.interrupted = True

    def skip() -> None:
        host.shared.state.skipped = True

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    plain = found["situations"]["Euler"]["without"]["digest"]
    for what, action in (("interrupt", interrupt), ("skip", skip), ("out of memory", out_of_memory)):
        seen["runs"].clear()
        if what == "out of memory":

            def act(p: Any) -> None:
                counted = iter(range(100))

                def fails(*arguments: Any) -> None:
                    if next(counted) == 3:
                        out_of_memory()

                host.network_failure(fails)

            result = run(host, {}, ON, watch=act)
            host.network_failure(None)
        else:
            result = run(host, {}, ON, watch=lambda p, action=action: At(host, 5, action))
        found["broken off"][what] = {
            **summary(result),
            "left": left(host, [one.denoiser for one in seen["runs"]]),
            "memory": [len(last.caches) for one in seen["runs"] if (last := one.engine.runs.current) is not None],
            "then off": summary(run(host, {}, [False]))["digest"] == plain,
        }

    found["wrong options"] = {
        str(arguments): summary(run(host, {}, arguments))
        for arguments in (
            [True, "5x"],
            [True, "custom", "forcast"],
            [True, "custom", "ucache", -1],
            [True, "custom", "static"],
            [True, "2x", *[None] * 6, "110"],
        )
    }
    found["wrong options"]["plain"] = plain
    found["hires off"] = summary(run(host, dict(jobs(host))["hires"], [True, *[None] * 9, False]))
    add_axes(host.scripts)
    add_axes(host.scripts)
    (plot,) = [one.module for one in host.scripts.scripts_data if one.script_class.__module__ == "xyz_grid.py"]
    axes = {one.label: one for one in plot.axis_options if one.label.startswith("[StepCache]")}
    found["axes"] = [one.label for one in plot.axis_options if one.label.startswith("[StepCache]")]

    def apply(p: Any) -> None:
        axes["[StepCache] Method"].apply(p, "ucache", [])
        axes["[StepCache] Number"].apply(p, 0.4, [])

    found["axis"] = summary(run(host, {}, ON, watch=apply))
    try:
        from modules import infotext_utils
    except ImportError:  # A1111 before 1.8
        from modules import generation_parameters_copypaste as infotext_utils

    given = [True, "custom", "ucache", 0.5, WHOLE_STEPS, "10-90", 1, 3, "1,1,1,0,0,1,0,0,1,0,0,1", "static", False]
    text = run(host, {}, [*given, "decay=0.9,reset=0"]).infotexts[0]
    parsed = infotext_utils.parse_generation_parameters(text)
    (script,) = [one for one in host.runner(False).scripts if one.title() == "StepCache"]
    found["pasted"] = [read(parsed) for _, read in script.infotext_fields]
    found["pasted without"] = [read({"Steps": "12"}) for _, read in script.infotext_fields]
    print("\nRESULT", json.dumps(found))  # after a progress bar


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
