"""The panel's components: two fields that everyone needs, and a fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepcache import METHODS
from stepcache.extend import PRESETS, main_number

from .messages import TITLE
from .options import CUSTOM, SKIPS, Options, default_window, method_default

SPEED_CHOICES = {
    "2x": "2x: every second step",
    "3x": "3x: every third step",
    "4x": "4x: every fourth step",
    CUSTOM: "custom: method under Advanced",
}
"""The panel's words for each speed."""

METHOD_INFO = {
    "forecast": "computes every second, third, ... step and predicts the others",
    "ucache": "skips while the image has changed little since the last computed step",
    "easycache": "skips while the image has changed little, counted in training time",
    "spectrum": "leaves gaps that grow during the run",
    "hicache": "computes every so many steps, predicts by Hermite polynomials",
    "magcache": "skips by ratios of your model, which a run with the option calibrate=1 measures",
    "seacache": "skips while the latent has changed little",
    "static": "skips at every zero of the mask",
    "profile": "skips as stepcache tune has found for your model, with the option path=FILE",
}
"""What each method does, in a sentence; of the others, that they skip while the latent has changed little."""

NUMBER_INFO = {
    "interval": "One step in so many is computed. Higher is faster and further from the full image.",
    "threshold": "How much change may add up before a step is computed. Higher is faster and further from the full "
    "image.",
    "residual_diff_threshold": "The change, as a share, below which a step is skipped. 0 skips nothing, 0.1 is a "
    "start; higher is faster and further from the full image.",
    "window_size": "Steps from one computed step to the next, at first. Higher is faster and further from the full "
    "image.",
}
"""What each method's main number does, by the option's name."""

INFO = {
    "enabled": "Predicts some of the steps instead of running the model. Unticked, nothing changes.",
    "speed": "The steps that the model computes; the others are predicted. Faster is further from the full image. "
    "The first two steps and the last are always computed: at 2x, 11 of 20. Runs of 8 steps or fewer stay as they are. "
    "With Euler a, DPM++ 2M SDE and 3M SDE it saves less: see What is skipped, under Advanced.",
    "skip": "automatic: with Euler a, DPM++ 2M SDE and 3M SDE the negative prompt only, else whole steps. Negative "
    "prompt only: saves about half as much, is nearer to the full image, and needs a CFG scale above 1.",
    "window": "Per cent of the run: steps are skipped between these two only. Empty: the numbers in grey.",
    "warmup": "Steps at the start that are computed. Higher is slower and keeps the composition. Empty: the number in "
    "grey.",
    "max_consecutive": "Steps. Lower is slower and nearer to the full image. Empty: no limit.",
    "mask": "Steps that are always computed: a preset (slow has most, ultra fewest), or one digit per step: 1 is "
    "computed, 0 may be skipped.",
    "policy": "dynamic: the method may compute these steps, too. static: all of them are skipped.",
    "hires": "Unticked, the second pass is computed in full.",
    "text": "key=value,key=value. They override the fields above; docs/methods.md lists them.",
    "table": "A row per step: computed or skipped, and why.",
}
"""What each field does, in which unit; of method and number, see below."""


def build(tab: str) -> dict[str, Any]:
    """Builds the panel of a tab. Returns the components by the names of `Options` and in their order."""
    import gradio as gr

    default = Options()
    made: dict[str, Any] = {}

    def add(option: str, component: Any, *arguments: Any, **keywords: Any) -> None:
        named = {"elem_id": f"stepcache_{tab}_{option}", "info": INFO.get(option)}
        made[option] = component(*arguments, **{**named, **keywords})

    def text(option: str, label: str, placeholder: str, **keywords: Any) -> None:
        add(option, gr.Textbox, "", label=label, placeholder=placeholder, max_lines=1, **keywords)

    with gr.Accordion(TITLE, open=False, elem_id=f"stepcache_{tab}_panel"):
        add("enabled", gr.Checkbox, default.enabled, label="Enable")
        speeds = [*SPEED_CHOICES.values()]
        add("speed", gr.Radio, speeds, value=SPEED_CHOICES[default.speed], label="Speed")
        with gr.Accordion("Advanced", open=False, elem_id=f"stepcache_{tab}_advanced"):
            with gr.Row(visible=default.speed == CUSTOM) as custom:
                methods = [name for name in METHODS if name != "none"]
                info = method_info(default.method)
                add("method", gr.Dropdown, methods, value=default.method, label="Method", info=info)
                info, placeholder = number_hints(default.method)
                text("number", "Number", placeholder, info=info)
            add("skip", gr.Radio, [*SKIPS], value=default.skip, label="What is skipped")
            with gr.Row():
                text("window", "Skip between", default_window(default.method))
                text("warmup", "Always computed at the start", warmup_hint(default.method))
                text("max_consecutive", "Most skipped in a row", "no limit")
            with gr.Row():
                presets = ["none", *PRESETS]
                add("mask", gr.Dropdown, presets, value="none", label="Mask", allow_custom_value=True)
                policies, label = ["dynamic", "static"], "At the zeros of the mask"
                add("policy", gr.Radio, policies, value=default.policy, label=label, visible=False)
            label = "Speed up the second pass of hires. fix, too"
            add("hires", gr.Checkbox, default.hires, label=label, visible=tab == "txt2img")
            text("text", "More options", "last_step=1,max_cached=8")
            add("table", gr.Checkbox, default.table, label="List every step in the console")

    def changed(speed: str, name: str) -> list[Any]:
        """Shows method and number only if they act, and the defaults of the method that acts."""
        custom_speed = speed == SPEED_CHOICES[CUSTOM]
        info, placeholder = number_hints(name)
        acting = name if custom_speed else "forecast"
        return [
            gr.update(visible=custom_speed),
            gr.update(info=method_info(name)),
            gr.update(info=info, placeholder=placeholder),
            gr.update(placeholder=default_window(acting)),
            gr.update(placeholder=warmup_hint(acting)),
        ]

    hinted = [custom, *(made[option] for option in ("method", "number", "window", "warmup"))]
    _keep(changed, [made["speed"], made["method"]], hinted)
    _keep(lambda mask: gr.update(visible=Options(mask=mask or "").masked), [made["mask"]], [made["policy"]])
    return {option: made[option] for option in vars(default)}


def _keep(function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Calls the function at every change of its inputs, and when the page is loaded: hosts save defaults of fields."""
    from gradio.context import Context

    for component in inputs:
        component.change(function, inputs=inputs, outputs=outputs, show_progress=False)
    if Context.root_block is not None:
        Context.root_block.load(function, inputs=inputs, outputs=outputs, show_progress=False)


def method_info(name: str) -> str:
    """The line under the field Method."""
    return f"{name} {METHOD_INFO.get(name, 'skips while the latent has changed little')}."


def number_hints(name: str) -> tuple[str, str]:
    """The line under the field Number, and the method's default in grey."""
    main = main_number(name)
    if main is None:
        return f"{name} takes no number.", ""
    return NUMBER_INFO.get(main[0], f"The option {main[0]} of {name}."), f"{main[1]:g}"


def warmup_hint(name: str) -> str:
    """The method's own warm-up, in grey. Forecast computes the first two steps without one."""
    return "2" if name == "forecast" else f"{method_default(name, 'warmup'):g}"
