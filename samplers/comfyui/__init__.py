"""ComfyUI: the nodes behind custom_nodes/stepcache, and the cache between ComfyUI's samplers and its models.

A model that went through a node carries one wrapper, at OUTER_SAMPLE, which holds options only. When a sampler
begins, it makes the run, and the run's own copy of the model's options gets two more wrappers: PREDICT_NOISE counts
evaluations, CALC_COND_BATCH answers them. When the sampler ends, however it ends, that copy is dropped and the run with
it.

CALC_COND_BATCH gets the latent in sigma space and gives denoised for every branch. It covers every architecture and
is outside of ControlNets (not run if an evaluation is skipped) and of compiled graphs.

Nothing of ComfyUI is imported before ComfyUI calls.
"""

from .cache import Cache, in_one_line
from .call import BatchCall, scalings
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from .options import OWN, chosen_method
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
    "OWN",
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
