"""`stepcache tune`: from a target ("8 calls", "three times as fast", "at least 45 dB") to a profile of your own model.

    from stepcache.bench import KDiffusion
    from stepcache.tuning import tune

    subject = KDiffusion("sd15", model, shape=(4, 64, 64), sigmas=my_sigmas, extra_args=my_conditioning)
    profile = tune(subject, calls=8, sampler="dpmpp_2m", steps=20, seeds=16)
    profile.save("sd15-dpmpp_2m-8.json")
    cached = CachedDenoiser(model, stepcache.load_profile("sd15-dpmpp_2m-8.json"))

`tape` is what is recorded of a run, `placement` the dynamic programming over it, `trial` one run that fits its own
predictions, `study` where trials are scored and counted, and `search` the local search over places. `frontier` does it
for every number of calls at once.
"""

from .calibrate import tune
from .frontier import Frontier, frontier

__all__ = ["Frontier", "frontier", "tune"]
