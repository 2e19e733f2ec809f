"""`stepcache bench`: quality against calls, with fewer steps and the other samplers in the same table.

    from stepcache.bench import KDiffusion, bench

    subject = KDiffusion("sd15", model, shape=(4, 64, 64), sigmas=my_sigmas, extra_args=my_conditioning, decode=my_vae)
    results = bench(subject, samplers=["euler", "dpmpp_2m"], steps=[20, 30], out="bench-output")

`subjects` says what is sampled, `results` what a row of a table is, and `metrics` how samples are compared.
"""

from .compare import compare
from .metrics import METRICS, Metric
from .page import Comparison
from .results import Results, Row
from .run import bench, compared
from .subjects import KDiffusion, Pipeline, Sampled, Subject

__all__ = [
    "METRICS",
    "Comparison",
    "KDiffusion",
    "Metric",
    "Pipeline",
    "Results",
    "Row",
    "Sampled",
    "Subject",
    "bench",
    "compare",
    "compared",
]
