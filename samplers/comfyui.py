"""ComfyUI: the nodes behind custom_nodes/stepcache, and what stands between ComfyUI's samplers and its models.

A model that went through a node carries one wrapper, at OUTER_SAMPLE, which holds options only. When a sampler
begins, it makes the run, and the run's own copy of the model's options gets two more wrappers: PREDICT_NOISE counts
evaluations, CALC_COND_BATCH answers them. When the sampler ends, however it ends, that copy is dropped and the run with
it.

CALC_COND_BATCH gets the latent in sigma space and gives denoised for every branch. It covers every architecture and
lies outside of ControlNets (not run where an evaluation is skipped) and of compiled graphs.

Nothing of ComfyUI is imported before ComfyUI calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from stepcache import METHODS, Method, OptionError, Report, StepMask
from stepcache import method as make_method
from stepcache.extend import PRESETS, Call, Engine, main_number, wide, widened

from .k_diffusion import EVALUATIONS as K_DIFFUSION
from .parametrization import ScalingsAsFloats

KEY = "stepcache"
"""Under which key our wrappers stand; never the built-in nodes' `easycache`."""

EVALUATIONS = {
    **K_DIFFUSION,
    **dict.fromkeys(
        (
            "sample_euler_cfg_pp",
            "sample_euler_ancestral_cfg_pp",
            "sample_dpmpp_2m_cfg_pp",
            "sample_dpmpp_2m_sde_gpu",
            "sample_dpmpp_2m_sde_heun",
            "sample_dpmpp_2m_sde_heun_gpu",
            "sample_dpmpp_3m_sde_gpu",
            "sample_ddpm",
            "sample_lcm",
            "sample_ipndm",
            "sample_ipndm_v",
            "sample_deis",
            "sample_res_multistep",
            "sample_res_multistep_cfg_pp",
            "sample_res_multistep_ancestral",
            "sample_res_multistep_ancestral_cfg_pp",
            "sample_gradient_estimation",
            "sample_gradient_estimation_cfg_pp",
            "sample_er_sde",
            "sample_sa_solver",
            "sample_unipc",
            "sample_unipc_bh2",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "sample_dpmpp_2s_ancestral_cfg_pp",
            "sample_dpmpp_sde_gpu",
            "sample_seeds_2",
            "sample_sa_solver_pece",
        ),
        2,
    ),
}
"""Evaluations of one step, by the name of the sampler function (counted in ComfyUI 0.3.64); the last step has one."""

AT_STEP_ENDS = ("sample_heun", "sample_sa_solver_pece")
"""Samplers with two evaluations a step, both at sigmas of the schedule."""

OFF_SCHEDULE = ("dpm_fast_function",)
ADAPTIVE = ("dpm_adaptive_function",)
"""Samplers that choose their step sizes from differences between evaluations: every one of them is computed."""

ROLES = {"positive": "cond", "negative": "uncond"}
OWN = -1.0
"""In a node's number fields: the method's own default."""

log = logging.getLogger("stepcache")


class Cache:
    """What a node leaves on a model: options, and the report of the last run. It stands at OUTER_SAMPLE.

    Args:
        method: what to skip and how to predict it.
        decide:"reference": the positive branch's change decides, over all images of a batch. "each": every branch
            of every image decides for itself, and an evaluation is skipped where all of them would.

    Copies of a model share it: it holds nothing of a run.
    """

    def __init__(self, method: Method, decide: str = "reference") -> None:
        self.method = method
        self.decide = decide
        self.report = Report(method.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self

    def sample(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., Any] | None = None,
        *args: Any,
        **keywords: Any,
    ) -> Tensor:
        """The wrapper at OUTER_SAMPLE: one run, from its first evaluation to its end, however it ends."""
        guider = executor.class_obj
        name = _function_name(sampler)
        run = _Run(guider, self.method, self.decide, name)
        stages = EVALUATIONS.get(name)
        churn = getattr(sampler, "extra_options", {}).get("s_churn")
        known = None if name in (*OFF_SCHEDULE, *ADAPTIVE) or len(sigmas) < 2 else sigmas
        run.engine.begin(known, stages, (stages == 1 or name in AT_STEP_ENDS) and not churn, loops=False)
        usual = guider.model_options
        guider.model_options = _with_wrappers(usual, predict_noise=run.count, calc_cond_batch=run.answer)

        def note(step: int, *info: Any) -> Any:
            run.engine.note(int(step))
            return callback(step, *info) if callback is not None else None

        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, note, *args, **keywords)
        finally:
            guider.model_options = usual
            run.engine.end()
            self.report = run.engine.report
            self.report.notes.extend(sentence for sentence in run.notes if sentence not in self.report.notes)
            log.info("StepCache: %s", in_one_line(self.report))


