"""Methods: gate, criterion and predictor under a published name. A method is data; making one is a few lines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, Literal

from . import options
from .adaptive_order import AdaptiveOrder
from .criteria import Always, Criterion, EasyCacheRule, Never, UCacheRule
from .gates import (
    Gate,
    Interval,
    LastStep,
    Mask,
    MaxCached,
    MaxConsecutive,
    SecondOfTwo,
    SpectrumCadence,
    Warmup,
    Window,
    WindowUnit,
    as_gates,
)
from .masks import StepMask
from .predictors import Chebyshev, Lagrange, Predictor, Reuse


@dataclass(frozen=True, kw_only=True)
class Method:
    """Which evaluations are skipped, and what is returned for them.

    Gate, criterion and predictor are independent: any criterion with any predictor under any gate.

    Attributes:
        criterion: whether an evaluation that may be skipped is skipped. Default `Always`.
        predictor: what a skipped evaluation returns. Default `Reuse`.
        start, end: the window, as shares from 0 to 1, default 0 and 1.
        window: what the shares are of: "steps" (this run's steps) or "training" (the training timetable). None
            (default): no window, unless start or end is given, which are then shares of this run's steps.
        mask: a `StepMask`, or anything it takes (text, a list, a preset's name). Default None: no mask.
        warmup: the first so many steps are computed. Default 0.
        last_step: the last step is computed. Default False.
        max_cached: at most so many skipped evaluations in a run. Default -1: no limit.
        max_consecutive: at most so many in a row. Default -1: no limit.
        evaluations: "all" (default) or "second": of steps with two evaluations (Heun, DPM2, DPM++ 2S), only the second
            reads and writes the memory, as stable-diffusion.cpp does it.
        skip: what a skipped evaluation leaves out: "all" branches (default), or the "uncond", all but the reference.
            The reference is then computed at every evaluation, and what the others add to it is predicted: the predictor
            finds the reference's output in the place of the input, `out = out_anchor + ...`. Under fresh noise that
            difference can be foretold where the output cannot. Needs guidance, and halves what can be saved.
        gates: further gates, asked after these.
        name: how the report calls it.
    """

    criterion: Criterion = field(default_factory=Always)
    predictor: Predictor = field(default_factory=Reuse)
    start: float = 0.0
    end: float = 1.0
    window: WindowUnit | None = None
    mask: StepMask | str | list[int] | tuple[int, ...] | None = None
    warmup: int = 0
    last_step: bool = False
    max_cached: int = -1
    max_consecutive: int = -1
    evaluations: Literal["all", "second"] = "all"
    skip: Literal["all", "uncond"] = "all"
    gates: tuple[Gate, ...] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        if self.mask is not None and not isinstance(self.mask, StepMask):
            object.__setattr__(self, "mask", StepMask(self.mask))
        if self.evaluations not in ("all", "second"):
            raise options.unknown("evaluations", str(self.evaluations), ("all", "second"))
        if self.skip not in ("all", "uncond"):
            raise options.unknown("skip", str(self.skip), ("all", "uncond"))
        object.__setattr__(self, "last_step", options.flag("last_step", self.last_step))
        for name, kind in (("criterion", Criterion), ("predictor", Predictor)):
            if not isinstance(value := getattr(self, name), kind):
                raise options.OptionError(
                    f"{name}={value!r}: accepted is an object of a class made from {kind.__name__}"
                )
        object.__setattr__(self, "gates", as_gates(self.gates))
        self.all_gates()

    @property
    def static(self) -> bool:
        """Whether the mask's zeros are skipped without asking the criterion."""
        return self.mask is not None and self.mask.policy == "static"

    @property
    def never_skips(self) -> bool:
        """Whether these options can never skip anything: the model is then called directly."""
        closed = 0 in (self.max_cached, self.max_consecutive)
        ones = self.mask is not None and not isinstance(self.mask.mask, str) and all(self.mask.mask)
        return closed or ones or (self.criterion.never_skips and not self.static)

    def all_gates(self) -> tuple[Gate, ...]:
        """The gates that these options ask for, in the order in which they are asked."""
        chosen: list[Gate] = []
        if self.evaluations == "second":
            chosen.append(SecondOfTwo())
        if self.window is not None or (self.start, self.end) != (0.0, 1.0):
            chosen.append(Window(self.start, self.end, "steps" if self.window is None else self.window))
        if self.warmup:
            chosen.append(Warmup(self.warmup))
        if self.mask is not None:
            chosen.append(Mask(self.mask))
        if self.last_step:
            chosen.append(LastStep())
        chosen += [MaxCached(self.max_cached), MaxConsecutive(self.max_consecutive)]
        return (*chosen, *self.gates)

    def replace(self, **changes: Any) -> Method:
        """The same method with other options: `UCache().replace(mask="fast", max_consecutive=3)`."""
        return replace(self, **changes)


def _known(function: Callable[..., Method]) -> Callable[..., Method]:
    """Makes an unknown keyword an OptionError with the nearest name, instead of a TypeError from somewhere inside."""

    @wraps(function)
    def checked(*positional: Any, **keywords: Any) -> Method:
        accepted = accepted_options(function)
        for key in keywords:
            if key not in accepted:
                raise options.unknown("option", key, accepted)
        try:
            inspect.signature(function).bind(*positional, **keywords)
        except TypeError as error:
            raise options.OptionError(f"{function.__name__}: {error}") from None
        return function(*positional, **keywords)

    return checked


def accepted_options(function: Callable[..., Method]) -> dict[str, Any]:
    """The options of a method with their defaults: its own first, then those common to all if it takes them."""
    own = inspect.signature(function).parameters.values()
    accepted = {p.name: "" if p.default is p.empty else p.default for p in own if p.kind is not p.VAR_KEYWORD}
    if any(p.kind is p.VAR_KEYWORD for p in own):
        for common in fields(Method):
            if common.name not in ("criterion", "name"):
                accepted.setdefault(common.name, common.default)
    return accepted


@_known
def Forecast(interval: int = 2, **common: Any) -> Method:
    """Our own: computes every second evaluation and predicts the others, by an order that chooses itself.

    Nothing is calibrated, and the calls are known before the run. The places are those of `stepcache.gates.Interval`; the
    prediction as a formula is at `stepcache.adaptive_order.AdaptiveOrder`. It extrapolates what the sampler integrates,
    and follows the latent instead as far as the sampler adds fresh noise, which it sees in the run itself
    (`stepcache.noise.FreshNoise`).

    Args:
        interval: of so many evaluations one is computed: 2 (the default) is half the calls, 3 a third. 1 computes
            everything. The first two and the last step are computed too.
        **common: every option of `Method`: start, end, mask, warmup, last_step, max_cached, predictor, ... With
            skip="uncond" the predictor is `Lagrange(1)`, because a difference of branches is predicted, which fresh
            noise hardly touches; and only the first evaluation is computed in any case.

    For samplers with two evaluations a step (Heun, DPM2, DPM++ SDE) it should know so: use `sample`, or `sigmas` and
    the sampler's callback. What it reaches, and when it does not help, is measured in docs/measurements.md.

    Example:
        >>> from stepcache import Forecast
        >>> Forecast(3).name
        'forecast'
    """
    followers = common.get("skip") == "uncond"
    gates = (Interval(interval, start=1 if followers else 2), *as_gates(common.pop("gates", ())))
    predictor = Lagrange(1) if followers else AdaptiveOrder()
    return Method(**{"predictor": predictor, "last_step": True, "gates": gates, "name": "forecast", **common})


@_known
def UCache(
    threshold: float = 1.0,
    start: float = 0.15,
    end: float = 0.95,
    decay: float = 1.0,
    relative: bool = True,
    reset: bool = True,
    **common: Any,
) -> Method:
    """UCache, with the published names and defaults (stable-diffusion.cpp, commit 97d29908); made for U-Nets.

    Skips while an accumulated estimate of the relative change of the network's output stays under `threshold`; the rule
    as a formula stands at `stepcache.criteria.UCacheRule`. A skipped evaluation reuses the residual.

    Args:
        threshold: the error that is let accumulate. Higher is faster and worse. At 0 nothing is skipped.
        start, end: the window, as shares of this run's steps.
        decay: what of the error is kept at each evaluation, 0 to 1.
        relative: measure the change against the size of the output; else against threshold times that size.
        reset: forget the error when an evaluation is computed. With `reset=False` and `decay=1` little or nothing is
            skipped after the first failed test, which is published so and kept, with a warning.
        **common: every option of `Method`: mask, warmup, last_step, max_cached, max_consecutive, predictor, ...

    It fails on data that is not centred: the residual carries the input along, and with it the mean of the data. Under
    Euler, 20 steps, UCache is 28 dB from the full run on hsc32 at 11 calls (fewer steps: 44 dB) and 4.5 dB on lsst60,
    whose mean is 6, at 12 calls (fewer steps: 46 dB): there the image is destroyed. docs/measurements.md has the table.

    For ancestral and SDE samplers the published advice is reset=0. Measured on two networks, 20 steps of Euler a, it
    never skips at the default threshold; reset=1 with threshold 0.5 to 1 makes 18 to 14 of 20 calls on the U-Net, 47 to
    30 dB from the full run (14 to 13 calls and 34 dB on the DiT). Keep reset=1 and lower the threshold; the whole table
    is in docs/measurements-digits.md.
    """
    rule = UCacheRule(threshold, decay, relative, reset)
    return Method(**{"criterion": rule, "start": start, "end": end, "window": "steps", "name": "ucache", **common})


@_known
def EasyCache(threshold: float = 0.2, start: float = 0.15, end: float = 0.95, **common: Any) -> Method:
    """EasyCache, with the names and defaults of stable-diffusion.cpp (commit 97d29908) and ComfyUI.

    Skips while an accumulated estimate of the relative change of the network's output stays under `threshold`; the rule
    as a formula stands at `stepcache.criteria.EasyCacheRule`. A skipped evaluation reuses the residual.

    Args:
        threshold: the error that is let accumulate. Higher is faster and worse. At 0 nothing is skipped.
        start, end: the window, as shares of the training timetable: for img2img and shifted flows 0.15 is not 15 % of
            your steps. `window="steps"` makes it so.
        **common: every option of `Method`: mask, warmup, last_step, max_cached, max_consecutive, predictor, ...

    It fails on data that is not centred, as UCache does: under Euler, 20 steps, it is 22 dB from the full run on hsc32
    and -4 dB on lsst60 at 9 calls, fewer steps 41 dB on both (docs/measurements.md).

    On ancestral and SDE samplers it rarely skips: fresh noise changes the input more than any skip could repay.
    """
    rule = EasyCacheRule(threshold)
    return Method(
        **{"criterion": rule, "start": start, "end": end, "window": "training", "name": "easycache", **common}
    )


@_known
def Static(mask: StepMask | str | list[int] | tuple[int, ...], **common: Any) -> Method:
    """Skips exactly the zeros of a step mask, whatever the latents do. `mask` as for `StepMask`."""
    given = mask.mask if isinstance(mask, StepMask) else mask
    return Method(**{"mask": StepMask(given, "static"), "name": "static", **common})


@_known
def Spectrum(
    w: float = 0.4,
    m: int = 3,
    lam: float = 1.0,
    window_size: float = 2,
    flex_window: float = 0.5,
    warmup: int = 4,
    stop: float = 0.9,
    steps: int | None = None,
    **common: Any,
) -> Method:
    """Spectrum, with the defaults of stable-diffusion.cpp (commit 97d29908) and the names of the paper's code.

    Computes at growing gaps, whatever the latents do (`stepcache.gates.SpectrumCadence`), and fits Chebyshev
    polynomials to what was computed (`stepcache.predictors.Chebyshev`); the rules as formulas stand there.

    Args:
        w: the share of the polynomials in the prediction; the rest is a line.
        m: their highest degree.
        lam: the ridge of their fit.
        window_size, flex_window: every so many evaluations one is computed, and how much that grows with each.
        warmup: so many evaluations are computed first.
        stop: from this share of the run on everything is computed; 0 does not stop.
        steps: the length of the run that the polynomials are scaled to. None: its own; 50 is published for every run.
        **common: every option of `Method`: mask, last_step, max_cached, max_consecutive, predictor, ...

    Published for the guided denoised: `CachedDenoiser(guided, Spectrum(), scalings="denoised")`.
    """
    cadence = SpectrumCadence(window_size, flex_window, warmup, stop)
    gates = (cadence, *as_gates(common.pop("gates", ())))
    return Method(**{"predictor": Chebyshev(w, m, lam, steps), "gates": gates, "name": "spectrum", **common})


@_known
def Off() -> Method:
    """Computes everything; the model is called directly."""
    return Method(criterion=Never(), name="none")


METHODS: dict[str, Callable[..., Method]] = {
    "forecast": Forecast,
    "ucache": UCache,
    "easycache": EasyCache,
    "spectrum": Spectrum,
    "static": Static,
    "none": Off,
}
AS_TEXT = {
    "mask": "",
    "window": "",
    "steps": 0,
    "preset": "",
    "policy": "",
    "block": "",
}
"""Of which type options without a default are, where they come as text."""
MAIN = {
    "forecast": "interval",
    "spectrum": "window_size",
    "dbcache": "threshold",
    "taylorseer": "threshold",
    "cache-dit": "threshold",
}
"""The number to turn first, where it is not the method's first number."""


def main_number(name: str) -> tuple[str, int | float] | None:
    """Name and default of the number that hosts show first for a method of `METHODS`; None where it has none."""
    own = inspect.signature(METHODS[name]).parameters.values()
    defaults = {p.name: AS_TEXT.get(p.name, p.default) if p.default is None else p.default for p in own}
    numbers = [key for key, default in defaults.items() if type(default) in (int, float)]
    key = MAIN.get(name, next(iter(numbers), None))
    return None if key is None else (key, defaults[key])


def method(name: str, option_text: str = "", **keywords: Any) -> Method:
    """A method by its published name, with options as text, as keywords, or both.

    `method("ucache", "threshold=1.5,reset=0")`, `method("easycache", "threshold=0.3,max_consecutive=2", mask="fast")`.

    Raises `OptionError` naming the option, the value and what is accepted: for an unknown name or key (with the nearest
    one), a missing "=", text that is not a number, a window with start >= end, a negative threshold.
    """
    if name not in METHODS:
        raise options.unknown("method", str(name), METHODS)
    accepted = accepted_options(METHODS[name])
    as_text = {key: AS_TEXT.get(key, default) for key, default in accepted.items()}
    other_names = getattr(METHODS[name], "other_names", {})
    as_text |= {other: as_text[usual] for other, usual in other_names.items() if usual in as_text}
    text = options.parse(option_text, {k: v for k, v in as_text.items() if isinstance(v, (bool, int, float, str))})
    if both := text.keys() & keywords.keys():
        raise options.OptionError(f"{', '.join(sorted(both))}: given both as text and as keyword")
    return METHODS[name](**text, **keywords)
