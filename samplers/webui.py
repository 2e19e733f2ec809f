"""A1111, Forge, reForge, Forge Classic and Forge Neo: the extension behind scripts/stepcache_webui.py.

Nothing of a host is imported before a host calls. Everything that stands in a host does so from the moment its sampler
begins to the moment it ends, however it ends, and only in objects, never in classes:

- `p.sampler.func` is wrapped: there the schedule is known, and there the run ends;
- at every evaluation the host's callback `on_cfg_denoiser` names the evaluation and its branches, and the place to
  stand is taken if it is not taken yet (a refiner brings another model). That place is the wrapper slot of the U-Net's
  `model_options` in the Forge family, and the attribute `forward` of `denoiser.inner_model` in A1111.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from stepcache import METHODS, Method, OptionError, Report, StepMask
from stepcache import method as make_method
from stepcache.extend import PRESETS, Engine, Parametrization, flag, main_number, number, unknown

from .batching import Uncut, cut_exactly, may_be_ordered, rows_of
from .k_diffusion import (
    EVALUATIONS,
    DenoiserCall,
    ModelScalings,
    TrainingTable,
)
from .parametrization import Scalings, ScalingsAsFloats, denoised_scalings, flow_scalings

TITLE = "StepCache"
SLOT = "model_function_wrapper"


def own_window(name: str) -> str:
    """A method's default window as the panel writes it: `0.15-0.95`."""
    own = inspect.signature(METHODS[name]).parameters
    return "-".join(f"{own[key].default:g}" if key in own else share for key, share in (("start", "0"), ("end", "1")))


