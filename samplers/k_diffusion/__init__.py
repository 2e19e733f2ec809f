"""k-diffusion, and every host that keeps its convention `denoised = model(x, sigma, **extra)`.

The package k-diffusion itself is needed only to look up a sampler by name.

    denoiser.py   the cache in front of a model      call.py       one call, in the network's own space
    sampling.py   samplers by name, and `sample`     model.py      what a model says of itself
"""

from ..branches import InTurn
from .call import DenoiserCall
from .denoiser import BranchNames, CachedDenoiser, find
from .model import FlowDenoiser, ModelScalings, TrainingTable
from .sampling import ADAPTIVE, EVALUATIONS, NEGATIVE_ONLY_SAMPLERS, sample

__all__ = [
    "ADAPTIVE",
    "EVALUATIONS",
    "NEGATIVE_ONLY_SAMPLERS",
    "BranchNames",
    "CachedDenoiser",
    "DenoiserCall",
    "FlowDenoiser",
    "InTurn",
    "ModelScalings",
    "TrainingTable",
    "find",
    "sample",
]
