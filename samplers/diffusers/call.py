"""One call of a denoiser, in its network's own space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepcache.extend import Call, wide, widened

from ..batching import CannotSplit, batch_of, cut_rows, rows_of, rows_of_samples, samples_of
from .answer import Rebuild, listed, opened, packed, stacked
from .controlnet import computed
from .pairing import Pairing, pairings

LATENTS = ("hidden_states", "sample", "x")
BESIDE = ("audio_hidden_states",)
WITHOUT_ROWS = ("img_ids", "txt_ids", "image_rotary_emb", "rotary_emb", "freqs_cis")
"""Arguments that are not ordered by the rows of the batch: where the tokens are, which is the same for all."""

TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "time")


class Layout:
    """What a denoiser's calls have shown so far: which part of the input the latents are, and how an answer looks.

    Attributes:
        name: the denoiser's name in its pipeline, for messages.
        pairing: the part of the input that the output belongs to; None if not known yet.
        candidates: the pairings that are possible, if only movement can decide.
        rebuilds: how to make an answer from tensors, by the flags of the call.
        refused: why its answers cannot be predicted; None if they can.
        remark: why one of its answers could not be kept; None if there was no such answer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pairing: Pairing | None = None
        self.candidates: list[Pairing] = []
        self.rebuilds: dict[tuple[Any, ...], Rebuild] = {}
        self.refused: str | None = None
        self.remark: str | None = None

    def refuse(self, reason: str) -> None:
        """The denoiser's answers cannot be predicted: from now on all are computed."""
        self.refused = f"{reason}: always computed"

    def pair(self, x: Tensor, out: Tensor) -> bool:
        """Finds out which part of x the output belongs to; False if that is not known yet, or impossible."""
        if self.pairing is None or self.pairing.input(x).shape != out.shape:
            self.candidates, self.pairing = pairings(x, out), None
            if not self.candidates:
                self.refuse(f"{self.name}: {tuple(x.shape)} in and {tuple(out.shape)} out cannot be paired")
            if len(self.candidates) != 1:
                return False
            self.pairing, self.candidates = self.candidates[0], []
        return True

    def choose(self, before: Tensor, now: Tensor) -> None:
        """The latents are that part of the input which moves from one call to the next; the rest is conditioning."""
        moved = [float((p.input(now) - p.input(before)).abs().mean()) for p in self.candidates]
        self.pairing, self.candidates = self.candidates[moved.index(max(moved))], []

    def latents(self, x: Tensor) -> Tensor:
        return x if self.pairing is None else self.pairing.input(x)


UNREAD = torch.zeros(())
"""The sigma of a call whose place is known: nobody reads it."""


