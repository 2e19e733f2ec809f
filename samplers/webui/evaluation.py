"""What a host's guidance wrapper knows of an evaluation before it calls the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, as announced by the host's callback `on_cfg_denoiser`.

    Attributes:
        number: how many evaluations came before it in this run.
        rows: rows of the guidance wrapper's whole batch.
        prompts: how many prompts each image has (more than one if they are joined by AND).
        cache_key: the conditioning of each prompt at this step. It changes if a prompt is edited during the run.
    """

    number: int
    rows: int
    prompts: tuple[int, ...]
    cache_key: tuple[int, ...]

    @classmethod
    def of(cls, denoiser: Any, params: Any) -> Evaluation:
        """From the guidance wrapper and the callback's argument."""
        given = denoiser.sampler.sampler_extra_args
        batch = given["cond"].batch
        timetables = [prompt.schedules for image in batch for prompt in image]
        timetables += list(given["uncond"] or ())
        return cls(
            number=int(denoiser.step),
            rows=len(params.x),
            prompts=tuple(len(image) for image in batch),
            cache_key=tuple(id(_entry(timetable, denoiser.step).cond) for timetable in timetables),
        )


def _entry(timetable: Any, step: int) -> Any:
    """The entry of a prompt's timetable for a step: prompts can be edited during a run."""
    return next((entry for entry in timetable if step <= entry.end_at_step), timetable[0])
