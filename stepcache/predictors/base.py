"""What a predictor is: it says what a skipped evaluation returns, in the network's own space.

A new one is one class: set `history_size`, write `predict`; or write `weights`, if the prediction is a weighted sum of
what was computed before.

Throughout, x and out are the network's input and raw output now, x_j and out_j those of computed evaluation j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..branch import Branch, CacheEntry, History
from ..options import make_whole, unknown

Baseline = Literal["input", "zero"]


Terms = Sequence[tuple[CacheEntry, float | Tensor]]

HIGHEST = 64
"""The highest order or degree: every one more keeps a latent more of each branch."""


class Predictor(ABC):
    """Predicts the network's raw output from the evaluations computed before."""

    @property
    def history_size(self) -> int:
        """How many computed evaluations are kept for it, per branch; each costs two latents."""
        return 1

    finite_if_cache_is: bool = False
    """Whether a prediction from finite outputs is sure to be finite; then a branch that follows the reference in a
    call of its own need not be checked, which would cost a transfer."""

    sampler_aware: bool = False
    """Whether it looks at `branch.noise` and `parametrization`, which are found out only then."""

    parametrized: bool = False
    """Whether it looks at `branch.parametrization` without looking at the noise."""

    needs_history: bool = True
    """Whether there is a prediction only after an evaluation has been computed."""

    @abstractmethod
    def predict(self, branch: Branch) -> Tensor | None:
        """The raw output expected for the input `branch.x`, as a new tensor of its shape and in float32 or wider.

        `branch.history` holds 1 to `history_size` computed evaluations of the same branch and shape, oldest first. None
        if it cannot tell: the evaluation is then computed.
        """

    def remember(self, history: History, entry: CacheEntry) -> None:
        """Adds a computed evaluation to the history; a full one drops its oldest."""
        history.append(entry)


class LinearPredictor(Predictor):
    """A sum of what was computed before, with weights that need nothing of the tensors:

        out = x + sum_j w_j (out_j - x_j)   baseline="input"
        out = sum_j w_j out_j               baseline="zero"

    The residual carries what is new in x (fresh noise, guidance) into the prediction; the output does not.
    """

    baseline: Baseline
    finite_if_cache_is = True

    def __post_init__(self) -> None:
        if self.baseline not in ("input", "zero"):
            raise unknown("baseline", str(self.baseline), ("input", "zero"))

    @abstractmethod
    def weights(self, branch: Branch) -> Terms | None:
        """Each evaluation used, with its weight; None if that is not known."""

    def predict(self, branch: Branch) -> Tensor | None:
        terms = self.weights(branch)
        return None if terms is None else weighted(branch.x, terms, self.baseline)


class FixedOrder(LinearPredictor):
    """A sum over the last order + 1 computed evaluations."""

    order: int

    def __post_init__(self) -> None:
        super().__post_init__()
        make_whole(self, "order", high=HIGHEST)

    @property
    def history_size(self) -> int:
        return self.order + 1


def weighted(x: Tensor, terms: Terms, baseline: Baseline) -> Tensor:
    """The sum of `LinearPredictor`, in the dtype of x. A weight is a number, or a tensor of one number a row."""
    out = x.clone() if baseline == "input" else torch.zeros_like(x)
    for entry, weight in terms:
        if baseline == "input":
            _add(out, entry.x, -weight)
        _add(out, entry.out, weight)
    return out


def _add(out: Tensor, term: Tensor, weight: float | Tensor) -> None:
    if isinstance(weight, Tensor):
        out.addcmul_(term, weight.reshape(-1, *[1] * (term.ndim - 1)))
    else:
        out.add_(term, alpha=weight)


def on_host(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
