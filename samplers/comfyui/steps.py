"""How many steps the samplers behind a node will have, from the queued workflow, before they run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stepcache import OptionError, StepMask

Workflow = dict[str, dict[str, Any]]
"""ComfyUI's PROMPT: node id -> {"class_type", "inputs"}. An input is a value, or a link: [node id, output]."""


def check_mask(mask: StepMask | None, prompt: Workflow | None, node: Any) -> None:
    """OptionError if a mask has another length than the run of a KSampler that gets the node's model.

    So the mask is an error of the node that has it. If the steps cannot be read here (they are linked, or the sampler
    is another node), the run itself refuses the mask.
    """
    if mask is None or isinstance(mask.mask, str):
        return
    for sampler, steps in samplers_of(prompt or {}, str(node)):
        try:
            mask.for_steps(steps)
        except OptionError as error:
            raise OptionError(f"{error}. The run is that of the node {sampler}") from None


def samplers_of(prompt: Workflow, node: str) -> Iterator[tuple[str, int]]:
    """KSampler nodes that get the model of `node`, directly or through others, each with the steps of its run."""
    waiting, seen = [node], {node}
    while waiting:
        source = waiting.pop()
        for name, target in prompt.items():
            linked = target["inputs"].get("model")
            if name in seen or not (isinstance(linked, list) and str(linked[0]) == source):
                continue
            seen.add(name)
            waiting.append(name)
            if (steps := _steps(target["class_type"], target["inputs"])) is not None:
                title = target.get("_meta", {}).get("title", target["class_type"])
                yield f"{title} (#{name})", steps


def _steps(kind: str, inputs: dict[str, Any]) -> int | None:
    """The steps of a sampler node's run; None if it is none, or if they are not written in it."""
    names = {"KSampler": ("steps",), "KSamplerAdvanced": ("steps", "start_at_step", "end_at_step")}.get(kind, ())
    numbers = [inputs.get(name) for name in names]
    if not numbers or not all(isinstance(number, int) for number in numbers):
        return None
    if kind == "KSampler":
        return int(inputs["steps"]) if inputs.get("denoise", 1) else None
    return max(0, min(inputs["steps"], inputs["end_at_step"]) - inputs["start_at_step"]) or None
