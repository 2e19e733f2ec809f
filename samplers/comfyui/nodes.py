"""The nodes: StepCache, its advanced one, StepCache profile, Apply First Block Cache (StepCache), StepCache Report."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from stepcache import METHODS, OptionError, Report, load_profile
from stepcache import method as make_method
from stepcache.extend import PRESETS

from .options import AUTOMATIC, DEFAULT, NOISY_SPEEDS, SPEEDS, chosen_method, noisy_method
from .patch import cache_of, patched
from .picture import picture
from .steps import check_mask
from .tooltips import ADVANCED, FIRST_BLOCK, PROFILE, REPORT, STEPCACHE

CATEGORY = "model_patches/stepcache"
NO_CACHE = "StepCache: this model has no cache; connect the StepCache node's output, as the sampler gets it"


def _field(tooltips: dict[str, str], name: str, kind: Any, default: Any, **more: Any) -> dict[str, tuple[Any, Any]]:
    """One input of a node, with its tooltip."""
    return {name: (kind, {"default": default, **more, "tooltip": tooltips[name]})}


class StepCacheNode:
    """Skips model calls whose result can be predicted: MODEL in, MODEL out, before the sampler."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Makes sampling faster: predicts some of the sampler's steps instead of running the model. Put it between the "
        "model (or the last LoRA) and the sampler. For every model and sampler; not for runs of 8 steps or fewer."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        speed = {"default": next(iter(SPEEDS)), "tooltip": STEPCACHE["speed"]}
        return {"required": {"model": ("MODEL",), "speed": ([*SPEEDS], speed)}}

    def patch(self, model: Any, speed: str) -> tuple[Any]:
        if speed not in SPEEDS:
            raise OptionError(f"speed={speed!r}: accepted is one of {', '.join(map(repr, SPEEDS))}")
        return (patched(model, SPEEDS[speed], noisy=NOISY_SPEEDS.get(speed)),)


class AdvancedNode:
    """Every method with every option: MODEL in, MODEL out, before the sampler."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The node StepCache with all options, and with the methods of others. Put it between the model (or the last "
        "LoRA) and the sampler. With every field at its default it is the node StepCache at 2x."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        field = partial(_field, ADVANCED)
        return {
            "required": {
                "model": ("MODEL",),
                **field("method", list(METHODS), "forecast"),
                **field("threshold_or_interval", "STRING", DEFAULT),
                **field("skip", [AUTOMATIC, "all", "uncond"], AUTOMATIC),
                **field("start", "STRING", DEFAULT),
                **field("end", "STRING", DEFAULT),
                **field("mask", ["none", *PRESETS], "none"),
                **field("policy", ["dynamic", "static"], "dynamic"),
                **field("decide", ["batch", "each", "sample"], "batch"),
            },
            "optional": field("options", "STRING", "", multiline=True),
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }

    def patch(
        self,
        model: Any,
        method: str,
        threshold_or_interval: str = DEFAULT,
        skip: str = AUTOMATIC,
        decide: str = "batch",
        options: str = "",
        prompt: Any = None,
        unique_id: Any = None,
        **fields: str,
    ) -> tuple[Any]:
        chosen = chosen_method(method, threshold_or_interval, options, skip=skip, **fields)
        noisy = noisy_method(method, threshold_or_interval, options, decide, skip, **fields)
        check_mask(chosen.mask, prompt, unique_id)
        return (patched(model, chosen, "batch" if chosen.never_skips else decide, noisy),)


class ProfileNode:
    """What `stepcache tune` has found for a model: MODEL in, MODEL out, before the sampler."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Skips the steps that a calibration has chosen for this model, sampler and number of steps, with the file that "
        "stepcache tune has written. Put it between the model (or the last LoRA) and the sampler."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        path = {"default": "", "tooltip": PROFILE["path"]}
        return {"required": {"model": ("MODEL",), "path": ("STRING", path)}}

    @classmethod
    def IS_CHANGED(cls, path: str, model: Any = None) -> str:
        """When the file was written, so that the node runs again if there is another profile in it."""
        with suppress(OSError, ValueError):
            return str(Path(_path(path)).stat().st_mtime_ns)
        return ""

    def patch(self, model: Any, path: str) -> tuple[Any]:
        return (patched(model, load_profile(_path(path))),)


def _path(text: str) -> str:
    """A path as it is pasted: Windows copies it in quotation marks."""
    return text.strip().strip('"')


class FirstBlockCacheNode:
    """The inputs, names, defaults and order of "Apply First Block Cache" (Comfy-WaveSpeed), on our `fbcache`."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "First Block Cache with the inputs of the node Apply First Block Cache: swap the node, keep the numbers."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        field = partial(_field, FIRST_BLOCK)
        share = {"min": 0.0, "max": 1.0}
        return {
            "required": {
                "model": ("MODEL",),
                **field("object_to_patch", "STRING", "diffusion_model"),
                **field("residual_diff_threshold", "FLOAT", 0.0, **share, step=0.001),
                **field("start", "FLOAT", 0.0, **share, step=0.01),
                **field("end", "FLOAT", 1.0, **share, step=0.01),
                **field("max_consecutive_cache_hits", "INT", -1, min=-1),
            }
        }

    def patch(self, model: Any, **options: Any) -> tuple[Any]:
        return (patched(model, make_method("fbcache", **options)),)


class ReportNode:
    """The report of the model's last run. It takes the latent, so that it is read after the run."""

    CATEGORY = CATEGORY
    DESCRIPTION = "What the cache did in the last run, as text and as an image. The latent passes through unchanged."
    FUNCTION = "read"
    RETURN_TYPES = ("LATENT", "STRING", "IMAGE")
    RETURN_NAMES = ("latent", "report", "image")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent": ("LATENT", {"tooltip": REPORT["latent"]}),
                "model": ("MODEL", {"tooltip": REPORT["model"]}),
                "table": ("BOOLEAN", {"default": False, "tooltip": REPORT["table"]}),
            }
        }

    def read(self, latent: Any, model: Any, table: bool = False) -> tuple[Any, str, Any]:
        cache = cache_of(model)
        if cache is None:
            return latent, NO_CACHE, picture(Report("no cache"))  # so that the node StepCache can be bypassed
        report = cache.report
        return latent, f"{report}\n\n{report.table()}" if table else str(report), picture(report)


NODE_CLASS_MAPPINGS = {
    "StepCache": StepCacheNode,
    "StepCacheAdvanced": AdvancedNode,
    "StepCacheProfile": ProfileNode,
    "StepCacheFirstBlock": FirstBlockCacheNode,
    "StepCacheReport": ReportNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "StepCache": "StepCache",
    "StepCacheAdvanced": "StepCache (advanced)",
    "StepCacheProfile": "StepCache profile",
    "StepCacheFirstBlock": "Apply First Block Cache (StepCache)",
    "StepCacheReport": "StepCache Report",
}
