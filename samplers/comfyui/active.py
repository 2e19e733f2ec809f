"""Which prompts, ControlNets and weights of a branch are active at a sigma."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def active_parts(cond: list[dict[str, Any]], timestep: Tensor) -> tuple[Any, ...]:
    """The active parts of a branch: its prompts, ControlNets and weight keyframes may each have a start and an end.

    The result is compared between evaluations: if it changes, the cache is dropped. Sigma is only read, which waits
    for the accelerator, if something has a start or an end.
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
