"""One call of a k-diffusion model, in the network's own space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stepcache.extend import Call, wide, widened

from ..batching import CannotSplit, batch_of, cut_rows, rows_of, rows_of_samples, samples_of
from ..parametrization import Scalings


class DenoiserCall(Call):
    """One call of a k-diffusion model, translated to network space."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        scalings: Scalings,
        names: tuple[str, ...],
        x: Tensor,
        sigma: Tensor,
        extra: dict[str, Any],
        dtypes: dict[torch.dtype, torch.dtype] | None = None,
        read: Tensor | None = None,
    ) -> None:
        self.model, self.names, self.latent, self.keywords = model, names, x, extra
        self.sigma = sigma if read is None else read  # as the engine reads it
        self._sigma, self._scalings = sigma, scalings
        self._known_factors: tuple[Tensor | None, Tensor, Tensor] | None = None
        self._dtypes = {} if dtypes is None else dtypes  # of the latents' dtype that of the model's last answer
        leaves = tree_leaves((x, extra)) if torch.is_grad_enabled() else ()
        self.requires_grad = any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))

    def _factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """c_skip, c_out and c_in, as factors for x."""
        if self._known_factors is None:
            x = self.latent
            c_skip, c_out, c_in = self._scalings(self._sigma.to(x.device, wide(x.dtype)))
            self._known_factors = None if c_skip is None else spread(c_skip, x), spread(c_out, x), spread(c_in, x)
        return self._known_factors

    @torch.no_grad()
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.latent * self._factors()[2]).chunk(len(self.names))

    def run_model(self) -> Tensor:
        return self.model(self.latent, self._sigma, **self.keywords)

    @torch.no_grad()
    def outputs(self, answer: Tensor) -> tuple[Tensor, ...]:
        self._dtypes[self.latent.dtype] = answer.dtype
        c_skip, c_out, _ = self._factors()
        skipped = self.latent if c_skip is None else self.latent * c_skip
        return (widened(answer) - skipped).div_(c_out).chunk(len(self.names))

    @torch.no_grad()
    def rebuild(self, outputs: tuple[Tensor, ...]) -> Tensor:
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        c_skip, c_out, _ = self._factors()
        skipped = self.latent if c_skip is None else self.latent * c_skip
        dtype = self._dtypes.get(self.latent.dtype, self.latent.dtype)
        return torch.addcmul(skipped, out, c_out).to(dtype)

    def rounded(self, name: str, output: Tensor) -> Tensor:
        dtype = self._dtypes.get(self.latent.dtype, self.latent.dtype)
        return output if dtype != torch.float16 else self._in_half_precision(name, output, dtype)

    @torch.no_grad()
    def _in_half_precision(self, name: str, output: Tensor, dtype: torch.dtype) -> Tensor:
        kept = rows_of(self.names, name, len(self.latent))
        c_skip, c_out, _ = self._factors()
        c_skip, c_out = None if c_skip is None else _of_rows(c_skip, kept), _of_rows(c_out, kept)
        x = self.latent[kept]
        return torch.addcmul(x if c_skip is None else x * c_skip, output, c_out).to(dtype)

    def part(self, name: str) -> DenoiserCall | None:
        """The call for one branch; None if it is not certain that the rows are those of branches.

        Branches of one evaluation have the same x: rows that differ are images of a batch, without guidance.
        """
        rows = len(self.latent)
        kept = rows_of(self.names, name, rows)
        first, *others = self.latent.chunk(len(self.names))
        if not all(torch.equal(first, other) for other in others):
            self.notes = (*self.notes, "the rows of the batch are not the same latents: they are no branches")
            return None
        sigma = self._sigma[kept] if self._sigma.ndim and len(self._sigma) == rows else self._sigma
        try:
            extra = cut_rows(self.keywords, rows, kept)
        except CannotSplit as error:
            self.indivisible, self.notes = True, (*self.notes, f"{error}: it may belong to all rows or to some")
            return None
        x = self.latent[kept]
        return DenoiserCall(self.model, self._scalings, (name,), x, sigma, extra, self._dtypes)

    def of_samples(self, samples: Sequence[int]) -> DenoiserCall | None:
        rows = len(self.latent)
        kept = rows_of_samples(len(self.names), rows, samples)
        sigma = self._sigma[kept] if self._sigma.ndim and len(self._sigma) == rows else self._sigma
        try:
            extra = cut_rows(self.keywords, rows, kept, shared=True)
        except CannotSplit:
            return None
        return DenoiserCall(self.model, self._scalings, self.names, self.latent[kept], sigma, extra, self._dtypes)

    def split(self, answer: Tensor) -> list[Tensor]:
        return samples_of(answer, len(self.names))

    def join(self, answers: Sequence[Tensor]) -> Tensor:
        return batch_of(answers)


def _of_rows(c: Tensor, kept: slice) -> Tensor:
    return c if len(c) == 1 else c[kept]


def spread(c: Tensor, x: Tensor) -> Tensor:
    """A number per row, (B,) or (), as a factor for x (B, ...)."""
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) if c.ndim else c.reshape((1,) * x.ndim)