class _Run:
    """One sampling loop: which evaluation and which branches a call of CALC_COND_BATCH stands for."""

    def __init__(self, guider: Any, method: Method, decide: str, sampler: str) -> None:
        self.guider = guider
        self.each = decide == "each"
        self.sampling = guider.model_patcher.get_model_object("model_sampling")
        self.notes: list[str] = []
        self.evaluation = 0
        self._seen: list[tuple[str, tuple | None]] = []
        self._forms: dict[str, tuple] = {}
        self._form = 0
        if sampler in ADAPTIVE:
            self.notes.append("the sampler chooses its steps by comparing evaluations: all are computed")
            method = make_method("none")
        meaning = ScalingsAsFloats(partial(scalings, self.sampling, x=torch.ones(1)))
        self.engine = Engine(
            method,
            decide=decide,
            training_sigma=lambda share: float(self.sampling.percent_to_sigma(share)),
            coordinate=meaning.coordinate(),
            parametrization=meaning.parametrization,
            lowest_sigma=float(self.sampling.sigma_min),
            network=guider.model_patcher.model,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Run:
        return self

    def count(self, executor: Any, *args: Any, **keywords: Any) -> Tensor:
        """The wrapper at PREDICT_NOISE: the sampler asks for one evaluation."""
        self.evaluation += 1
        self._seen.clear()
        return executor(*args, **keywords)

    def answer(
        self,
        executor: Any,
        model: Any,
        conds: list[list[dict[str, Any]] | None],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
    ) -> list[Tensor]:
        """The wrapper at CALC_COND_BATCH: denoised (B, ...) for every branch; zeros for those that are None."""

        def compute(asked: list[list[dict[str, Any]] | None]) -> list[Tensor]:
            return executor(model, asked, x, timestep, model_options)

        window = model_options.get("transformer_options", {}).get("context_window")
        if window is not None and self.engine.method.skip == "uncond":
            # What follows cond on one window's frames says nothing of another's.
            self._say("skip='uncond': context windows would each need an reference: all are computed")
            return compute(conds)
        names = self._names(conds, timestep, window)
        if names is None:
            return compute(conds)
        return self.engine(
            BatchCall(compute, conds, self.sampling, names, x, timestep, self.evaluation, (self._form,), self.each)
        )

    def _names(self, conds: Sequence[Any], timestep: Tensor, window: Any) -> dict[int, str] | None:
        """The branches of a call, by their place in it; None where the call is not the guider's own.

        Guidance that evaluates a branch once more, changed from outside (PAG, SAG, skipped layers), asks in the same
        evaluation for a name that has been seen, or for a branch that is not the guider's. Windows of a long video
        ask for the same branches in turn, each on its own frames; they are told apart by their order.
        """
        if self.evaluation == 0:
            self._say("the guider does not announce its evaluations: all are computed")
            return None
        names: dict[int, str] = {}
        forms: dict[str, tuple] = {}
        seen = [*self._seen]
        frames = None if window is None else tuple(getattr(window, "index_list", ()))
        for place, cond in enumerate(conds):
            if cond is None:
                continue
            role = self._role(cond)
            active = _active(cond, timestep)
            if role is None or not active or (role, frames) in seen:
                return None
            occurrence = sum(before == role for before, _ in seen)
            name = f"{role} {occurrence + 1}" if occurrence else role
            seen.append((role, frames))
            names[place], forms[name] = name, (active, frames)
        if any(self._forms.get(name, form) != form for name, form in forms.items()):
            self._form += 1
        self._forms.update(forms)
        self._seen = seen
        return names or None

    def _role(self, cond: list[dict[str, Any]]) -> str | None:
        """Under which name the guider has these branches; None where it has not."""
        asked = {entry["uuid"] for entry in cond}
        for name, own in getattr(self.guider, "conds", {}).items():
            if own is cond or (asked and asked <= {entry["uuid"] for entry in own or ()}):
                return ROLES.get(name, name)
        return None

    def _say(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


class BatchCall(Call):
    """One call of CALC_COND_BATCH, translated to network space.

    The model's own `model_sampling` is linear in x and in the network's output, and says how:

        c_in = calculate_input(sigma, 1),  c_skip = calculate_denoised(sigma, 0, 1),
        c_out = calculate_denoised(sigma, 1, 1) - c_skip
    """

    def __init__(
        self,
        compute: Callable[[list[Any]], list[Tensor]],
        conds: list[Any],
        sampling: Any,
        places: dict[int, str],
        x: Tensor,
        sigma: Tensor,
        evaluation: int,
        form: tuple,
        each: bool,
    ) -> None:
        self._compute, self._conds, self._x = compute, conds, x
        self.sigma, self.evaluation, self.cache_key = sigma, evaluation, form
        # In the order in which ComfyUI batches them, last first: so a signal from inside the model divides rightly.
        self._places, self._sampling = sorted(places, reverse=True), sampling
        self._rows = x.shape[0] if each else 1
        names = [places[place] for place in self._places]
        rows = range(1, self._rows + 1)
        self.names = tuple(f"{name} of image {row}" for name in names for row in rows) if self._rows > 1 else (*names,)
        self.latent = x.expand(len(self.names), *x.shape)  # one latent stands for every branch
        self.requires_grad = x.requires_grad

    def run_model(self) -> list[Tensor]:
        return self._compute(self._conds)

    def part(self, name: str) -> BatchCall:
        """The same call with the other branches left out, as None: their ControlNets are not run either."""
        place = self._places[self.names.index(name)]
        conds = [cond if k == place else None for k, cond in enumerate(self._conds)]
        return BatchCall(
            self._compute,
            conds,
            self._sampling,
            {place: name},
            self._x,
            self.sigma,
            self.evaluation,
            self.cache_key,
            False,
        )

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, as factors for x."""
        return scalings(self._sampling, self.sigma, self._x)

    @torch.no_grad()
    def inputs(self) -> tuple[Tensor, ...]:
        return (self._x * self._factors[2]).chunk(self._rows) * len(self._places)

    @torch.no_grad()
    def outputs(self, answer: list[Tensor]) -> tuple[Tensor, ...]:
        c_skip, c_out, _ = self._factors
        skipped = self._x * c_skip
        raw = ((widened(answer[place]) - skipped).div_(c_out) for place in self._places)
        return tuple(part for out in raw for part in out.chunk(self._rows))

    @torch.no_grad()
    def rebuild(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        c_skip, c_out, _ = self._factors
        skipped = self._x * c_skip
        answer = [torch.zeros_like(self._x) for _ in self._conds]
        for k, place in enumerate(self._places):
            rows = outputs[k * self._rows : (k + 1) * self._rows]
            out = rows[0] if len(rows) == 1 else torch.cat(rows)
            answer[place] = torch.addcmul(skipped, out, c_out).to(self._x.dtype)
        return answer


def scalings(sampling: Any, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in of a `model_sampling` at sigma (B,), as factors for x (B, ...)."""
    sigma = sigma.to(x.device, wide(x.dtype))
    one = torch.ones((sigma.shape[0], *(1 for _ in x.shape[1:])), device=x.device, dtype=sigma.dtype)
    nothing = torch.zeros_like(one)
    c_in = sampling.calculate_input(sigma, one)
    c_skip = sampling.calculate_denoised(sigma, nothing, one)
    c_out = sampling.calculate_denoised(sigma, one, nothing)
    return c_skip, c_out, c_in


def _active(cond: list[dict[str, Any]], timestep: Tensor) -> tuple:
    """What of a branch acts at this sigma: prompts, ControlNets and weight keyframes may have a time of their own.

    Sigma is read, which waits for an accelerator, only where something has.
    """
    sigma: float | None = None

    def within(start: Any, end: Any) -> bool:
        nonlocal sigma
        if start is None and end is None:
            return True
        if sigma is None:
            sigma = float(timestep.flatten()[0])
        return (start is None or sigma <= float(start)) and (end is None or sigma >= float(end))

    active = []
    for entry in cond:
        if not within(entry.get("timestep_start"), entry.get("timestep_end")):
            continue
        controls, control = [], entry.get("control")
        while control is not None:
            span = getattr(control, "timestep_range", None)
            controls.append(within(*span) if span is not None else True)
            control = getattr(control, "previous_controlnet", None)
        frames = []
        for hook in getattr(entry.get("hooks"), "hooks", ()):
            group = getattr(hook, "hook_keyframe", None)
            frames.append(sum(within(frame.start_t, None) for frame in getattr(group, "keyframes", ())))
        active.append((entry["uuid"], tuple(controls), tuple(frames)))
    return tuple(active)


def _function_name(sampler: Any) -> str:
    function = getattr(sampler, "sampler_function", None)
    function = getattr(function, "func", function)  # a functools.partial
    return getattr(function, "__name__", "")


def _with_wrappers(options: dict[str, Any], **wrappers: Callable[..., Any]) -> dict[str, Any]:
    """A copy of a model's options with these wrappers behind those that it has; the options stay as they are."""
    options = dict(options)
    transformer = options["transformer_options"] = dict(options.get("transformer_options", {}))
    kinds = transformer["wrappers"] = dict(transformer.get("wrappers", {}))
    for kind, wrapper in wrappers.items():
        kinds[kind] = {**kinds.get(kind, {}), KEY: [wrapper]}
    return options


def in_one_line(report: Report) -> str:
    """A report for the log: `forecast: 20 steps, 20 evaluations, 22 of 40 calls made, 18 skipped (1.82x fewer)`."""
    if not report.events:
        return f"{report.method}: nothing was evaluated through it" + "".join(f"; {note}" for note in report.notes)
    steps = "" if report.steps is None else f"{report.steps} steps, "
    return (
        f"{report.method}: {steps}{report.evaluations} evaluations, {report.calls} of {len(report.events)} calls made, "
        f"{report.skipped} skipped ({report.speedup:.2f}x fewer)"
    )


def patched(model: Any, method: Method, decide: str = "reference") -> Any:
    """A clone of a model patcher with the cache on it; a cache that was on it is replaced."""
    kinds = _wrapper_kinds()
    clone = model.clone()
    clone.remove_wrappers_with_key(kinds.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, Cache(method, decide).sample)
    return clone


def cache_of(model: Any) -> Cache | None:
    """The cache that stands on a model patcher, if one does."""
    found = model.get_wrappers(_wrapper_kinds().OUTER_SAMPLE, KEY)
    return found[-1].__self__ if found else None


def _wrapper_kinds() -> Any:
    extension = import_module("comfy.patcher_extension")
    for name in ("OUTER_SAMPLE", "PREDICT_NOISE", "CALC_COND_BATCH"):
        if not hasattr(extension.WrappersMP, name):
            raise RuntimeError(f"StepCache: this ComfyUI has no wrappers at {name}; update ComfyUI to 0.3.64 or newer")
    return extension.WrappersMP


def chosen_method(
    method: str,
    number: float,
    start: float,
    end: float,
    mask: str,
    policy: str,
    options: str = "",
    skip: str = "all",
) -> Method:
    """The method that a node's fields ask for; a key written in `options` wins over its field.

    With "none" the other fields are not looked at, so that one field turns it off. OptionError naming the option, the
    value and what is accepted.
    """
    if method == "none":
        return make_method(method)
    chosen: dict[str, Any] = {} if skip == "all" else {"skip": skip}
    if number != OWN:
        main = main_number(method)
        if main is None:
            raise OptionError(f"number={number:g}: {method} has none; leave it at {OWN:g}")
        if isinstance(main[1], int) and not float(number).is_integer():
            raise OptionError(f"number={number:g}: {method}'s {main[0]} is a whole number")
        chosen[main[0]] = int(number) if isinstance(main[1], int) else number
    for key, share in (("start", start), ("end", end)):
        if share != OWN:
            chosen[key] = share
    text = ",".join(line.strip().strip(",") for line in options.splitlines() if line.strip())
    keys = {part.partition("=")[0].strip() for part in text.split(",")}
    if mask != "none":
        chosen["mask"] = StepMask(mask, policy)
    elif method == "static" and not keys & {"mask"}:
        raise OptionError(f"static needs a mask: a preset ({', '.join(PRESETS)}), or mask=110... in the options")
    return make_method(method, text, **{key: value for key, value in chosen.items() if key not in keys})


METHOD_TIP = (
    "forecast: half the model calls, no calibration. ucache, easycache: skip while an estimated error stays under a "
    "threshold. fbcache, dbcache, taylorseer, cache-dit: decide by the model's first blocks. none: off, whatever "
    "stands in the other fields."
)
NUMBER_TIP = "The method's main number; -1: its default. " + "; ".join(
    f"{name}: {main[0]} ({main[1]:g})" for name in METHODS if (main := main_number(name)) is not None
)


class StepCacheNode:
    """Skips model calls that can be predicted: MODEL in, MODEL out, before the sampler."""

    CATEGORY = "model_patches/stepcache"
    DESCRIPTION = "Answers some of the sampler's evaluations without running the model. Put it before the sampler."
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"default": OWN, "min": OWN, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "method": (list(METHODS), {"default": "forecast", "tooltip": METHOD_TIP}),
                "number": (
                    "FLOAT",
                    {"default": OWN, "min": OWN, "max": 1000.0, "step": 0.01, "tooltip": NUMBER_TIP},
                ),
                "start": (
                    "FLOAT",
                    {**share, "tooltip": "Nothing is skipped before this share of the run; -1: default."},
                ),
                "end": ("FLOAT", {**share, "tooltip": "Nothing is skipped after this share of the run; -1: default."}),
                "mask": (
                    ["none", *PRESETS],
                    {"default": "none", "tooltip": "Steps that are always computed; ultra computes the fewest."},
                ),
                "policy": (
                    ["dynamic", "static"],
                    {"default": "dynamic", "tooltip": "On the mask's other steps: ask the method, or skip them all."},
                ),
            },
            "optional": {
                "decide": (
                    ["reference", "each"],
                    {
                        "default": "reference",
                        "tooltip": "reference: the positive prompt's change decides, over the whole batch. each: every "
                        "prompt of every image must agree to a skip.",
                    },
                ),
                "skip": (
                    ["all", "uncond"],
                    {
                        "default": "all",
                        "tooltip": "all: a skipped evaluation runs the model for no prompt. followers: for samplers "
                        "that add noise (Euler a, DPM++ SDE): the positive prompt is always run, the negative one is "
                        "predicted from it, as noise cannot be. Saves half as much; with cfg 1 nothing.",
                    },
                ),
                "options": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Further options, key=value separated by commas or lines: warmup=3, "
                        "max_consecutive=2, last_step=1, mask=1101... They win over the fields above.",
                    },
                ),
            },
        }

    def patch(
        self,
        model: Any,
        method: str,
        number: float,
        start: float,
        end: float,
        mask: str,
        policy: str,
        decide: str = "reference",
        skip: str = "all",
        options: str = "",
    ) -> tuple[Any]:
        return (patched(model, chosen_method(method, number, start, end, mask, policy, options, skip), decide),)


