"""One call of CALC_COND_BATCH, translated to the network's own space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stepcache.extend import Call, wide, widened

from .rows import of_rows


class BatchCall(Call):
    """One call of CALC_COND_BATCH, translated to the network's own space.

    `model_sampling` gives the factors, because it is linear in x and in the network's output:

        c_in = calculate_input(sigma, 1),  c_skip = calculate_denoised(sigma, 0, 1),
        c_out = calculate_denoised(sigma, 1, 1) - c_skip
    """

    def __init__(
        self,
        compute: Callable[[list[Any], Tensor, Tensor], list[Tensor]],
        conds: list[Any],
        sampling: Any,
        places: dict[int, str],
        x: Tensor,
        sigma: Tensor,
        evaluation: int | None,
        cache_key: tuple[Any, ...],
        each: bool,
        separable: bool | None = None,
    ) -> None:
        self._compute, self._conds, self._x = compute, conds, x
        self.sigma, self.evaluation, self.cache_key = sigma, evaluation, cache_key
        # ComfyUI batches the last branch first. In this order a signal from inside the model splits into its branches.
        self._places, self._sampling = sorted(places, reverse=True), sampling
        self._rows = x.shape[0] if each else 1
        names = [places[place] for place in self._places]
        rows = range(1, self._rows + 1)
        self.names = tuple(f"{name} of image {row}" for name in names for row in rows) if self._rows > 1 else (*names,)
        self._separable = separable
        self.latent = x.expand(len(self.names), *x.shape)  # every branch gets the same latent
        if separable is not None:  # the samples are asked for
            self.latent = self.latent.flatten(0, 1)  # whose rows are the samples of each branch
        self.requires_grad = x.requires_grad

    def run_model(self) -> list[Tensor]:
        return self._compute(self._conds, self._x, self.sigma)

    def part(self, name: str) -> BatchCall:
        """The same call with None for the other branches, so that their ControlNets are not run either."""
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

    def of_samples(self, samples: Sequence[int]) -> BatchCall | None:
        if not self._separable:
            return None
        rows = list(samples)
        conds = [
            None if cond is None else [of_rows(entry, len(self._x), rows) for entry in cond] for cond in self._conds
        ]
        places = dict(zip(self._places, self.names, strict=True))
        return BatchCall(
            self._compute,
            conds,
            self._sampling,
            places,
            self._x[rows],
            self.sigma[rows],
            self.evaluation,
            self.cache_key,
            False,
            True,
        )

    def split(self, answer: list[Tensor]) -> list[list[Tensor]]:
        return [[branch[k : k + 1] for branch in answer] for k in range(len(answer[0]))]

    def join(self, answers: Sequence[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(branch) for branch in zip(*answers, strict=True)]

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
