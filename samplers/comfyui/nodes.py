"""The nodes: StepCache, Apply First Block Cache (StepCache), StepCache Report."""

from __future__ import annotations

from typing import Any

from stepcache import METHODS
from stepcache import method as make_method
from stepcache.extend import PRESETS, main_number

from .options import UNSET, chosen_method
from .patch import cache_of, patched

NUMBERS = "; ".join(f"{name}: {main[0]} ({main[1]:g})" for name in METHODS if (main := main_number(name)) is not None)

TIPS = {
    "method": "forecast: half the model calls, nothing to calibrate; for runs of 7 steps or more. ucache, easycache: "
    "skip while an estimated error stays below a threshold. fbcache, dbcache, taylorseer, cache-dit: the model's first "
    "blocks decide. none: off; the other fields are ignored.",
    "number": f"The method's main number; -1: its default, in brackets. {NUMBERS}",
    "start": "Nothing is skipped before this share of the run (0 to 1); -1: the method's default.",
    "end": "Nothing is skipped after this share of the run (0 to 1); -1: the method's default.",
    "mask": "Steps that are always computed: many with slow, few with ultra. See policy.",
    "policy": "The mask's other steps. dynamic: the method decides; forecast still computes every second of them, so "
    "that a mask makes it slower. static: all of them are skipped.",
    "decide": "reference: the positive prompt decides for all images of a batch. each: every prompt of every image "
    "decides, and a step is skipped only if all agree.",
    "skip": "all: on a skipped step the model runs for no prompt. uncond: it still runs for the positive prompt, and "
    "only the negative one is predicted, from that. Better for samplers that add noise (Euler a, DPM++ SDE). Saves "
    "half as much, and nothing with cfg 1.",
    "options": "More options as key=value, separated by commas or lines: warmup=3, max_consecutive=2, last_step=1, "
    "mask=1101... They override the fields above.",
}


class StepCacheNode:
    """Skips model calls whose result can be predicted: MODEL in, MODEL out, before the sampler."""

    CATEGORY = "model_patches/stepcache"
    DESCRIPTION = "Predicts some of the sampler's steps instead of running the model. Put it before the sampler."
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def field(name: str, kind: Any, default: Any, **more: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
            return {name: (kind, {"default": default, **more, "tooltip": TIPS[name]})}

        share = {"min": UNSET, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                **field("method", list(METHODS), "forecast"),
                **field("number", "FLOAT", UNSET, min=UNSET, max=1000.0, step=0.01),
                **field("start", "FLOAT", UNSET, **share),
                **field("end", "FLOAT", UNSET, **share),
                **field("mask", ["none", *PRESETS], "none"),
                **field("policy", ["dynamic", "static"], "dynamic"),
            },
            "optional": {
                **field("decide", ["reference", "each"], "reference"),
                **field("skip", ["all", "uncond"], "all"),
                **field("options", "STRING", "", multiline=True),
            },
        }

    def patch(
        self,
        model: Any,
        method: str,
        number: float,
        start: float,
        end: float,
        mask: str,
        policy: str,
        decide: str = "reference",
        skip: str = "all",
        options: str = "",
    ) -> tuple[Any]:
        return (patched(model, chosen_method(method, number, start, end, mask, policy, options, skip), decide),)


class FirstBlockCacheNode:
    """The inputs, names, defaults and order of "Apply First Block Cache" (Comfy-WaveSpeed), on our `fbcache`."""

    CATEGORY = "model_patches/stepcache"
    DESCRIPTION = (
        "First Block Cache with the inputs of the node Apply First Block Cache: swap the node, keep the numbers."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "object_to_patch": (
                    "STRING",
                    {"default": "diffusion_model", "tooltip": "The part of the model whose first block decides."},
                ),
                "residual_diff_threshold": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": "Skip while the first block's residual has changed by less than this share. Higher "
                        "is faster and worse; 0 is off.",
                    },
                ),
                "start": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Skip from this share of sampling on.",
                    },
                ),
                "end": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Skip up to this share of sampling.",
                    },
                ),
                "max_consecutive_cache_hits": (
                    "INT",
                    {"default": -1, "min": -1, "tooltip": "At most so many skips in a row; -1: no limit, 0: off."},
                ),
            }
        }

    def patch(
        self,
        model: Any,
        object_to_patch: str,
        residual_diff_threshold: float,
        start: float = 0.0,
        end: float = 1.0,
        max_consecutive_cache_hits: int = -1,
    ) -> tuple[Any]:
        chosen = make_method(
            "fbcache",
            residual_diff_threshold=residual_diff_threshold,
            start=start,
            end=end,
            max_consecutive_cache_hits=max_consecutive_cache_hits,
            object_to_patch=object_to_patch,
        )
        return (patched(model, chosen),)


class ReportNode:
    """The report of the model's last run. It takes the latent, so that it is read after the run."""

    CATEGORY = "model_patches/stepcache"
    DESCRIPTION = "What the cache did in the last run, as text. The latent passes through unchanged."
    FUNCTION = "read"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent": ("LATENT", {"tooltip": "The sampler's output: the report is read after the run."}),
                "model": ("MODEL", {"tooltip": "The output of the StepCache node, as the sampler gets it."}),
                "table": ("BOOLEAN", {"default": False, "tooltip": "Adds a row for every evaluation."}),
            }
        }

    def read(self, latent: Any, model: Any, table: bool = False) -> tuple[Any, str]:
        cache = cache_of(model)
        if cache is None:
            return (
                latent,
                "StepCache: this model has no cache; connect the StepCache node's output, as the sampler gets it",
            )
        return latent, f"{cache.report}\n\n{cache.report.table()}" if table else str(cache.report)


NODE_CLASS_MAPPINGS = {
    "StepCache": StepCacheNode,
    "StepCacheFirstBlock": FirstBlockCacheNode,
    "StepCacheReport": ReportNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "StepCache": "StepCache",
    "StepCacheFirstBlock": "Apply First Block Cache (StepCache)",
    "StepCacheReport": "StepCache Report",
}
