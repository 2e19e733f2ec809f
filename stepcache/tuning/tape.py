"""What a run went through: latent and derivative at every evaluation, for every branch, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from stepcache.branch import Branch
from stepcache.clock import Position
from stepcache.fingerprint import Fingerprint
from stepcache.predictors.profiled import derivative, scale

Guidance = Mapping[str, float]
"""The weight of each branch in what the sampler is given; they add up to 1."""

NOISY = 0.02
"""A run is noisy if more than this share of its squared movement is none that a deterministic sampler can make."""


@dataclass
class Seen:
    """One evaluation. Tensors are (B, ...), of the calibration seeds.

    Attributes:
        position: run, step and evaluation.
        index: its place in the schedule.
        s: the noise level in which the derivative is taken: sigma, or a flow's time.
        x: the latent, with denoised = x - s derivative.
        flow: whether the network is a flow, x = (1 - s) x0 + s noise.
        derivatives: of each branch, computed or predicted.
    """

    position: Position
    index: float | None
    s: float
    x: Tensor
    flow: bool
    derivatives: dict[str, Tensor] = field(default_factory=dict)

    def guided(self, guidance: Guidance) -> Tensor:
        """The derivative with guidance."""
        first, *others = [self.derivatives[name] * weight for name, weight in guidance.items()]
        return sum(others, start=first)


@dataclass
class Tape:
    """A run, evaluation by evaluation.

    Attributes:
        seen: the evaluations, in their order.
        schedule: the run's sigmas, if the host knows them.
        model: by what the model is known again.
        images: the samples, as the subject returns them.
        calls: made for one branch.
    """

    seen: list[Seen] = field(default_factory=list)
    schedule: tuple[float, ...] = ()
    model: Fingerprint | None = None
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: float = 0.0

    def note(self, branch: Branch, derivative_of_branch: Tensor | None = None) -> Seen:
        """Adds a branch in its evaluation: as it was computed, or with the derivative that was predicted for it."""
        now = branch.parametrization
        s, c = scale(now)
        if branch.position.evaluation == len(self.seen):
            flow = now.derivative[0] == 0 and abs(now.denoised[0] - 1) < 1e-5
            self.seen.append(Seen(branch.position, branch.index, s, branch.x * c, flow))
        seen = self.seen[branch.position.evaluation]
        if derivative_of_branch is None:
            derivative_of_branch = derivative(branch.x, branch.out, now)
        seen.derivatives[branch.name] = derivative_of_branch
        return seen

    @cached_property
    def scaled(self) -> bool:
        """Whether a flow's latents are looked at as x / (1 - s) = x0 + sigma noise, sigma = s / (1 - s).

        Samplers that add noise move those by multiples of the slope. Not possible from s = 1 on.
        """
        return all(seen.flow and seen.s < 0.9999 for seen in self.seen)

    def sigma(self, n: int) -> float:
        """The noise level of evaluation n, in x = x0 + sigma noise."""
        s = self.seen[n].s
        return s / (1 - s) if self.scaled else s

    def latent(self, n: int) -> Tensor:
        """x of evaluation n; after the last one the denoised image."""
        if n == self.evaluations:
            return self.latent(n - 1) - self.sigma(n - 1) * self.slope(n - 1)
        seen = self.seen[n]
        return seen.x / (1 - seen.s) if self.scaled else seen.x

    def slope(self, n: int, branch: str | None = None) -> Tensor:
        """dx/dsigma at evaluation n, with guidance or of one branch."""
        seen = self.seen[n]
        d = seen.guided(self.guidance) if branch is None else seen.derivatives[branch]
        return seen.x + (1 - seen.s) * d if self.scaled else d

    @cached_property
    def guidance(self) -> Guidance:
        """The guidance weights of a full run, estimated from how the sampler moved the latent.

        From one evaluation to the next it moves by h sum_b w_b d_b, in samplers of order 1 and at the first evaluation
        of all others; elsewhere there is a remainder, and the larger it is, the less the evaluation counts:

            w = argmin of sum_n |x_(n+1) - x_n - h_n sum_b w_b d_b|^2 / left_n,   sum of w = 1
        """
        first, *others = self.seen[0].derivatives
        if not others:
            return {first: 1.0}
        products = torch.zeros(len(others), len(others), dtype=torch.float64)
        moved = torch.zeros(len(others), dtype=torch.float64)
        for n in range(self.evaluations - 1):
            base = self.slope(n, first)
            rows = [base, *(self.slope(n, name) - base for name in others), self.latent(n + 1) - self.latent(n)]
            gram = products_of(rows)
            least = torch.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1]).solution
            left = (gram[-1, -1] - least @ gram[:-1, -1]).clamp(min=1e-9 * gram[-1, -1]) + 1e-300
            h = least[0]
            products += h**2 / left * gram[1:-1, 1:-1]
            moved += h / left * (gram[1:-1, -1] - h * gram[1:-1, 0])
        weights = torch.linalg.lstsq(products, moved[:, None]).solution[:, 0].tolist()
        return {first: 1.0 - sum(weights), **dict(zip(others, weights, strict=True))}

    @cached_property
    def responses(self) -> list[float]:
        """The effective step h_n of each evaluation in a full run: how far it moves the latent along its slope.

        Measured at samplers with one evaluation a step, whose fresh noise it leaves out. With two a step each counts
        half of the step. After the last evaluation the latent goes to sigma = 0.
        """
        if any(seen.position.stage for seen in self.seen):
            steps = [seen.position.step for seen in self.seen]
            levels = {step: self.sigma(n) for n, step in reversed(list(enumerate(steps)))}
            return [(levels.get((step or 0) + 1, 0.0) - levels[step]) / steps.count(step) for step in steps]
        found = []
        for n in range(self.evaluations - 1):
            slope = self.slope(n)
            found.append(float(((self.latent(n + 1) - self.latent(n)) * slope).sum() / slope.square().sum()))
        return [*found, -self.sigma(self.evaluations - 1)]

    @cached_property
    def noisy(self) -> bool:
        """Whether the sampler of this full run adds fresh noise: its latents leave the span of what it was given."""
        left = moved = 0.0
        for n in range(1, self.evaluations - 1):
            known = [self.latent(n), self.slope(n), self.latent(n - 1), self.slope(n - 1), self.slope(max(0, n - 2))]
            gram = products_of([*known, self.latent(n + 1) - self.latent(n)])
            explained = gram[:-1, -1] @ torch.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1:], driver="gelsd").solution
            moved += 1.0
            left += float(1 - explained[0] / gram[-1, -1]) if gram[-1, -1] > 0 else 0.0
        return moved > 0 and left / moved > NOISY

    @property
    def evaluations(self) -> int:
        return len(self.seen)

    @cached_property
    def sizes(self) -> Tensor:
        """The range of each sample's last latent (B,): what errors are relative to, as in PSNR."""
        last = self.latent(self.evaluations).flatten(1)
        return (last.amax(1) - last.amin(1)).clamp(min=torch.finfo(last.dtype).tiny)


def products_of(rows: list[Tensor], sizes: Tensor | None = None) -> Tensor:
    """The inner products of tensors (B, ...), each sample divided by its size; in float64, on the CPU."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for b in range(len(rows[0])):
        matrix = torch.stack([row[b].flatten().double() for row in rows])
        size = 1.0 if sizes is None else float(sizes[b])
        total += (matrix @ matrix.mT).cpu() / size**2
    return total