class FirstBlockCacheNode:
    """The inputs, names, defaults and order of "Apply First Block Cache" (Comfy-WaveSpeed), on our `fbcache`."""

    CATEGORY = "model_patches/stepcache"
    DESCRIPTION = (
        "First Block Cache with the inputs of the node Apply First Block Cache: swap the node, keep the numbers."
    )
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "object_to_patch": (
                    "STRING",
                    {"default": "diffusion_model", "tooltip": "The part of the model whose first block is looked at."},
                ),
                "residual_diff_threshold": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.001,
                        "tooltip": "How far the first block's residual may have changed, as a share; higher is faster "
                        "and worse, 0 is off.",
                    },
                ),
                "start": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "From this share of sampling on.",
                    },
                ),
                "end": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "Up to this share of sampling."},
                ),
                "max_consecutive_cache_hits": (
                    "INT",
                    {"default": -1, "min": -1, "tooltip": "Skips in a row at most; -1: no limit, 0: off."},
                ),
            }
        }

    def patch(
        self,
        model: Any,
        object_to_patch: str,
        residual_diff_threshold: float,
        start: float = 0.0,
        end: float = 1.0,
        max_consecutive_cache_hits: int = -1,
    ) -> tuple[Any]:
        chosen = make_method(
            "fbcache",
            residual_diff_threshold=residual_diff_threshold,
            start=start,
            end=end,
            max_consecutive_cache_hits=max_consecutive_cache_hits,
            object_to_patch=object_to_patch,
        )
        return (patched(model, chosen),)