@dataclass(frozen=True)
class Options:
    """What the panel, the API and the XYZ plot set, in the order of the API's positional arguments.

    enabled: False does nothing at all.
    method: a name of `stepcache.METHODS`.
    number: the method's main number (`main_number`); empty: its default.
    window: `start-end`, shares of the run from 0 to 1 (EasyCache: of the training timetable); empty: the method's own.
    mask: empty, the name of a preset, or one digit a step: 1 computes, 0 may be skipped.
    policy: "dynamic" asks the method on the mask's zeros, "static" skips them all.
    hires: the second pass of hires. fix is cached too.
    warmup: so many first steps are computed; 0: the method's own.
    max_consecutive: at most so many skipped evaluations in a row; -1: no limit.
    text: further options of the method, `key=value,key=value`; what is written here wins over the fields above.
    table: a row for every evaluation in the console.
    negative_only: `skip="uncond"`: the prompt is computed at every evaluation, and only the others (the negative
        prompt, further ones joined by AND) are predicted, from it. For samplers that add noise.
    """

    enabled: bool = False
    method: str = "forecast"
    number: str | float = ""
    window: str = ""
    mask: str = ""
    policy: str = "dynamic"
    hires: bool = True
    warmup: int = 0
    max_consecutive: int = -1
    text: str = ""
    table: bool = False
    negative_only: bool = False

    @classmethod
    def of(cls, arguments: Sequence[Any], **changes: Any) -> Options:
        """From a script's positional arguments; those missing or None are the defaults."""
        names = [field.name for field in fields(cls)]
        if len(arguments) > len(names):
            raise OptionError(f"{len(arguments)} arguments: accepted are {len(names)}: {', '.join(names)}")
        given = {name: value for name, value in zip(names, arguments, strict=False) if value is not None}
        return cls(**{**given, **changes})

    def as_method(self) -> Method:
        """The method asked for. OptionError naming the option, the value and what is accepted."""
        name = _text(self.method).lower()
        if name not in METHODS:
            raise unknown("method", name, METHODS)
        chosen: dict[str, Any] = {}
        if _text(self.number):
            main = main_number(name)
            if main is None:
                raise OptionError(f"number={self.number!r}: {name} has none; leave it empty")
            chosen[main[0]] = _number(main[0], self.number, whole=isinstance(main[1], int))
        if _text(self.window):
            chosen["start"], chosen["end"] = _window(_text(self.window))
        mask = _text(self.mask)
        if mask.lower() not in ("", "none"):
            chosen["mask"] = StepMask(mask, _text(self.policy).lower())
        elif name == "static":
            raise OptionError(f"static needs a mask: one digit a step, or a preset ({', '.join(PRESETS)})")
        if warmup := number("warmup", self.warmup, whole=True):
            chosen["warmup"] = warmup
        if (most := number("max_consecutive", self.max_consecutive, low=-1, whole=True)) >= 0:
            chosen["max_consecutive"] = most
        if flag("negative_only", self.negative_only):
            chosen["skip"] = "uncond"
        text = _text(self.text)
        for key in (part.partition("=")[0].strip() for part in text.split(",")):
            chosen.pop(key, None)
        return make_method(name, text, **chosen)

    def infotext(self) -> dict[str, Any]:
        """What is written into the image, by key; the numbers are written out even where they are defaults."""
        name = _text(self.method).lower()
        main, mask = main_number(name), _text(self.mask)
        masked = mask.lower() not in ("", "none")
        written = {
            "": name,
            "number": _text(self.number) or (None if main is None else f"{main[1]:g}"),
            "window": _text(self.window) or own_window(name),
            "mask": mask if masked else None,
            "policy": self.policy if masked else None,
            "hires": bool(self.hires),
            "warm-up": self.warmup or None,
            "max in a row": self.max_consecutive if self.max_consecutive >= 0 else None,
            "options": _text(self.text) or None,
            "negative prompt only": True if flag("negative_only", self.negative_only) else None,
        }
        return {f"{TITLE} {key}".strip(): value for key, value in written.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _number(name: str, given: Any, whole: bool) -> float:
    try:
        return number(name, float(_text(given)), low=-math.inf, whole=whole)
    except (OptionError, ValueError):
        raise OptionError(f"{name}={_text(given)!r}: accepted is a {'whole ' if whole else ''}number") from None


def _window(text: str) -> tuple[float, float]:
    found = re.fullmatch(r"(\d*\.?\d+)\s*[-:]\s*(\d*\.?\d+)", text)
    if found is None:
        raise OptionError(f"window={text!r}: accepted are two shares from 0 to 1, as in 0.15-0.95")
    return float(found[1]), float(found[2])


class Extension:
    """The script: panel and hooks, without the host's base class, which the entry point adds.

    Hosts make one object for txt2img and one for img2img. It keeps nothing of a job: that stands on `p`.
    """

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        from modules import scripts

        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The panel; the components come in the order of `Options`."""
        import gradio as gr

        default = Options()

        def named(name: str) -> str:
            return f"stepcache_{'img2img' if is_img2img else 'txt2img'}_{name}"

        methods = [name for name in METHODS if name != "none"]
        with gr.Accordion(TITLE, open=False, elem_id=named("panel")):
            with gr.Row():
                enabled = gr.Checkbox(default.enabled, label="Enable", elem_id=named("enabled"))
                hires = gr.Checkbox(default.hires, label="For hires. fix too", elem_id=named("hires"))
            with gr.Row():
                method = gr.Dropdown(methods, value=default.method, label="Method", elem_id=named("method"))
                hint, placeholder = _hints(default.method)
                value = gr.Textbox(
                    "", label="Number", info=hint, placeholder=placeholder, max_lines=1, elem_id=named("number")
                )
                window = gr.Textbox(
                    "",
                    label="Window",
                    info="share of the run in which steps may be skipped, as 0.15-0.95",
                    placeholder=own_window(default.method),
                    max_lines=1,
                    elem_id=named("window"),
                )
            with gr.Row():
                mask = gr.Dropdown(
                    ["none", *PRESETS],
                    value="none",
                    label="Mask",
                    info="a preset, or a digit a step: 1 computes, 0 may be skipped",
                    allow_custom_value=True,
                    elem_id=named("mask"),
                )
                policy = gr.Radio(
                    ["dynamic", "static"],
                    value=default.policy,
                    label="Mask policy",
                    info="on zeros: ask the method, or skip them all",
                    elem_id=named("policy"),
                )
            negative_only = gr.Checkbox(
                default.negative_only,
                label="Skip the negative prompt only (for samplers with noise: a, SDE)",
                elem_id=named("negative_only"),
            )
            with gr.Accordion("Advanced", open=False, elem_id=named("advanced")):
                with gr.Row():
                    warmup = gr.Slider(
                        0, 50, default.warmup, step=1, label="Steps computed first", elem_id=named("warmup")
                    )
                    consecutive = gr.Slider(
                        -1,
                        20,
                        default.max_consecutive,
                        step=1,
                        label="Skipped in a row at most (-1: no limit)",
                        elem_id=named("max_consecutive"),
                    )
                text = gr.Textbox(
                    "",
                    label="Further options",
                    info="key=value,key=value; these win over the fields above",
                    placeholder="last_step=1,max_cached=8",
                    max_lines=1,
                    elem_id=named("options"),
                )
                table = gr.Checkbox(
                    default.table, label="Write every evaluation to the console", elem_id=named("table")
                )

        def hints(name: str) -> tuple[Any, Any]:
            hint, placeholder = _hints(name)
            return gr.update(info=hint, placeholder=placeholder), gr.update(placeholder=own_window(name))

        method.change(hints, inputs=[method], outputs=[value, window], show_progress=False)
        components = [enabled, method, value, window, mask, policy, hires, warmup, consecutive, text, table]
        components.append(negative_only)
        self.infotext_fields = _paste_fields(components)
        self.paste_field_names = [f"{TITLE} {key}".strip() for key in ("", "number", "window", "mask", "options")]
        return components

    def process(self, p: Any, *arguments: Any) -> None:
        """Before a job: reads the options. Never raises: with wrong options the job runs without the cache."""
        p.stepcache_job = None
        axes = getattr(p, "stepcache_axes", {})
        try:
            options = Options.of(arguments, **axes)
            if not flag("enabled", options.enabled):
                if axes:
                    say(p, "an axis of the XYZ plot has no effect while StepCache is not enabled")
                return
            p.stepcache_job = Job(options, options.as_method())
            p.extra_generation_params.update(options.infotext())
        except OptionError as error:
            say(p, f"{error}; this job runs without the cache")

    def process_batch(self, p: Any, *arguments: Any, **keywords: Any) -> None:
        """Before each batch of a job. Where the host has no hook before sampling, the sampler is caught on its way."""
        job = getattr(p, "stepcache_job", None)
        if job is None:
            return
        job.passes.clear()
        if hasattr(super(), "process_before_every_sampling"):
            return
        if hasattr(p, "init_images"):  # img2img has one sampler for all batches; elsewhere it is the last batch's
            follow(p)
        else:
            _follow_when_conditioned(p)

    def before_hr(self, p: Any, *arguments: Any) -> None:
        follow(p)

    def process_before_every_sampling(self, p: Any, *arguments: Any, **keywords: Any) -> None:
        follow(p)


def _hints(name: str) -> tuple[str, str]:
    main = main_number(name)
    if main is None:
        return f"{name} has none", ""
    return f"{name}'s {main[0]}; empty: {main[1]:g}", f"{main[1]:g}"


def _paste_fields(components: Sequence[Any]) -> list[tuple[Any, Callable[[dict[str, str]], Any]]]:
    """Component and what to set it to for an image's infotext; None leaves it. Without our key: only disables."""

    def field(key: str, absent: Any, read: Callable[[str], Any] = str) -> Callable[[dict[str, str]], Any]:
        def value(infotext: dict[str, str]) -> Any:
            if TITLE not in infotext:
                return None
            return read(infotext[key]) if (key := f"{TITLE} {name}".strip()) in infotext else absent

        name = key
        return value

    default = Options()
    enabled, method, value, window, mask, policy, hires, warmup, consecutive, text, _, negative_only = components
    return [
        (enabled, lambda infotext: TITLE in infotext),
        (method, field("", default.method)),
        (value, field("number", "")),
        (window, field("window", "")),
        (mask, field("mask", "none")),
        (policy, field("policy", default.policy)),
        (hires, field("hires", default.hires, lambda text: text == "True")),
        (warmup, field("warm-up", default.warmup, int)),
        (consecutive, field("max in a row", default.max_consecutive, int)),
        (text, field("options", "")),
        (negative_only, field("negative prompt only", default.negative_only, lambda text: text == "True")),
    ]


def say(p: Any, sentence: str) -> None:
    """A sentence in the console and under the image."""
    print(f"{TITLE}: {sentence}")
    if hasattr(p, "comment"):
        p.comment(f"{TITLE}: {sentence}")


def register(script_callbacks: Any, scripts: Any) -> None:
    """What the entry point does when the host loads it."""
    script_callbacks.on_cfg_denoiser(on_cfg_denoiser)
    script_callbacks.on_before_ui(functools.partial(add_axes, scripts))


def add_axes(scripts: Any) -> None:
    """Our axes in the XYZ plot, once."""
    for entry in scripts.scripts_data:
        if entry.script_class.__module__ not in ("xyz_grid.py", "scripts.xyz_grid"):
            continue
        plot = entry.module
        if any(axis.label.startswith(f"[{TITLE}]") for axis in plot.axis_options):
            return
        methods = [name for name in METHODS if name != "none"]
        for label, key, type_, choices in (
            ("Enabled", "enabled", _boolean, ["True", "False"]),
            ("Method", "method", str, methods),
            ("Number", "number", float, None),
            ("Preset", "mask", str, ["none", *PRESETS]),
            ("Mask", "mask", str, None),
            ("Negative prompt only", "negative_only", _boolean, ["True", "False"]),
        ):
            axis = {} if choices is None else {"choices": functools.partial(list, choices)}
            plot.axis_options.append(plot.AxisOption(f"[{TITLE}] {label}", type_, _set_axis(key), **axis))


def _boolean(text: str) -> bool:
    return text.strip().lower() in ("true", "1", "yes", "on")


def _set_axis(key: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, values: Any) -> None:
        p.stepcache_axes = {**getattr(p, "stepcache_axes", {}), key: value}

    return apply


class Job:
    """One press of Generate: options, method, and what the passes of the batch in progress came to."""

    def __init__(self, options: Options, method: Method) -> None:
        self.options = options
        self.method = method
        self.passes: list[str] = []

    def leave_out(self, p: Any) -> None:
        """A run goes without the cache: nothing is said in the image, unless another of its passes was cached."""
        if not self.passes:
            for key in [key for key in p.extra_generation_params if key.split()[0] == TITLE]:
                del p.extra_generation_params[key]

    def record(self, p: Any, report: Report, hires: bool) -> None:
        """The run's line in the console, and its count in the image."""
        followers = self.method.skip == "uncond"
        total, skipped = report.evaluations, skipped_evaluations(report, followers)
        self.passes.append(f"{skipped}/{total}")
        p.extra_generation_params.update(self.options.infotext())
        p.extra_generation_params[f"{TITLE} skipped"] = " + ".join(self.passes)
        label = report.method + ", negative prompt only" * followers + ", hires. fix" * hires
        print(f"{TITLE}: {label}: skipped {skipped} of {total} evaluations, {report.speedup:.2f}x fewer model calls")
        if self.options.table:
            print(f"{report.table()}\n{report}")


def skipped_evaluations(report: Report, followers: bool) -> int:
    """Evaluations of which no branch was computed; with `followers`, those of which one was not."""
    skipped = {event.position.evaluation for event in report.events if not event.computed}
    computed = {event.position.evaluation for event in report.events if event.computed}
    return len(skipped if followers else skipped - computed)


def _follow_when_conditioned(p: Any) -> None:
    """A1111 before 1.10 has no hook between making a sampler and starting it, but asks `p` for the image conditioning.

    The attribute stands on `p` alone and goes when it is first called.
    """
    ask = getattr(p, "txt2img_image_conditioning", None)
    if ask is None or "txt2img_image_conditioning" in vars(p):
        return

    @functools.wraps(ask)
    def conditioning(*arguments: Any, **keywords: Any) -> Any:
        vars(p).pop("txt2img_image_conditioning", None)
        follow(p)
        return ask(*arguments, **keywords)

    p.txt2img_image_conditioning = conditioning


def follow(p: Any) -> None:
    """Has the sampler of `p` report its next run: wraps the attribute `func` until that run is over."""
    job, sampler = getattr(p, "stepcache_job", None), getattr(p, "sampler", None)
    if job is None or sampler is None:
        return
    hires = bool(getattr(p, "is_hr_pass", False))
    if hires and not job.options.hires:
        return
    func = getattr(sampler, "func", None)
    if not callable(func):
        say(p, f"the sampler {type(sampler).__name__} cannot be followed: it runs without the cache")
        return
    if hasattr(func, "stepcache_follows"):
        return

    @functools.wraps(func)
    def followed(denoiser: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if sampler.func is followed:
            sampler.func = func
        with running(p, job, func, denoiser, keywords, hires):
            return func(denoiser, x, *arguments, **keywords)

    followed.stepcache_follows = True
    sampler.func = followed


_running: list[Run] = []
"""The runs in progress, innermost last: a host runs one, and another inside it where an extension asks for that."""


@contextmanager
def running(
    p: Any, job: Job, func: Callable[..., Tensor], denoiser: Any, keywords: dict[str, Any], hires: bool
) -> Iterator[None]:
    """One sampling loop. What cannot be cached runs as it is, with a sentence."""
    try:
        run = Run(p, job, func, denoiser, keywords)
    except OptionError as error:
        run, why = None, str(error)
    except Exception as error:
        run, why = None, f"{type(error).__name__}: {error}"
    if run is None:
        say(p, f"{why}; this run goes without the cache")
        job.leave_out(p)
        yield
        return
    _running.append(run)
    try:
        yield
    finally:
        _running.remove(run)
        run.close()
        job.record(p, run.engine.report, hires)
        for sentence in run.remarks():
            say(p, sentence)


def on_cfg_denoiser(params: Any) -> None:
    """The host's callback, once an evaluation, before the model is called. `params.denoiser`: A1111 from 1.7."""
    if not _running:
        return
    denoiser = getattr(params, "denoiser", None)
    run = next((run for run in reversed(_running) if denoiser is None or run.denoiser is denoiser), None)
    if run is not None:
        run.begin_evaluation(params)


class Run:
    """One sampling loop of a host, from the call of its sampler to the end of that.

    `denoiser` is the host's guidance wrapper, `p.sampler.model_wrap_cfg`, whose `step` counts the evaluations.
    """

    def __init__(self, p: Any, job: Job, func: Callable[..., Tensor], denoiser: Any, keywords: dict[str, Any]) -> None:
        self.p = p
        self.denoiser = denoiser
        self.seat = ForgeSeat(self) if hasattr(p.sd_model, "forge_objects") else A1111Seat(self)
        self.plan = Plan.of(func, keywords, self.seat)
        self.engine = Engine(
            job.method,
            training_sigma=self.seat.training_sigma(),
            coordinate=self.seat.coordinate(),
            parametrization=self.seat.parametrization,
        )
        self.engine.begin(self.plan.sigmas, self.plan.stages, self.plan.on_schedule)
        if self.plan.noted and callable(keywords.get("callback")):
            keywords["callback"] = self._noting(keywords["callback"])
        self.params: Any = None
        self.evaluation = -1
        self.seen: Counter[str] = Counter()
        self.form: tuple = ()
        self.auxiliary = 0
        self.failure: str | None = None
        self.uncut: str | None = None
        self._answering = False

    def _noting(self, callback: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
        def noted(info: dict[str, Any]) -> Any:
            self.engine.note(int(info["i"]))
            return callback(info)

        return noted

    def begin_evaluation(self, params: Any) -> None:
        """The next evaluation: how many branches it has, and which prompts they stand for now."""
        try:
            self.params, self.evaluation, self.seen = params, int(self.denoiser.step), Counter()
            self.form = self._prompts()
            self.seat.sit()
        except Exception as error:
            self.fail(error)

    def _prompts(self) -> tuple[int, ...]:
        """Which conditioning of each prompt's timetable is the one for this step: prompts may be edited in a run."""
        given = self.denoiser.sampler.sampler_extra_args
        timetables = [one.schedules for prompt in given["cond"].batch for one in prompt]
        timetables += list(given["uncond"] or ())
        step = self.denoiser.step
        return tuple(
            id(next((entry for entry in timetable if step <= entry.end_at_step), timetable[0]).cond)
            for timetable in timetables
        )

    def branches(self) -> list[int]:
        """How many branches each image of the batch has (prompts joined by AND)."""
        return [len(prompt) for prompt in self.denoiser.sampler.sampler_extra_args["cond"].batch]

    def answer(
        self,
        names: tuple[str, ...] | None,
        x: Tensor,
        sigma: Tensor,
        form: tuple,
        compute: Callable[[], Tensor],
        cut: Cut,
    ) -> Tensor:
        """One call of the model: by the engine, or the model itself where it is an auxiliary one (`names` is None)."""
        if names is None:
            self.auxiliary += 1
            return compute()
        if self.engine.method.skip == "uncond" and (why := self.seat.unpaired()):
            self.uncut = why
            return compute()
        call = WebuiCall(compute, self.seat.scalings, names, x, sigma, cut)
        call.evaluation, call.cache_key = self.evaluation, (*self.form, *form)
        call.place = self.plan.place(self.evaluation)
        self._answering = True
        try:
            return self.engine(call)
        except Exception as error:
            if error is call.error:
                raise
            self.fail(error)
            return compute()
        finally:
            self._answering = False
            self.uncut = call.uncut or self.uncut

    @property
    def open(self) -> bool:
        """Whether calls are ours: an evaluation was announced, nothing has failed, and we are not within one."""
        return self.params is not None and self.failure is None and not self._answering

    def fail(self, error: Exception) -> None:
        """An error of our own, not of the model: the rest of the run is computed."""
        self.failure = f"the rest of this run was computed: {type(error).__name__}: {error}"
        self.engine.reset()

    def remarks(self) -> list[str]:
        """What the user should know about the run that is over."""
        if self.failure is not None:
            return [self.failure]
        report = self.engine.report
        if self.engine.method.skip == "uncond" and (self.uncut or not report.skipped):
            said = [self.uncut] if self.uncut else []
            said += report.obstacles
            if said:
                return [f"negative prompt only: {why}" for why in said]
        if report.events:
            return []
        if self.auxiliary:
            return ["nothing was cached: the images of a batch have different numbers of prompts joined by AND"]
        return ["no call of the model was seen in this run: another extension stands in its place"]

    def close(self) -> None:
        self.seat.leave()
        self.engine.end()
        self.params = None


Cut = Callable[[slice], Callable[[], Tensor]]
"""Some rows of a batched call -> what calls the model for them alone; raises `Uncut`."""


class WebuiCall(DenoiserCall):
    """One call as `denoised = model(x, sigma)`, remembering what the model itself raised.

    `uncut` is why it could not be taken apart, if it had to be.
    """

    error: BaseException | None = None
    uncut: str | None = None

    def __init__(
        self,
        compute: Callable[[], Tensor],
        scalings: Scalings,
        names: tuple[str, ...],
        x: Tensor,
        sigma: Tensor,
        cut: Cut,
    ) -> None:
        super().__init__(lambda x, sigma: compute(), scalings, names, x, sigma, {})
        self._cut = cut

    def part(self, name: str) -> WebuiCall | None:
        kept = rows_of(self.names, name, len(self.latent))
        try:
            compute = self._cut(kept)
        except Uncut as why:
            self.uncut = str(why)
            return None
        return WebuiCall(compute, self._scalings, (name,), self.latent[kept], self.sigma[kept], self._cut)

    def run_model(self) -> Tensor:
        try:
            return super().run_model()
        except BaseException as error:
            self.error = error
            raise


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it begins.

    `sigmas`, `stages` and `on_schedule` as for `Clock.begin`; `noted`: the sampler's callback names the step just
    begun; `order`: the step and stage of an evaluation, by its number, where the sampler's order is known.
    """

    sigmas: Tensor | None = None
    stages: int | None = None
    on_schedule: bool | None = None
    noted: bool = False
    order: Callable[[int], tuple[int, int]] | None = None

    @classmethod
    def of(cls, func: Callable[..., Tensor], keywords: dict[str, Any], seat: Seat) -> Plan:
        """From the sampler and the keywords it is called with."""
        name = getattr(func, "__name__", "")
        if name == "sample_dpm_adaptive":
            raise OptionError(
                "DPM adaptive chooses its steps by the model's answers, and predicted ones make it take more"
            )
        if "timesteps" in keywords:
            return cls._of_timesteps(name, keywords, seat)
        sigmas = keywords.get("sigmas", keywords.get("sigma_sched"))
        stages = EVALUATIONS.get(name)
        on_schedule = (stages == 1 or name == "sample_heun") and not keywords.get("s_churn")
        return cls(sigmas, stages, on_schedule, noted=True)

    @classmethod
    def _of_timesteps(cls, name: str, keywords: dict[str, Any], seat: Seat) -> Plan:
        """DDIM, PLMS and UniPC are given ascending timesteps: n of them are n - 1 steps.

        UniPC takes only their number and their last, and makes n steps of its own.
        """
        timesteps = keywords["timesteps"]
        if name == "unipc":
            times = _unipc_times(keywords.get("is_img2img", False), timesteps)
            sigmas = None if times is None else seat.sigma_at(times)
            return cls(sigmas, 1, order=lambda k: (k, 0))
        sigmas = seat.sigma_at(timesteps.flip(0))
        if name == "plms":
            return cls(sigmas, order=lambda k: (max(k - 1, 0), int(k == 1)))
        return cls(sigmas, 1, order=(lambda k: (k, 0)) if name.startswith("ddim") else None)

    def place(self, evaluation: int) -> tuple[float, int, int] | None:
        """(sigma, step, stage) of an evaluation, where the sampler's order is known."""
        if self.order is None or self.sigmas is None:
            return None
        step, stage = self.order(evaluation)
        return (self._schedule[step + stage], step, stage) if step + stage < len(self._schedule) else None

    @functools.cached_property
    def _schedule(self) -> list[float]:
        return self.sigmas.float().tolist()


def _unipc_times(image_to_image: bool, timesteps: Tensor) -> Tensor | None:
    """The timesteps at which the hosts' UniPC evaluates, and the last one's end; None for its spacing by logSNR."""
    from modules import shared

    first = float(timesteps[-1]) / 1000 + 1 / 1000 if image_to_image else 1.0
    powers = {"time_uniform": 1, "time_quadratic": 2}
    power = powers.get(getattr(shared.opts, "uni_pc_skip_type", "time_uniform"))
    if power is None:
        return None
    times = torch.linspace(first ** (1 / power), (1 / 1000) ** (1 / power), len(timesteps) + 1) ** power
    return (times - 1 / 1000) * 1000


class Seat(ABC):
    """Where we stand in one host: between its guidance and its model, for the time of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._undo: list[Callable[[], None]] = []

    @abstractmethod
    def sit(self) -> None:
        """Takes the place in front of the model that is in use now, if it is not taken; what stood there is called."""

    @abstractmethod
    def scalings(self, sigma: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(c_skip, c_out, c_in) with: what the model returns = c_skip x + c_out network(c_in x)."""

    @abstractmethod
    def sigma_at(self, timesteps: Tensor) -> Tensor:
        """The noise level at timesteps, as this host takes them."""

    @abstractmethod
    def training_sigma(self) -> Callable[[float], float] | None:
        """Share of the training timetable -> sigma."""

    def coordinate(self) -> Callable[[float], float] | None:
        """For flow models the coordinate is sigma itself, which is their time; None: log sigma."""
        return None

    def parametrization(self, sigma: float) -> Parametrization:
        """What the network's input and output mean at a sigma."""
        return ScalingsAsFloats(self.scalings).parametrization(sigma)

    def unpaired(self) -> str | None:
        """Why one branch cannot be predicted from another, row by row; None where it can."""
        return None

    def leave(self) -> None:
        """Leaves the host's objects as they were found."""
        while self._undo:
            self._undo.pop()()

    @property
    def _sigma_table(self) -> Tensor:
        """Sigma of each training timestep."""
        products = self.run.denoiser.inner_model.inner_model.alphas_cumprod.float()
        return ((1 - products) / products).sqrt()


class ForgeSeat(Seat):
    """The Forge family: the slot for a wrapper in the U-Net's `model_options`, read at every evaluation.

    The slot is called as (apply_model, {"input", "timestep", "c", "cond_or_uncond"}); timestep is sigma, one a row, the
    result is denoised; the rows are one chunk for each of `cond_or_uncond`, 0 for cond and 1 for uncond.
    """

    @property
    def _unet(self) -> Any:
        return self.run.denoiser.inner_model.inner_model.forge_objects.unet

    @property
    def _sampling(self) -> Any:
        model = self._unet.model
        return getattr(model, "predictor", None) or model.model_sampling

    def sit(self) -> None:
        unet, run = self._unet, self.run
        options, previous = unet.model_options, unet.model_options.get(SLOT)
        if getattr(previous, "stepcache_run", None) is run:
            return
        model = id(unet.model)

        def wrapper(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
            def ask(arguments: dict[str, Any]) -> Tensor:
                if previous is not None:
                    return previous(apply_model, arguments)
                return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

            def cut(kept: slice) -> Callable[[], Tensor]:
                if previous is not None and arguments["c"].get("control") is not None:
                    raise Uncut("another extension is in front of the model, and may ask the ControlNet for all rows")
                return functools.partial(ask, one_chunk(arguments, kept))

            compute = functools.partial(ask, arguments)
            if not run.open:
                return compute()
            form = (model, arguments["c"].get("control") is None)
            names = self._names(arguments["cond_or_uncond"], len(arguments["input"]))
            return run.answer(names, arguments["input"], arguments["timestep"], form, compute, cut)

        def undo() -> None:
            if options.get(SLOT) is not wrapper:
                return
            if previous is None:
                del options[SLOT]
            else:
                options[SLOT] = previous

        wrapper.stepcache_run = run
        unet.set_model_unet_function_wrapper(wrapper)
        self._undo.append(undo)

    def _names(self, labels: Sequence[int], rows: int) -> tuple[str, ...] | None:
        """One name a chunk, numbered in the order of the calls; None where the evaluation has had these already.

        Branches come in one call, or split into several where memory is short. PAG and SAG call again with the label
        of the first.
        """
        seen = self.run.seen
        if rows % len(labels) or any(label not in (0, 1) for label in labels):
            return None
        names, count = [], seen.copy()
        for label in labels:
            kind = "uncond" if label else "cond"
            count[kind] += 1
            names.append(kind if count[kind] == 1 else f"{kind} {count[kind]}")
        most = {"cond": min(self.run.branches()), "uncond": 1}
        if any(seen[kind] and count[kind] > max(most[kind], seen[kind]) for kind in count):
            return None
        seen.update(count - seen)
        return tuple(names)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Asked of the host's own parametrisation, which is linear in x and in the network's output."""
        one = torch.ones((*sigma.shape, 1, 1, 1), dtype=sigma.dtype, device=sigma.device)
        nought, sampling = torch.zeros_like(one), self._sampling
        c_skip = sampling.calculate_denoised(sigma, nought, one)
        c_out = sampling.calculate_denoised(sigma, one, nought)
        return c_skip.flatten(), c_out.flatten(), sampling.calculate_input(sigma, one).flatten()

    def sigma_at(self, timesteps: Tensor) -> Tensor:
        return self._sigma_table[timesteps.round().long().clamp(0, len(self._sigma_table) - 1).to("cpu")]

    def training_sigma(self) -> Callable[[float], float] | None:
        sampling = self._sampling
        return lambda share: float(sampling.percent_to_sigma(share))

    def coordinate(self) -> Callable[[float], float] | None:
        device = getattr(self._sampling, "sigmas", torch.ones(1)).device
        return ScalingsAsFloats(self.scalings, device).coordinate()


def one_chunk(arguments: dict[str, Any], kept: slice) -> dict[str, Any]:
    """The arguments of the slot's call for one of its chunks, as the host makes them where it splits its calls.

    What the host orders by rows or chunks is cut. `Uncut` for anything else that may be ordered so. Lists of a
    ControlNet are new ones: the U-Net empties them.
    """
    rows = len(arguments["input"])
    place = kept.start // (kept.stop - kept.start)
    rest = {key: value for key, value in arguments.items() if key not in ("c", "cond_or_uncond")}
    c = {key: value for key, value in arguments["c"].items() if key not in ("transformer_options", "control")}
    chunk = cut_exactly(rest, rows, kept) | {"cond_or_uncond": arguments["cond_or_uncond"][place : place + 1]}
    chunk["c"] = cut_exactly(c, rows, kept)
    if "control" in arguments["c"]:
        chunk["c"]["control"] = cut_exactly(arguments["c"]["control"], rows, kept, shared=True)
    if "transformer_options" in arguments["c"]:
        options = dict(arguments["c"]["transformer_options"])
        for key in options.keys() & {"cond_or_uncond", "uuids"}:
            options[key] = options[key][place : place + 1]
        for key in options.keys() & {"cond_indices", "uncond_indices"}:
            options[key] = [row - kept.start for row in options[key] if kept.start <= row < kept.stop]
        if "cond_mark" in options:
            options["cond_mark"] = options["cond_mark"][kept]
        known = {"cond_or_uncond", "uuids", "cond_indices", "uncond_indices", "cond_mark", "sigmas", "sampling_sigmas"}
        for key, value in options.items():
            if key not in known and may_be_ordered(value, (rows, len(arguments["cond_or_uncond"]))):
                raise Uncut(f"the transformer option {key!r} may be ordered by rows")
        chunk["c"]["transformer_options"] = options
    return chunk


class A1111Seat(Seat):
    """A1111: the attribute `forward` of the denoiser's inner model, an object that lives as long as the sampler.

    It is called as (x, sigma, cond=...), with timesteps instead of sigma by DDIM, PLMS and UniPC, whose inner model
    returns eps. The rows are those of all images' branches, then those of uncond; there are no labels.
    """

    def sit(self) -> None:
        run, inner = self.run, self.run.denoiser.inner_model
        own = vars(inner)
        previous, replaced = inner.forward, own.get("forward")
        if getattr(replaced, "stepcache_run", None) is run:
            return

        def forward(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            def cut(kept: slice) -> Callable[[], Tensor]:
                return functools.partial(previous, x[kept], sigma[kept], **cut_exactly(extra, len(x), kept))

            compute = functools.partial(previous, x, sigma, **extra)
            if not run.open:
                return compute()
            level = self.sigma_at(sigma) if self._in_timesteps else sigma
            return run.answer(self._names(len(x)), x, level, (id(inner),), compute, cut)

        def undo() -> None:
            if own.get("forward") is not forward:
                return
            if replaced is None:
                del own["forward"]
            else:
                own["forward"] = replaced

        forward.stepcache_run = run
        inner.forward = forward
        self._undo.append(undo)

    def _names(self, rows: int) -> tuple[str, ...] | None:
        """One name for as many rows as there are images: "cond", "cond 2", ..., and "uncond" after the last of them.

        With AND prompts such a slice need not be one branch of every image, but it is the same in every evaluation,
        and the host splits its calls along slices. None for rows beyond the evaluation's own, and where the
        slices do not fit because the images have different numbers of branches.
        """
        run = self.run
        images, branches = len(run.branches()), run.params.text_cond.shape[0]
        begun = run.seen["rows"]
        run.seen["rows"] += rows
        if rows % images or branches % images or begun + rows > len(run.params.x):
            return None
        names = []
        for group in range(begun // images, (begun + rows) // images):
            kind, place = ("cond", group) if group < branches // images else ("uncond", group - branches // images)
            names.append(kind if place == 0 else f"{kind} {place + 1}")
        return tuple(names)

    def unpaired(self) -> str | None:
        """A slice stands for the same images as every other one only if one of them, or of their branches, is one."""
        images = self.run.branches()
        if len(images) == 1 or max(images) == 1:
            return None
        return "with prompts joined by AND, the images of a batch lie in another order here: all is computed"

    @property
    def _in_timesteps(self) -> bool:
        return not hasattr(self.run.denoiser.inner_model, "sigma_to_t")

    def scalings(self, sigma: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        inner = self.run.denoiser.inner_model
        if self._in_timesteps:
            return v_as_eps_scalings(sigma) if hasattr(inner, "predict_eps_from_z_and_v") else denoised_scalings(sigma)
        return flow_scalings(sigma) if self._flow else ModelScalings(inner)(sigma)

    @property
    def _flow(self) -> bool:
        """Stable Diffusion 3: its denoiser has no scalings, and its sigmas are times from 0 to 1."""
        inner = self.run.denoiser.inner_model
        return not hasattr(inner, "get_scalings") and float(inner.sigma_max) <= 1

    def sigma_at(self, timesteps: Tensor) -> Tensor:
        """Between two training timesteps log sigma is interpolated, as k-diffusion does."""
        table = self._sigma_table.log()
        at = timesteps.to(table.device, torch.float32).clamp(0, len(table) - 1)
        low = at.floor().long()
        high, weight = (low + 1).clamp(max=len(table) - 1), at - low
        return ((1 - weight) * table[low] + weight * table[high]).exp()

    def training_sigma(self) -> Callable[[float], float] | None:
        if self._in_timesteps:
            last = len(self._sigma_table) - 1
            return lambda share: float(self.sigma_at(torch.tensor((1 - share) * last)))
        return TrainingTable(self.run.denoiser.inner_model)

    def coordinate(self) -> Callable[[float], float] | None:
        return float if not self._in_timesteps and self._flow else None

    def parametrization(self, sigma: float) -> Parametrization:
        if not self._in_timesteps:
            return super().parametrization(sigma)
        # The model returns eps at x = sqrt(a) x0 + sqrt(1 - a) noise, so denoised = x / sqrt(a) - sigma eps.
        c_skip, c_out, _ = (float(c) for c in self.scalings(torch.tensor([sigma])))
        return Parametrization((c_skip, c_out), (math.hypot(sigma, 1) - sigma * c_skip, -sigma * c_out))


def v_as_eps_scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A network that predicts v, asked for eps at x = sqrt(a) x0 + sqrt(1 - a) noise with a = 1 / (sigma^2 + 1):

    eps = sqrt(1 - a) x + sqrt(a) v(x)
    """
    root = (sigma * sigma + 1).rsqrt()
    return sigma * root, root, torch.ones_like(sigma)
