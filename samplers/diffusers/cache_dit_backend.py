"""cache-dit's DBCache inside a pipeline's denoiser, where `Bn` asks for blocks behind the ones that are skipped.

Nothing outside of a model can leave out blocks in its middle. cache-dit can, from the inside; what is left for the
outside is skipping whole steps.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from stepcache import Method, OptionError
from stepcache.extend import Always, Never, RelativeChange, Reuse, TaylorSeer, require

MISSING = object()

OUTSIDE = ("start", "end", "window", "last_step", "evaluations", "skip", "gates")
"""Options that cache-dit does not have."""


def asks_for_blocks_behind(method: Method) -> bool:
    """Whether a method asks for blocks behind the skipped ones."""
    rule = method.criterion
    return isinstance(rule, RelativeChange) and rule.blocks is not None and rule.blocks.after > 0


class CacheDiTInside:
    """One pipeline's DBCache between `install` and `remove`: cache-dit decides, with its own threshold, Fn, Bn,
    warm-up, limits and series.

    The outside skips the zeros of a static mask, whole steps; cache-dit counts the calls that are left. A dynamic mask
    of digits is cache-dit's too. Needs cache-dit: pip install 'stepcache[cache-dit]'.
    """

    def __init__(self, pipe: Any, modules: list[nn.Module], method: Method, guidance: dict[str, bool | None]) -> None:
        self.pipe, self.modules, self.method = pipe, modules, method
        self.library = require("cache_dit", "cache-dit")
        self._installed = False
        self._changed: list[tuple[nn.Module, str, Any, Any]] = []  # module, attribute, before, as cache-dit set it
        self._last_note = "inside, cache-dit was not there yet"
        for option in fields(method):
            if option.name in OUTSIDE and (value := getattr(method, option.name)) != option.default:
                raise OptionError(
                    f"{option.name}={value!r} with Bn: cache-dit, which then runs inside, has no such option; leave it "
                    "out, or set Bn=0"
                )
        mask = None
        if method.mask is not None and not method.static:
            if isinstance(method.mask.mask, str):
                raise OptionError(
                    f"mask={method.mask.mask!r} with Bn: cache-dit must know its digits; give them, or policy='static'"
                )
            mask = list(method.mask.mask)
        rule = method.criterion
        if not isinstance(rule, RelativeChange) or rule.blocks is None:
            raise OptionError(f"{method.name} looks at no blocks: cache-dit has nothing to run inside")
        self._config = self.library.DBCacheConfig(
            Fn_compute_blocks=rule.blocks.count,
            Bn_compute_blocks=rule.blocks.after,
            residual_diff_threshold=rule.threshold,
            max_warmup_steps=method.warmup,
            max_cached_steps=method.max_cached,
            max_continuous_cached_steps=method.max_consecutive,
            steps_computation_mask=mask,
            **{key: value for key, value in guidance.items() if value is not None},
        )
        self._calibrator = None
        if isinstance(method.predictor, TaylorSeer):
            kind = {"input": "residual", "zero": "hidden_states"}[method.predictor.baseline]
            self._calibrator = self.library.TaylorSeerCalibratorConfig(
                taylorseer_order=method.predictor.order, calibrator_cache_type=kind
            )
        elif not isinstance(method.predictor, Reuse):
            raise OptionError(f"predictor={method.predictor!r} with Bn: accepted are Reuse and TaylorSeer, as inside")

    @property
    def outside(self) -> Method:
        """What is left for the outside: the zeros of a static mask, else nothing."""
        return self.method.replace(criterion=Always() if self.method.static else Never())

    def install(self) -> None:
        parts = [part for module in self.modules for part in module.modules()]
        before = [(part, dict(part.__dict__)) for part in parts]
        self.library.enable_cache(self.pipe, cache_config=self._config, calibrator_config=self._calibrator)
        self._changed = [
            (part, name, known.get(name, MISSING), value)
            for part, known in before
            for name, value in part.__dict__.items()
            if known.get(name, MISSING) is not value
        ]
        self._installed = True

    def remove(self) -> None:
        """Takes cache-dit out again; its last word for the report is kept."""
        self._last_note = self.note()
        self.library.disable_cache(self.pipe)
        self._installed = False
        for part, name, before, value in self._changed:  # cache-dit leaves some of its own behind: forwards, marks
            owned = value, self._original(part)
            if name not in part.__dict__ or not any(part.__dict__[name] is own for own in owned):
                continue  # removed, or set by someone else since
            if before is MISSING:
                del part.__dict__[name]
            else:
                part.__dict__[name] = before
        self._changed = []

    def _original(self, part: nn.Module) -> Any:
        """The forward that cache-dit puts back, which may be one that it has patched before."""
        return next((value for at, name, _, value in self._changed if at is part and name == "_original_forward"), None)

    def note(self) -> str:
        """Which of its calls cache-dit has served, by its own count; once it is removed, what it said last."""
        if not self._installed:
            return self._last_note
        stats = self.library.summary(self.pipe, logging=False)
        served = sorted({step for one in stats for step in (one.cached_steps or ())})
        return (
            f"inside, cache-dit {self._config.strify()} served its calls {served}"
            if served
            else (f"inside, cache-dit {self._config.strify()} has served no call yet")
        )