class ReportNode:
    """The report of the model's last run, once its latent is there."""

    CATEGORY = "model_patches/stepcache"
    DESCRIPTION = "What the cache did in the last run: passes the latent through and gives the report as text."
    FUNCTION = "read"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent": ("LATENT", {"tooltip": "From the sampler: the report is read when it has run."}),
                "model": ("MODEL", {"tooltip": "The model that the sampler got, from the StepCache node."}),
                "table": ("BOOLEAN", {"default": False, "tooltip": "A row for every evaluation too."}),
            }
        }

    def read(self, latent: Any, model: Any, table: bool = False) -> tuple[Any, str]:
        cache = cache_of(model)
        if cache is None:
            return latent, "StepCache: no cache stands on this model; connect the model that the sampler got"
        return latent, f"{cache.report}\n\n{cache.report.table()}" if table else str(cache.report)


NODE_CLASS_MAPPINGS = {
    "StepCache": StepCacheNode,
    "StepCacheFirstBlock": FirstBlockCacheNode,
    "StepCacheReport": ReportNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "StepCache": "StepCache",
    "StepCacheFirstBlock": "Apply First Block Cache (StepCache)",
    "StepCacheReport": "StepCache Report",
}


def exports() -> dict[str, Any]:
    """What custom_nodes/stepcache/__init__.py defines: the entry point (V3) where the host has one, else the mappings.

    One of the two, never both: of a module with both, ComfyUI takes the mappings and leaves the entry point uncalled.
    """
    try:
        import_module("comfy_api.latest")
    except ImportError:
        return {
            "NODE_CLASS_MAPPINGS": NODE_CLASS_MAPPINGS,
            "NODE_DISPLAY_NAME_MAPPINGS": NODE_DISPLAY_NAME_MAPPINGS,
        }
    return {"comfy_entrypoint": comfy_entrypoint}


