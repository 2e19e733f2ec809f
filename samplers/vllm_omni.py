"""vLLM-Omni: the cache as one of its cache backends, `forecast_cache`.

    vllm serve MODEL --omni --cache-backend forecast_cache --cache-config '{"interval": 3}'

vLLM-Omni has a backend of its own called `step_cache` or `stepcache`, which is another thing. It loads this one by the
entry point `vllm_omni.general_plugins`, in every worker. The configuration is a method's options, and `method`,
"forecast" by default. Nothing of vLLM-Omni is imported before it asks for the backend.

Step execution takes no cache backend at all; pipeline parallelism is refused here.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import stepcache
from stepcache import Method, Off, OptionError, Report
from stepcache.extend import Always

from .coordinators import groups_by
from .diffusers import Attachment, Guidance

NAME = "forecast_cache"
"""The name of the backend, for `--cache-backend`."""

SELECTOR = "vllm_omni.diffusion.cache.selector"
STATE = "vllm_omni.diffusion.distributed.parallel_state"

logger = logging.getLogger(__name__)


def register() -> None:
    """Adds the backend to vLLM-Omni's selection. May be called again.

    A vLLM-Omni without that selection is left as it is, with a warning: the package may be installed for another host.
    """
    try:
        original = import_module(SELECTOR).get_cache_backend
    except (ImportError, AttributeError) as error:
        logger.warning("%s is not available: this vLLM-Omni has no %s.get_cache_backend (%s)", NAME, SELECTOR, error)
        return
    if hasattr(original, NAME):
        return

    @functools.wraps(original)
    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        return backend()(cache_config) if cache_backend == NAME else original(cache_backend, cache_config)

    setattr(get_cache_backend, NAME, True)
    for name, module in list(sys.modules.items()):  # the selector, and those that have imported the function from it
        if name.startswith("vllm_omni.") and getattr(module, "get_cache_backend", None) is original:
            module.get_cache_backend = get_cache_backend  # type: ignore[attr-defined]


@functools.cache
def backend() -> type:
    """The backend's class, a subclass of vLLM-Omni's `CacheBackend`."""
    base = import_module("vllm_omni.diffusion.cache.base").CacheBackend
    return type("ForecastCacheBackend", (ForecastCache, base), {"__doc__": ForecastCache.__doc__})


class ForecastCache:
    """What the backend does; `backend()` puts it on top of vLLM-Omni's base class.

    Attributes:
        config: vLLM-Omni's configuration, or a dictionary: `method`, and the method's options.
        enabled: whether the cache is in place.
    """

    config: Any
    enabled: bool
    _attachment: Attachment | None = None

    def enable(self, pipeline: Any) -> None:
        """Puts the cache in front of the pipeline's transformers. Called once, when the pipeline has been loaded.

        Raises:
            OptionError: the configuration is wrong, or the pipeline cannot be cached.
        """
        if self._attachment is not None:
            raise OptionError(f"{NAME} is enabled already: one backend serves one pipeline")
        options = dict(_options(self.config))
        if options.get("enable_separate_cfg") is not False:
            options.setdefault("cfg_compute_first", False)  # vLLM-Omni's loops call the positive branch first
        guidance = Guidance.pop(options)
        method = stepcache.method(options.pop("method", "forecast"), **options)
        if method.never_skips and not options and method.name != Off().name:
            raise OptionError(f"method={method.name!r} can skip nothing at its defaults: give it a threshold")
        if groups_by(import_module(STATE), ("get_pp_group",)):
            raise OptionError(
                f"{NAME} with pipeline parallelism: a skipped step would leave the other stages waiting. "
                "Use sequence, tensor or guidance parallelism"
            )
        attachment = Attachment(pipeline, method, None, guidance, group=functools.partial(image_ranks, method))
        attachment.attach()
        self._attachment, self.enabled = attachment, True

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Another request begins: nothing is kept of the one before, even if it was broken off."""
        if self._attachment is None:
            raise OptionError(f"{NAME}: enable(pipeline) comes before refresh")
        if verbose and self.report.events:
            logger.debug("%s: %s", NAME, self.report)
        self._attachment.forget()

    def disable(self) -> None:
        """Takes the cache away."""
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment, self.enabled = None, False

    @property
    def report(self) -> Report:
        """The run in progress, or the last one."""
        if self._attachment is None:
            raise OptionError(f"{NAME}: enable(pipeline) comes before report")
        return self._attachment.report


def image_ranks(method: Method) -> list[Any]:
    """The groups of ranks that must take the same decision: those that split one call of the transformer.

    Ranks that compute a branch of guidance each do not wait for one another inside of the transformer. They decide
    together if the method has a criterion, which would see another branch on each; what is counted is equal on all.
    """
    names = ["get_sp_group"] if isinstance(method.criterion, Always) else ["get_sp_group", "get_cfg_group"]
    tensor = import_module("vllm.distributed.parallel_state")
    return [*groups_by(import_module(STATE), names), *groups_by(tensor, ("get_tp_group",))]


def _options(config: Any) -> Mapping[str, Any]:
    """What the user has written, without vLLM-Omni's own fields, which have defaults for other backends."""
    return config if isinstance(config, Mapping) else config._extra_params
