"""ComfyUI: the nodes of custom_nodes/stepcache, and the cache between ComfyUI's samplers and its models.

A model that went through a node has one wrapper, at OUTER_SAMPLE, which holds options only. When a sampler begins, the
wrapper makes a run and gives the model's options, copied for this run, two more wrappers: PREDICT_NOISE counts
evaluations, CALC_COND_BATCH answers them. When the sampler ends, even with an exception, the copy and the run are
dropped.

CALC_COND_BATCH gets the latent in sigma space and returns denoised for every branch. It is there for every
architecture. ControlNets and compiled graphs are inside of it, so that a skipped evaluation does not run them.

    patch.py     the cache on a model: `patched`, `cache_of`        cache.py    options and report, OUTER_SAMPLE
    run.py       one sampling loop: which branches are asked for    call.py     one call, in the network's own space
    active.py    which parts of a prompt are active      options.py  a method from a node's fields
    nodes.py     the five nodes                                     v3.py       the second node interface, exports
    tooltips.py  what they say of each field                        picture.py  the report as an IMAGE
    steps.py     how many steps the queued samplers have            samplers.py evaluations of a step
    others.py    other caches on the same model                     rows.py     some images of a batch

Nothing of ComfyUI is imported before ComfyUI calls.
"""

from .cache import Cache, in_one_line
from .call import BatchCall, scalings
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from .options import SPEEDS, chosen_method
from .patch import cache_of, patched
from .samplers import ADAPTIVE, AT_STEP_ENDS, EVALUATIONS, OFF_SCHEDULE
from .v3 import comfy_entrypoint, exports
from .wrappers import KEY

__all__ = [
    "ADAPTIVE",
    "AT_STEP_ENDS",
    "EVALUATIONS",
    "KEY",
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "OFF_SCHEDULE",
    "SPEEDS",
    "BatchCall",
    "Cache",
    "cache_of",
    "chosen_method",
    "comfy_entrypoint",
    "exports",
    "in_one_line",
    "patched",
    "scalings",
]
