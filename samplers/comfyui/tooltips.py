"""What the nodes say of each of their fields: its unit, its effect, what it costs."""

from stepcache import METHODS
from stepcache.extend import main_number

_NUMBERS = "; ".join(f"{name}: {main[0]}, {main[1]:g}" for name in METHODS if (main := main_number(name)) is not None)

STEPCACHE = {
    "speed": "How many of the sampler's steps run the model; the first two and the last always do. 2x: every "
    "second, 11 of 20, with the image nearly that of the full run. 3x: every third, 8 of 20, with details that "
    "change. 4x: every fourth, 7 of 20, for drafts. With Euler a, DPM++ 2M SDE and 3M SDE these skip the negative "
    "prompt only, unless cfg is 1, and save less: 31 of 40 calls are made at 2x. 1.3x: that with every sampler: every "
    "step runs it for the positive prompt, 11 of 20 for the negative one too; saves nothing at cfg 1. off: the image "
    "is exactly the one without this node. Runs of 8 steps or fewer are computed throughout at 2x to 4x.",
}

ADVANCED = {
    "method": "forecast: what the node StepCache uses. ucache, easycache, magcache, seacache: skip while an estimated "
    "change stays below a threshold. fbcache, dbcache, taylorseer, cache-dit: the model's first blocks are run at "
    "every step and decide. hicache, spectrum: at fixed gaps. static: the mask alone. none: off, and the other "
    "fields are not read.",
    "threshold_or_interval": "The method's main number: a threshold (a change as a share of the output; higher is "
    "faster and worse), or an interval in steps (2 is every second). default is the method's own. They are: "
    f"{_NUMBERS}.",
    "skip": "What is predicted on a skipped step. all: every prompt, the model does not run. uncond: the negative "
    "prompt alone; the model still runs for the positive one. It saves half as much, and nothing at cfg 1, which "
    "has no negative prompt. automatic: with forecast, uncond for Euler a, DPM++ 2M SDE and 3M SDE, with which all is "
    "not always better than fewer steps; else all.",
    "start": "Share of the run, from 0 to 1, before which every step is computed. Higher is slower and closer to the "
    "full run. default is the method's own, 0 with forecast.",
    "end": "Share of the run, from 0 to 1, after which every step is computed. Lower is slower and keeps more of the "
    "fine detail. default is the method's own, 1 with forecast.",
    "mask": "Steps that are always computed, of 20: slow 13, medium 11, fast 8, ultra 6. none: no step is. What "
    "becomes of the others is set by policy.",
    "policy": "The steps that the mask leaves. dynamic: the method decides about them; forecast computes every second "
    "of them, so that a mask makes it slower, never faster. static: they are skipped, and the mask alone sets the "
    "speed.",
    "decide": "Whose change is looked at by a method with a threshold. batch: that of the first image's positive "
    "prompt, for the whole batch. each: that of every prompt of every image, and a step is skipped only if all "
    "agree, which is safer and slower. sample: every image of a batch decides for itself, as if it were made alone; "
    "with ControlNet, masks or patches on the model, the whole batch does. hicache, spectrum, static and forecast have "
    "no threshold.",
    "options": "More options of the method as key=value, separated by commas or lines. They override the fields above. "
    "warmup=3: the first 3 steps are computed. max_consecutive=2: at most 2 skips in a row. last_step=1: the last "
    "step is computed. mask=11010...: one digit for each step, 1 is computed.",
}

PROFILE = {
    "path": "The file that stepcache tune has written, as /home/me/sdxl-8.json; a relative path begins at ComfyUI's "
    "folder. Its places and weights act at every step; another number of steps gets the same share of calls, and "
    "another model is warned of in the report.",
}

FIRST_BLOCK = {
    "object_to_patch": "The part of the model whose first block decides.",
    "residual_diff_threshold": "Skip while the first block's residual has changed by less than "
    "this share. Higher is faster and worse; 0 is off.",
    "start": "Share of the run, from 0 to 1, before which every step is computed.",
    "end": "Share of the run, from 0 to 1, after which every step is computed.",
    "max_consecutive_cache_hits": "At most so many skips in a row, as in the node that this one replaces; "
    "-1: no limit, 0: off.",
}

REPORT = {
    "latent": "The sampler's output: the report is read after the run.",
    "model": "The output of the StepCache node, as the sampler gets it.",
    "table": "Adds a row for every evaluation: its noise level, whether it was computed, and why.",
}
