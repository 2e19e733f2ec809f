"""The script that a host sees: its panel, and the hooks that the host calls."""

from __future__ import annotations

from typing import Any

from stepcache import OptionError
from stepcache.extend import flag

from . import infotext
from .axes import options_of_axes
from .components import SPEED_CHOICES, build
from .job import Job
from .messages import TITLE, notify
from .options import Options
from .sampler import wrap_sampler, wrap_sampler_when_conditioned


class Extension:
    """Panel and hooks, without the host's base class `Script`, which the entry point adds.

    Hosts make one object for txt2img and one for img2img. The state of a job is kept in `p`, never in this object.
    """

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        from modules import scripts

        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """Builds the panel. Returns its components in the order of `Options`."""
        components = build("img2img" if is_img2img else "txt2img")
        self.infotext_fields = infotext.paste_fields(components, SPEED_CHOICES)
        self.paste_field_names = [infotext.key(option) for option in infotext.SHARED]
        return list(components.values())

    def process(self, p: Any, *arguments: Any) -> None:
        """Before a job: reads the options. It never raises: if they are wrong, the job runs without the cache."""
        p.stepcache_job = None
        axes = options_of_axes(p)
        try:
            options = Options.of(arguments, **axes)
            if not flag("enabled", options.enabled):
                if axes:
                    notify(p, "an axis of the XYZ plot has no effect while StepCache is not enabled")
                return
            options.as_method()
            p.extra_generation_params.update(infotext.write(options))
        except OptionError as error:
            notify(p, f"{error}; this job runs without the cache")
        except Exception as error:
            notify(p, f"{type(error).__name__}: {error}; this job runs without the cache")
        else:
            p.stepcache_job = Job(options)

    def process_batch(self, p: Any, *arguments: Any, **keywords: Any) -> None:
        """Before each batch of a job. If the host has no hook before sampling, the sampler is wrapped from here."""
        job = getattr(p, "stepcache_job", None)
        if job is None:
            return
        job.passes.clear()
        if hasattr(super(), "process_before_every_sampling"):
            return
        if hasattr(p, "init_images"):  # img2img has one sampler for all batches; elsewhere it is the last batch's
            wrap_sampler(p)
        else:
            wrap_sampler_when_conditioned(p)

    def before_hr(self, p: Any, *arguments: Any) -> None:
        wrap_sampler(p)

    def process_before_every_sampling(self, p: Any, *arguments: Any, **keywords: Any) -> None:
        wrap_sampler(p)