class ModuleCall(Call):
    """One call of a denoiser: in network space already, its input scaled and its output raw.

    Latents of several kinds that go in and out together (video and audio) are one flat tensor to the engine.

    Args:
        module: the denoiser.
        parameters: the names of its forward's parameters, in order.
        layout: what earlier calls have shown.
        original: calls the denoiser as it is without the cache.
        args, kwargs: what it is called with.

    Attributes:
        arguments: all of them by name.
        context: the name that the pipeline gave to its cache context; empty without one.
        turn: how many calls of this context the evaluation has had before.
        timestep: as given; None if it was not found.
        computed: the denoiser's answer, once it was called.
        forwards: the batch of each call of the denoiser so far, for all samples or for some.
        unpaired: the answer could not be related to the input, or not yet.
    """

    context, turn = "", 0

    def __init__(
        self,
        module: nn.Module,
        parameters: list[str],
        layout: Layout,
        original: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.module, self.parameters, self.layout, self.original = module, parameters, layout, original
        self.args, self.keywords = args, kwargs
        self.computed: Any
        self.arguments = given = dict(zip(parameters, args, strict=False)) | kwargs
        latents = [next((given[name] for name in LATENTS if name in given), None)]
        stacks = [stacked(part) for part in latents + [given[name] for name in BESIDE if name in given]]
        parts = [part for part in stacks if part is not None and part.is_floating_point()]
        known = len(parts) == len(stacks)
        self.shapes = [part.shape[1:] for part in parts] if known else []
        self.latent: Any = packed(parts) if known else None
        self.timestep = next((given[name] for name in TIMESTEPS if name in given), None)
        self.sigma, self.computed = UNREAD, None
        self.forwards: list[int] = []
        self.unpaired = False
        self.requires_grad = self.latent is not None and self.latent.requires_grad

    @property
    def flags(self) -> tuple[Any, ...]:
        """Words and switches that it is called with: an answer may look different with others."""
        return tuple((name, value) for name, value in self.arguments.items() if isinstance(value, (bool, str)))

    @property
    def latents(self) -> Tensor:
        """The part of the input that the output belongs to, as far as is known."""
        return self.layout.latents(self.latent)

    @torch.no_grad()
    def inputs(self) -> tuple[Tensor, ...]:
        x = self.latents
        return x.to(wide(x.dtype), copy=True).chunk(len(self.names))

    def run_model(self) -> Any:
        if self.computed is None:
            self.forwards.append(len(self.latent))
            self.computed = self.original(self.args, dict(self.keywords))
        return self.computed

    @torch.no_grad()
    def outputs(self, answer: Any) -> tuple[Tensor, ...] | None:
        layout, (parts, rebuild) = self.layout, opened(answer)
        if rebuild is None:
            layout.remark = (
                f"{layout.name} returns {type(answer).__name__} with more in it than tensors (a KV cache, say): such "
                "calls are computed, and not kept"
            )
            return None
        self.unpaired = True
        if len(parts) != len(self.shapes):
            layout.refuse(f"{layout.name} returns {len(parts)} tensors for {len(self.shapes)} of latents")
            return None
        shapes = [part.shape[1:] for part in parts]
        if len(parts) > 1 and shapes != self.shapes:
            layout.refuse(f"{layout.name}: {listed(self.shapes)} in and {listed(shapes)} out cannot be paired")
            return None
        out = packed(parts)
        layout.rebuilds[self.flags] = rebuild
        self.unpaired = not layout.pair(self.latent, out)
        return None if self.unpaired else widened(out).clone().chunk(len(self.names))

    def part(self, name: str) -> ModuleCall | None:
        if getattr(self.module, "is_cache_enabled", False):
            return None  # a cache inside keeps what it saw, for batches of one size
        rows = len(self.latent)
        given = computed((self.args, dict(self.keywords)))
        try:
            args, keywords = cut_rows(given, rows, rows_of(self.names, name, rows), shared=True)
        except CannotSplit as why:
            self.indivisible, self.notes = True, (*self.notes, f"{self.layout.name}: {why}")
            return None
        part = ModuleCall(self.module, self.parameters, self.layout, self.original, args, dict(keywords))
        part.names = (name,)
        return part

    def of_samples(self, samples: Sequence[int]) -> ModuleCall | None:
        if getattr(self.module, "is_cache_enabled", False):
            return None
        rows = len(self.latent)
        kept = rows_of_samples(len(self.names), rows, samples)
        given = computed(self.arguments)
        try:
            arguments = {
                name: value if name in WITHOUT_ROWS else cut_rows(value, rows, kept, shared=True)
                for name, value in given.items()
            }
        except CannotSplit:
            return None
        part = ModuleCall(self.module, self.parameters, self.layout, self.original, (), arguments)
        part.names, part.forwards = self.names, self.forwards
        return part

    def split(self, answer: Any) -> list[Any]:
        if self.layout.pairing is None:
            self.outputs(answer)  # which part of the input the latents are is found out with the whole batch
        tensors, rebuild = opened(answer)
        if rebuild is None:
            return []
        samples = zip(*(samples_of(tensor, len(self.names)) for tensor in tensors), strict=True)
        return [rebuild(list(parts)) for parts in samples]

    def join(self, answers: Sequence[Any]) -> Any:
        tensors, rebuilds = zip(*map(opened, answers), strict=True)
        return rebuilds[0]([batch_of(samples) for samples in zip(*tensors, strict=True)])

    @torch.no_grad()
    def rebuild(self, outputs: tuple[Tensor, ...]) -> Any:
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        rebuild = self.layout.rebuilds.get(self.flags)
        if rebuild is None:
            return self.run_model()
        if len(self.shapes) == 1:
            return rebuild([out])
        flat = torch.split(out, [shape.numel() for shape in self.shapes], dim=1)
        return rebuild([part.reshape(len(part), *shape) for part, shape in zip(flat, self.shapes, strict=True)])