async def comfy_entrypoint() -> Any:
    """The same nodes for ComfyUI's second interface (V3), made from the classes above."""
    latest = import_module("comfy_api.latest")

    class Extension(latest.ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [_as_v3(latest.io, node_id, node) for node_id, node in NODE_CLASS_MAPPINGS.items()]

    return Extension()


def _as_v3(io: Any, node_id: str, node: type) -> type:
    kinds = {
        "MODEL": io.Model,
        "LATENT": io.Latent,
        "STRING": io.String,
        "FLOAT": io.Float,
        "INT": io.Int,
        "BOOLEAN": io.Boolean,
    }

    def inputs() -> list[Any]:
        found = []
        for group, entries in node.INPUT_TYPES().items():
            for name, (kind, *rest) in entries.items():
                options = {**(rest[0] if rest else {}), "optional": group == "optional"}
                if isinstance(kind, list):
                    found.append(io.Combo.Input(name, options=kind, **options))
                else:
                    found.append(kinds[kind].Input(name, **options))
        return found

    def define_schema(cls: type) -> Any:
        names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
        return io.Schema(
            node_id=node_id,
            display_name=NODE_DISPLAY_NAME_MAPPINGS[node_id],
            category=node.CATEGORY,
            description=node.DESCRIPTION,
            inputs=inputs(),
            outputs=[
                kinds[kind].Output(display_name=name) for kind, name in zip(node.RETURN_TYPES, names, strict=True)
            ],
        )

    def execute(cls: type, **given: Any) -> Any:
        return io.NodeOutput(*getattr(node(), node.FUNCTION)(**given))

    methods = {"define_schema": classmethod(define_schema), "execute": classmethod(execute), "__module__": __name__}
    return type(node.__name__, (io.ComfyNode,), methods)
