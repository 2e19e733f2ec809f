"""The script that a host sees: its panel, and the hooks that the host calls."""

from __future__ import annotations

from typing import Any

from stepcache import METHODS, OptionError
from stepcache.extend import PRESETS, flag, main_number

from . import infotext
from .axes import options_of_axes
from .job import Job
from .messages import TITLE, notify
from .options import Options, default_window
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
        components = _components("img2img" if is_img2img else "txt2img")
        self.infotext_fields = infotext.paste_fields(components)
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
            job = Job(options, options.as_method())
            p.extra_generation_params.update(infotext.write(options))
        except OptionError as error:
            notify(p, f"{error}; this job runs without the cache")
        except Exception as error:
            notify(p, f"{type(error).__name__}: {error}; this job runs without the cache")
        else:
            p.stepcache_job = job

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


def _components(tab: str) -> dict[str, Any]:
    """Builds the panel's components, by the names of `Options` and in their order."""
    import gradio as gr

    default = Options()
    made: dict[str, Any] = {}

    def add(option: str, component: Any, *arguments: Any, name: str | None = None, **keywords: Any) -> None:
        made[option] = component(*arguments, elem_id=f"stepcache_{tab}_{name or option}", **keywords)

    with gr.Accordion(TITLE, open=False, elem_id=f"stepcache_{tab}_panel"):
        with gr.Row():
            add("enabled", gr.Checkbox, default.enabled, label="Enable")
            add("hires", gr.Checkbox, default.hires, label="For hires. fix too")
        with gr.Row():
            methods = [name for name in METHODS if name != "none"]
            add("method", gr.Dropdown, methods, value=default.method, label="Method")
            info, placeholder = _number_hints(default.method)
            add("number", gr.Textbox, "", label="Number", info=info, placeholder=placeholder, max_lines=1)
            add(
                "window",
                gr.Textbox,
                "",
                label="Window",
                info="the part of the run in which steps may be skipped, like 0.15-0.95",
                placeholder=default_window(default.method),
                max_lines=1,
            )
        with gr.Row():
            add(
                "mask",
                gr.Dropdown,
                ["none", *PRESETS],
                value="none",
                label="Mask",
                info="a preset, or one digit per step: 1 computes, 0 may be skipped",
                allow_custom_value=True,
            )
            info = "on zeros: dynamic asks the method, static skips"
            add("policy", gr.Radio, ["dynamic", "static"], value=default.policy, label="Mask policy", info=info)
        label = "Skip the negative prompt only (for samplers with noise: a, SDE)"
        add("negative_only", gr.Checkbox, default.negative_only, label=label)
        with gr.Accordion("Advanced", open=False, elem_id=f"stepcache_{tab}_advanced"):
            with gr.Row():
                add("warmup", gr.Slider, 0, 50, default.warmup, step=1, label="Steps computed at the start")
                label = "Most skipped in a row (-1: no limit)"
                add("max_consecutive", gr.Slider, -1, 20, default.max_consecutive, step=1, label=label)
            add(
                "text",
                gr.Textbox,
                "",
                name="options",
                label="More options",
                info="key=value,key=value; these override the fields above",
                placeholder="last_step=1,max_cached=8",
                max_lines=1,
            )
            add("table", gr.Checkbox, default.table, label="List every evaluation in the console")

    def hints(name: str) -> tuple[Any, Any]:
        info, placeholder = _number_hints(name)
        return gr.update(info=info, placeholder=placeholder), gr.update(placeholder=default_window(name))

    made["method"].change(hints, inputs=[made["method"]], outputs=[made["number"], made["window"]], show_progress=False)
    return {option: made[option] for option in vars(default)}


def _number_hints(name: str) -> tuple[str, str]:
    """The line under the field Number, and the default in grey."""
    main = main_number(name)
    if main is None:
        return f"{name} takes no number", ""
    return f"{name}'s {main[0]}; empty: {main[1]:g}", f"{main[1]:g}"
