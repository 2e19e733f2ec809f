"""The Forge family: Forge, reForge, Forge Classic and Forge Neo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batching import CannotSplit, cut_rows, may_be_ordered
from .patch import HostPatch

SLOT = "model_function_wrapper"

BY_CHUNKS = {"cond_or_uncond", "uuids"}
"""Transformer options with one entry per chunk."""

ROW_NUMBERS = {"cond_indices", "uncond_indices"}
"""Transformer options that are lists of rows."""

NOT_BY_ROWS = {"sigmas", "sampling_sigmas"}
"""Transformer options that may be as long as the batch by coincidence."""


class ForgePatch(HostPatch):
    """Puts a wrapper into the U-Net's `model_options`, in a slot that the host reads at every evaluation.

    The host calls it with (apply_model, {"input", "timestep", "c", "cond_or_uncond"}). The timestep is sigma, one per
    row, and the result is denoised. The rows are one chunk per entry of `cond_or_uncond`, 0 for cond and 1 for uncond.
    """

    @property
    def _unet(self) -> Any:
        return self._denoiser.inner_model.inner_model.forge_objects.unet

    @property
    def _sampling(self) -> Any:
        model = self._unet.model
        return getattr(model, "predictor", None) or model.model_sampling

    def install(self) -> None:
        unet = self._unet
        options, previous = unet.model_options, unet.model_options.get(SLOT)
        if getattr(previous, "stepcache_patch", None) is self:
            return
        model = id(unet.model)

        def wrapper(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
            def ask(arguments: dict[str, Any]) -> Tensor:
                if previous is not None:
                    return previous(apply_model, arguments)
                return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

            def cut(kept: slice) -> Callable[[], Tensor]:
                if previous is not None and arguments["c"].get("control") is not None:
                    raise CannotSplit("another extension wraps the model, and may ask the ControlNet for all rows")
                return functools.partial(ask, one_chunk(arguments, kept))

            compute = functools.partial(ask, arguments)
            if not self.active:
                return compute()
            x = arguments["input"]
            cache_key = (model, arguments["c"].get("control") is None)
            names = self._names(arguments["cond_or_uncond"], len(x))
            return self.answer(names, x, arguments["timestep"], cache_key, compute, cut)

        def undo() -> None:
            if options.get(SLOT) is not wrapper:
                return
            if previous is None:
                del options[SLOT]
            else:
                options[SLOT] = previous

        wrapper.__dict__["stepcache_patch"] = self
        unet.set_model_unet_function_wrapper(wrapper)
        self._undo.append(undo)

    def _names(self, labels: Sequence[int], rows: int) -> tuple[str, ...] | None:
        """A name per chunk, numbered in the order of the calls: cond, cond 2, ..., uncond.

        They come in one call, or in several if memory is short. None if the evaluation has had all branches of this
        label: PAG and SAG call again with the label of the first.
        """
        if rows % len(labels) or any(label not in (0, 1) for label in labels):
            return None
        names, count = [], self._seen.copy()
        for label in labels:
            kind = "uncond" if label else "cond"
            count[kind] += 1
            names.append(kind if count[kind] == 1 else f"{kind} {count[kind]}")
        most = {"cond": min(self.evaluation.prompts), "uncond": 1}
        if any(self._seen[kind] and count[kind] > max(most[kind], self._seen[kind]) for kind in count):
            return None
        self._seen.update(count - self._seen)
        return tuple(names)

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the host's own parametrization, which is linear in x and in the network's output."""
        one = torch.ones((*sigma.shape, 1, 1, 1), dtype=sigma.dtype, device=sigma.device)
        zero, sampling = torch.zeros_like(one), self._sampling
        c_skip = sampling.calculate_denoised(sigma, zero, one)
        c_out = sampling.calculate_denoised(sigma, one, zero)
        return c_skip.flatten(), c_out.flatten(), sampling.calculate_input(sigma, one).flatten()

    def sigma_at(self, timesteps: Tensor) -> Tensor:
        table = self._sigma_table
        return table[timesteps.round().long().clamp(0, len(table) - 1).to("cpu")]

    def training_sigma(self) -> Callable[[float], float] | None:
        sampling = self._sampling
        return lambda share: float(sampling.percent_to_sigma(share))

    @property
    def _device(self) -> torch.device:
        return getattr(self._sampling, "sigmas", torch.ones(1)).device


def one_chunk(arguments: dict[str, Any], kept: slice) -> dict[str, Any]:
    """The arguments of the slot's call for one of its chunks, as the host makes them if it splits its calls.

    Cuts what the host orders by rows or by chunks. Raises `CannotSplit` for anything else that may be ordered so. Lists
    of a ControlNet are copied, because the U-Net empties them.
    """
    rows = len(arguments["input"])
    place = kept.start // (kept.stop - kept.start)
    rest = {key: value for key, value in arguments.items() if key not in ("c", "cond_or_uncond")}
    c = {key: value for key, value in arguments["c"].items() if key not in ("transformer_options", "control")}
    chunk = cut_rows(rest, rows, kept) | {"cond_or_uncond": arguments["cond_or_uncond"][place : place + 1]}
    chunk["c"] = cut_rows(c, rows, kept)
    if "control" in arguments["c"]:
        chunk["c"]["control"] = cut_rows(arguments["c"]["control"], rows, kept, shared=True)
    if "transformer_options" in arguments["c"]:
        options = arguments["c"]["transformer_options"]
        lengths = (rows, len(arguments["cond_or_uncond"]))
        chunk["c"]["transformer_options"] = _options_of_chunk(options, kept, place, lengths)
    return chunk


def _options_of_chunk(options: dict[str, Any], kept: slice, place: int, lengths: tuple[int, int]) -> dict[str, Any]:
    """The transformer options of one chunk. `lengths` are those of a list with an entry per row, or per chunk."""
    chosen = dict(options)
    for key in options.keys() & BY_CHUNKS:
        chosen[key] = options[key][place : place + 1]
    for key in options.keys() & ROW_NUMBERS:
        chosen[key] = [row - kept.start for row in options[key] if kept.start <= row < kept.stop]
    if "cond_mark" in options:
        chosen["cond_mark"] = options["cond_mark"][kept]
    for key in options.keys() - BY_CHUNKS - ROW_NUMBERS - NOT_BY_ROWS - {"cond_mark"}:
        if may_be_ordered(options[key], lengths):
            raise CannotSplit(f"the transformer option {key!r} may be ordered by rows")
    return chosen
