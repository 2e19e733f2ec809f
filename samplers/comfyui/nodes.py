"""The nodes."""

from __future__ import annotations

from typing import Any

from stepcache import METHODS
from stepcache import method as make_method
from stepcache.extend import PRESETS, main_number

from .options import OWN, chosen_method
from .patch import cache_of, patched

METHOD_TIP = (
    "forecast: half the model calls, no calibration. ucache, easycache: skip while an estimated error stays under a "
    "threshold. fbcache, dbcache, taylorseer, cache-dit: decide by the model's first blocks. none: off, whatever "
    "stands in the other fields."
)
NUMBER_TIP = "The method's main number; -1: its default. " + "; ".join(
    f"{name}: {main[0]} ({main[1]:g})" for name in METHODS if (main := main_number(name)) is not None
)


class StepCacheNode:
    """Skips model calls that can be predicted: MODEL in, MODEL out, before the sampler."""

    CATEGORY = "model_patches/stepcache"
    DESCRIPTION = "Answers some of the sampler's evaluations without running the model. Put it before the sampler."
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"default": OWN, "min": OWN, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "method": (list(METHODS), {"default": "forecast", "tooltip": METHOD_TIP}),
                "number": (
                    "FLOAT",
                    {"default": OWN, "min": OWN, "max": 1000.0, "step": 0.01, "tooltip": NUMBER_TIP},
                ),
                "start": (
                    "FLOAT",
                    {**share, "tooltip": "Nothing is skipped before this share of the run; -1: default."},
                ),
                "end": ("FLOAT", {**share, "tooltip": "Nothing is skipped after this share of the run; -1: default."}),
                "mask": (
                    ["none", *PRESETS],
                    {"default": "none", "tooltip": "Steps that are always computed; ultra computes the fewest."},
                ),
                "policy": (
                    ["dynamic", "static"],
                    {"default": "dynamic", "tooltip": "On the mask's other steps: ask the method, or skip them all."},
                ),
            },
            "optional": {
                "decide": (
                    ["reference", "each"],
                    {
                        "default": "reference",
                        "tooltip": "reference: the positive prompt's change decides, over the whole batch. each: every "
                        "prompt of every image must agree to a skip.",
                    },
                ),
                "skip": (
                    ["all", "uncond"],
                    {
                        "default": "all",
                        "tooltip": "all: a skipped evaluation runs the model for no prompt. followers: for samplers "
                        "that add noise (Euler a, DPM++ SDE): the positive prompt is always run, the negative one is "
                        "predicted from it, as noise cannot be. Saves half as much; with cfg 1 nothing.",
                    },
                ),
                "options": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Further options, key=value separated by commas or lines: warmup=3, "
                        "max_consecutive=2, last_step=1, mask=1101... They win over the fields above.",
                    },
                ),
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
                    {"default": "diffusion_model", "tooltip": "The part of the model whose first block is looked at."},
                ),
                "residual_diff_threshold": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": "How far the first block's residual may have changed, as a share; higher is faster "
                        "and worse, 0 is off.",
                    },
                ),
                "start": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "From this share of sampling on.",
                    },
                ),
                "end": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "Up to this share of sampling."},
                ),
                "max_consecutive_cache_hits": (
                    "INT",
                    {"default": -1, "min": -1, "tooltip": "Skips in a row at most; -1: no limit, 0: off."},
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
    """The report of the model's last run, once its latent is there."""

    CATEGORY = "model_patches/stepcache"
    DESCRIPTION = "What the cache did in the last run: passes the latent through and gives the report as text."
    FUNCTION = "read"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent": ("LATENT", {"tooltip": "From the sampler: the report is read when it has run."}),
                "model": ("MODEL", {"tooltip": "The model that the sampler got, from the StepCache node."}),
                "table": ("BOOLEAN", {"default": False, "tooltip": "A row for every evaluation too."}),
            }
        }

    def read(self, latent: Any, model: Any, table: bool = False) -> tuple[Any, str]:
        cache = cache_of(model)
        if cache is None:
            return latent, "StepCache: no cache is on this model; connect the model that the sampler got"
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
