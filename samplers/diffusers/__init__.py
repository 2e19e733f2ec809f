"""diffusers: any pipeline, by passing a callback or inside a `with`.

The cache is put in the slot that `torch.nn.Module.__call__` looks into first (`patch.HostPatch`), in the instance's own
`__dict__`: outside compilation, offloading and cache hooks, which go on as before on computed evaluations and are left
out on skipped ones. No class is changed and no block is hooked; what was in the slot is kept.

    attachment.py, callback.py  the two ways in
    denoiser.py, controlnet.py  what is put in a module's slot
    frames.py                   which pipeline is calling: read from the call stack
    runs.py, schedule.py        which run, which step: read from the scheduler
    watch.py                    prompt or weights changed within a run
    branches.py, guidance.py    the branches of guidance in a call
    call.py, answer.py,         one call of a denoiser, and its tensors in the
      pairing.py                network's own space
    reports.py                  several denoisers in one report
    parallel.py                 the ranks that call a denoiser together
    parametrization.py          what the network predicts, by its scheduler
"""

from .attachment import Attachment, attach
from .callback import StepCacheCallback
from .guidance import Guidance
from .parametrization import parametrization, training_sigma
from .patch import SLOT
from .schedule import places

__all__ = [
    "SLOT",
    "Attachment",
    "Guidance",
    "StepCacheCallback",
    "attach",
    "parametrization",
    "places",
    "training_sigma",
]
