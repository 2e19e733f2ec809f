"""One sampling loop, and the branches that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepcache import Method
from stepcache import method as make_method
from stepcache.extend import Engine

from ..parametrization import ScalingsAsFloats
from .active import active_parts
from .call import BatchCall, scalings
from .rows import separable
from .samplers import ADAPTIVE

ROLES = {"positive": "cond", "negative": "uncond"}
"""Branches by ComfyUI's names; other names are kept as they are."""


class Run:
    """One sampling loop: finds out which evaluation and which branches a call of CALC_COND_BATCH is for."""

    def __init__(self, guider: Any, method: Method, decide: str, sampler: str) -> None:
        self.guider = guider
        self.each, self.of_samples = decide == "each", decide == "sample"
        self.sampling = guider.model_patcher.get_model_object("model_sampling")
        self.notes: list[str] = []
        self.evaluation = 0
        self._seen: list[tuple[str, tuple[Any, ...] | None]] = []
        self._active: dict[str, tuple[Any, ...]] = {}
        self._changes = 0
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
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

        def compute(asked: list[list[dict[str, Any]] | None], x: Tensor, timestep: Tensor) -> list[Tensor]:
            return executor(model, asked, x, timestep, model_options)

        window = model_options.get("transformer_options", {}).get("context_window")
        if window is not None and self.engine.method.skip == "uncond":
            # cond on one window's frames predicts nothing of uncond on another's.
            self._note("skip='uncond': each context window would need a reference of its own: all are computed")
            return compute(conds, x, timestep)
        names = self._names(conds, timestep, window)
        if names is None:
            return compute(conds, x, timestep)
        parts = (window is None and separable(conds, model_options, len(x))) if self.of_samples else None
        changes = (self._changes,)
        return self.engine(
            BatchCall(compute, conds, self.sampling, names, x, timestep, self.evaluation, changes, self.each, parts)
        )

    def _names(self, conds: Sequence[Any], timestep: Tensor, window: Any) -> dict[int, str] | None:
        """The branches of a call, by their place in it; None if the call is not the guider's own.

        Guidance that evaluates a changed model (PAG, SAG, skipped layers) asks in the same evaluation for a branch
        that has been seen, or for one that the guider does not have. Windows of a long video ask for the same branches
        in turn, each on its own frames; their order tells them apart.
        """
        if self.evaluation == 0:
            self._note("the guider does not announce its evaluations: all are computed")
            return None
        names: dict[int, str] = {}
        active_by_name: dict[str, tuple[Any, ...]] = {}
        seen = [*self._seen]
        frames = None if window is None else tuple(getattr(window, "index_list", ()))
        for place, cond in enumerate(conds):
            if cond is None:
                continue
            role = self._role(cond)
            active = active_parts(cond, timestep)
            if role is None or not active or (role, frames) in seen:
                return None
            occurrence = sum(before == role for before, _ in seen)
            name = f"{role} {occurrence + 1}" if occurrence else role
            seen.append((role, frames))
            names[place], active_by_name[name] = name, (active, frames)
        if any(self._active.get(name, now) != now for name, now in active_by_name.items()):
            self._changes += 1
        self._active.update(active_by_name)
        self._seen = seen
        return names or None

    def _role(self, cond: list[dict[str, Any]]) -> str | None:
        """The name of a branch in the guider; None if the guider does not have it."""
        asked = {entry["uuid"] for entry in cond}
        for name, own in getattr(self.guider, "conds", {}).items():
            if own is cond or (asked and asked <= {entry["uuid"] for entry in own or ()}):
                return ROLES.get(name, name)
        return None

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
