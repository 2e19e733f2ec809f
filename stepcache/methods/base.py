"""What a method is: gate, criterion and predictor under a published name. A method is data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, get_args

from ..criteria.always import Always
from ..criteria.base import Criterion
from ..gates.base import Gate, as_gates
from ..gates.last_step import LastStep
from ..gates.limits import MaxCached, MaxConsecutive
from ..gates.mask import Mask
from ..gates.second_of_two import SecondOfTwo
from ..gates.warmup import Warmup
from ..gates.window import Window, WindowUnit
from ..masks import StepMask
from ..options import OptionError, flag, number, shown, unknown
from ..predictors.base import Predictor
from ..predictors.reuse import Reuse

StorageDtype = Literal["float32", "bfloat16", "float16"]
MaskOption = StepMask | str | list[int] | tuple[int, ...] | None


class MaskField:
    """`Method.mask`: it is given as text, a list, a preset's name or a `StepMask`, and read as a `StepMask`."""

    def __get__(self, method: Method | None, owner: type[Method]) -> StepMask | None:
        return None if method is None else method.__dict__["mask"]

    def __set__(self, method: Method, given: MaskOption) -> None:
        method.__dict__["mask"] = given if given is None or isinstance(given, StepMask) else StepMask(given)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Which evaluations are skipped, and what is returned for them.

    Gate, criterion and predictor are independent: any criterion with any predictor under any gate.

    Attributes:
        criterion: whether an evaluation that may be skipped is skipped. Default `Always`.
        predictor: what a skipped evaluation returns. Default `Reuse`.
        start: before this share of the run, from 0 to 1, everything is computed. Default 0.
        end: after this share of the run everything is computed. Default 1.
        window: what start and end are shares of: "steps" (this run's steps) or "training" (the training timetable).
            None (default): no window, unless start or end is given, which are then shares of this run's steps.
        mask: a `StepMask`, or anything it takes (text, a list, a preset's name). Default None: no mask.
        warmup: the first so many steps are computed. Default 0.
        last_step: the last step is computed. Default False.
        max_cached: at most so many skipped evaluations in a run. Default -1: no limit.
        max_consecutive: at most so many in a row. Default -1: no limit.
        evaluations: "all" (default) or "second": of steps with two evaluations (Heun, DPM2, DPM++ 2S), only the second
            reads and writes the cache, as stable-diffusion.cpp does it.
        skip: which branches a skipped evaluation leaves out: "all" (default), or "uncond", all but the reference
            branch. The reference is then computed at every evaluation, and the others are predicted relative to its
            output instead of the input, `out = out_reference + ...`. Under fresh noise that difference can be
            predicted, the output cannot. Needs guidance, and saves half as much. (FasterCache calls it CFG-Cache.)
        dtype: what the cache is kept in: "float32", "bfloat16" or "float16". None (default): the latents' dtype. What
            is too large for float16 is computed, not predicted.
        offload: "cpu" keeps the cache in the host's memory between evaluations. None (default): on the device.
        gates: further gates, asked after these. Those that choose evaluations one by one (`Interval`) are not asked
            if the mask is static.
        name: how the report calls it.

    Example:
        >>> from stepcache import Method
        >>> from stepcache.extend import Always, Interval, Lagrange
        >>> mine = Method(criterion=Always(), predictor=Lagrange(1), gates=(Interval(3),), name="mine")
        >>> mine.replace(max_consecutive=1).max_consecutive
        1
    """

    criterion: Criterion = field(default_factory=Always)
    predictor: Predictor = field(default_factory=Reuse)
    start: float = 0.0
    end: float = 1.0
    window: WindowUnit | None = None
    mask: MaskField = MaskField()
    warmup: int = 0
    last_step: bool = False
    max_cached: int = -1
    max_consecutive: int = -1
    evaluations: Literal["all", "second"] = "all"
    skip: Literal["all", "uncond"] = "all"
    dtype: StorageDtype | None = None
    offload: Literal["cpu"] | None = None
    gates: tuple[Gate, ...] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        if self.evaluations not in ("all", "second"):
            raise unknown("evaluations", str(self.evaluations), ("all", "second"))
        if self.skip not in ("all", "uncond"):
            raise unknown("skip", str(self.skip), ("all", "uncond"))
        for name, accepted in (("dtype", get_args(StorageDtype)), ("offload", ("cpu",))):
            given = getattr(self, name)
            if given is not None and not (isinstance(given, str) and given in accepted):
                raise unknown(name, given if isinstance(given, str) else shown(given), accepted)
        for name in ("start", "end"):
            number(name, getattr(self, name), high=1.0)
        number("warmup", self.warmup, whole=True)
        object.__setattr__(self, "last_step", flag("last_step", self.last_step))
        for name, kind in (("criterion", Criterion), ("predictor", Predictor)):
            if not isinstance(value := getattr(self, name), kind):
                raise OptionError(f"{name}={value!r}: accepted is an object of a class made from {kind.__name__}")
        object.__setattr__(self, "gates", as_gates(self.gates))
        self.all_gates()

    @property
    def baseline(self) -> Literal["input", "reference"]:
        """What the predictor's `baseline="input"` means: the branch's own input, or the reference's output."""
        return "reference" if self.skip == "uncond" else "input"

    @property
    def static(self) -> bool:
        """Whether the mask's zeros are skipped without asking the criterion."""
        return self.mask is not None and self.mask.policy == "static"

    @property
    def never_skips(self) -> bool:
        """Whether these options can never skip anything: the model is then called directly."""
        closed = 0 in (self.max_cached, self.max_consecutive)
        mask = () if self.mask is None else self.mask.mask
        ones = bool(mask) and not isinstance(mask, str) and all(mask)
        return closed or ones or (self.criterion.never_skips and not self.static)

    @property
    def timetable(self) -> str:
        """What chooses the evaluations to skip if the criterion has nothing to compare, as the report says it."""
        if self.static:
            return "mask"
        return next((gate.timetable for gate in self.all_gates() if gate.timetable), "no reason to compute")

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
        return (*chosen, *(gate for gate in self.gates if gate.beside_static or not self.static))

    def replace(self, **changes: Any) -> Method:
        """The same method with other options: `UCache().replace(mask="fast", max_consecutive=3)`."""
        return replace(self, **changes)

    @classmethod
    def make(cls, common: Mapping[str, Any], **own: Any) -> Method:
        """A method with its own options, of which the common ones that a user gave replace any of the same name.

        `gates` of both are asked, the method's own first.
        """
        gates = (*own.pop("gates", ()), *as_gates(common.get("gates", ())))
        return cls(**{**own, **common, "gates": gates})


class BaseOptions(TypedDict, total=False):
    """The options that every method takes beside its own; `Method` says what they do."""

    predictor: Predictor
    window: WindowUnit | None
    last_step: bool
    max_cached: int
    max_consecutive: int
    evaluations: Literal["all", "second"]
    skip: Literal["all", "uncond"]
    dtype: StorageDtype | None
    offload: Literal["cpu"] | None
    gates: tuple[Gate, ...]


class MaskOptions(TypedDict, total=False):
    mask: MaskOption


class WindowOptions(TypedDict, total=False):
    start: float
    end: float


class WarmupOptions(TypedDict, total=False):
    warmup: int


class OptionsWithWindow(BaseOptions, MaskOptions, WindowOptions, total=False):
    """For methods with a warm-up of their own."""


class OptionsWithWarmup(BaseOptions, MaskOptions, WarmupOptions, total=False):
    """For methods with a window of their own."""


class OptionsWithoutMask(BaseOptions, WindowOptions, WarmupOptions, total=False):
    """For methods with a mask of their own."""


class CommonOptions(OptionsWithWindow, OptionsWithWarmup, total=False):
    """For methods with none of these."""
