"""A1111, Forge, reForge, Forge Classic and Forge Neo: the extension behind scripts/stepcache_webui.py.

Nothing of a host is imported before the host calls. The host is changed only while its sampler runs, and only in
objects, never in classes:

- `sampler.py` wraps `p.sampler.func`. There the schedule is known, and there the run ends.
- `run.py` follows one run. Before each evaluation the host's callback `on_cfg_denoiser` announces it.
- `forge.py` and `a1111.py` patch the model of their host at a run's first evaluation, and again if a refiner has
  replaced the model. They translate the host's calls to `call.py`, which the engine answers.

`panel.py` is what the host sees: the panel and its hooks. `options.py`, `infotext.py` and `axes.py` are the settings:
from the panel or the API, in the image's text, and in the XYZ plot.
"""

from __future__ import annotations

import functools
from typing import Any

from .axes import add_axes
from .options import Options
from .panel import Extension
from .run import on_cfg_denoiser

__all__ = ["Extension", "Options", "register"]


def register(script_callbacks: Any, scripts: Any) -> None:
    """Adds the extension's callbacks. The entry point calls it once, with the host's two modules of these names."""
    script_callbacks.on_cfg_denoiser(on_cfg_denoiser)
    script_callbacks.on_before_ui(functools.partial(add_axes, scripts))
