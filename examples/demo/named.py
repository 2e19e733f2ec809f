"""What is sampled, by the name that the command line is given: a shipped network, one of the zoo, a function of the
user's, or a diffusers pipeline.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from stepcache import OptionError
from stepcache.bench import Pipeline, Subject
from stepcache.extend import require, unknown

from . import networks, sampling, zoo

SHIPPED = ("unet", "dit")
GUIDED = (*SHIPPED, "colour")
"""Networks that are sampled at any guidance scale; the zoo's names have one of their own."""


def subject(name: str, guidance: float | None = None, prompt: str | None = None) -> Subject:
    """A network by name, or what a function `module:function` makes.

    The function is called without arguments, or with those of `prompt` and `guidance` that are given and that it has
    parameters for. Raises OptionError for a name that nothing has, and for an option that would do nothing.
    """
    if ":" in name:
        return _users(name, {"prompt": prompt, "guidance": guidance})
    if prompt is not None:
        raise OptionError(
            f"--prompt={prompt!r}: {name} draws classes, not prompts: choose one with --class, or give --pipeline or "
            "--network MODULE:FUNCTION"
        )
    if name not in (*SHIPPED, *zoo.NAMES):
        raise unknown("network", name, (*SHIPPED, *zoo.NAMES))
    if guidance is None or (guidance == sampling.GUIDANCE and name in GUIDED):
        return sampling.subject(name) if name in SHIPPED else zoo.subject(name)
    if name not in GUIDED:
        raise OptionError(f"--guidance={guidance:g}: accepted with {', '.join(GUIDED)}; {name} has one of its own")
    if name in SHIPPED:
        return sampling.subject(name, guidance)
    wrapper = partial(sampling.Guided, scale=guidance, null=networks.NO_EMOJI)
    return replace(zoo.subject(name), name=f"{name}, guidance {guidance:g}", guided=wrapper)


def _users(name: str, options: dict[str, Any]) -> Subject:
    module, _, function = name.partition(":")
    if not module or not function.isidentifier():
        raise OptionError(f"--network={name!r}: accepted is MODULE:FUNCTION, as mine:subject")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise OptionError(f"--network={name!r}: {error}. Run it in the folder of {module}.py, or install it") from error
    if not callable(make):
        raise OptionError(f"--network={name!r}: {module} has no function {function!r}")
    known = inspect.signature(make).parameters
    given = {key: value for key, value in options.items() if value is not None}
    if ignored := [key for key in given if key not in known]:
        raise OptionError(f"--{ignored[0]}: {function}() in {module} has no parameter {ignored[0]!r}")
    made: Any = make(**given)
    if not callable(getattr(made, "sample", None)):
        raise OptionError(
            f"--network={name!r}: {function}() returned {type(made).__name__}; accepted is a subject of "
            "stepcache.bench, as KDiffusion(...) or Pipeline(...)"
        )
    return made


def pipeline(source: str, prompt: str | None, guidance: float | None, device: str | None) -> Pipeline:
    """A diffusers pipeline from a folder or the hub, under its own scheduler; bfloat16 on CUDA, else float32."""
    kind = require("diffusers", "diffusers").DiffusionPipeline
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        pipe = kind.from_pretrained(source, torch_dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        raise OptionError(f"--pipeline={source!r} cannot be read as a diffusers pipeline: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"prompt": prompt, "guidance_scale": guidance}
    known = inspect.signature(pipe.__call__).parameters
    given = {key: value for key, value in arguments.items() if value is not None}
    if ignored := [key for key in given if key not in known]:
        raise OptionError(f"{ignored[0]}: {type(pipe).__name__} does not take it")
    name = type(pipe).__name__ + (f": {prompt}" if prompt else "")
    return Pipeline(name, pipe, arguments=given, device=device)


def classes(name: str) -> tuple[str, ...]:
    """The classes of a network by name, which seeds ask for in turn; empty if it has none."""
    if name == "colour":
        return networks.EMOJI_CLASSES
    digits = name.partition("@")[0] in (*SHIPPED, "edm", "v")
    return tuple(map(str, range(networks.CLASSES))) if digits else ()


def captions(name: str) -> Callable[[int], str]:
    """What a seed asks a network for."""
    known = classes(name)
    return lambda seed: f"{known[seed % len(known)]}, seed {seed}" if known else f"seed {seed}"


def seeds(name: str, label: str | None, first: int, count: int) -> list[int]:
    """So many seeds, of which each asks for this class if one is given; OptionError for a class that is not there."""
    if label is None:
        return list(range(first, first + count))
    known = classes(name)
    if not known:
        raise OptionError(f"--class={label!r}: {name} draws no classes")
    if label not in known:
        raise unknown("class", label, known)
    ahead = (known.index(label) - first) % len(known)
    return [first + ahead + len(known) * number for number in range(count)]
