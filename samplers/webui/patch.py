"""What every host's patch has in common: between the host's guidance and its model, for one run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepcache.extend import Parametrization

from ..parametrization import ScalingsAsFloats
from .call import Cut, WebuiCall
from .evaluation import Evaluation

Answer = Callable[[WebuiCall], Tensor]
"""What answers a call in the model's place."""


class HostPatch(ABC):
    """Takes the host's calls of its model, during one run, and translates them.

    Args:
        denoiser: the host's guidance wrapper.
        answer: is passed every call that belongs to an evaluation.

    Attributes:
        auxiliary: how many calls went straight to the model because they are not the evaluation's own (PAG, SAG).
    """

    def __init__(self, denoiser: Any, answer: Answer) -> None:
        self.auxiliary = 0
        self._denoiser = denoiser
        self._answer = answer
        self._answering = False
        self._evaluation: Evaluation | None = None
        self._seen: Counter[str] = Counter()
        self._undo: list[Callable[[], None]] = []

    def begin(self, evaluation: Evaluation) -> None:
        """The calls that follow belong to this evaluation."""
        self._evaluation = evaluation
        self._seen.clear()

    def pause(self) -> None:
        """From here on calls go straight to the model, until the next `begin`."""
        self._evaluation = None

    @abstractmethod
    def install(self) -> None:
        """Patches the model that is in use now, once. What was patched in before is still called."""

    def remove(self) -> None:
        """Restores the host's objects."""
        self.pause()
        while self._undo:
            self._undo.pop()()

    @property
    def active(self) -> bool:
        """Whether a call is ours: an evaluation was announced, and the call does not come from within another one."""
        return self._evaluation is not None and not self._answering

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation that the host has announced."""
        if self._evaluation is None:
            raise RuntimeError("the host has announced no evaluation")
        return self._evaluation

    def answer(
        self,
        names: tuple[str, ...] | None,
        x: Tensor,
        sigma: Tensor,
        cache_key: tuple[Any, ...],
        compute: Callable[[], Tensor],
        cut: Cut,
    ) -> Tensor:
        """Answers a call. If `names` is None it is an auxiliary one, which the model answers."""
        if names is None:
            self.auxiliary += 1
            return compute()
        call = WebuiCall(compute, self.scalings, names, x, sigma, cut)
        call.evaluation = self.evaluation.number
        call.cache_key = (*self.evaluation.cache_key, *cache_key)
        self._answering = True
        try:
            return self._answer(call)
        finally:
            self._answering = False

    @abstractmethod
    def scalings(self, sigma: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(c_skip, c_out, c_in) with: what the model returns = c_skip x + c_out network(c_in x)."""

    @abstractmethod
    def sigma_at(self, timesteps: Tensor) -> Tensor:
        """The noise level at training timesteps, as this host defines it."""

    @abstractmethod
    def training_sigma(self) -> Callable[[float], float] | None:
        """Share of the training timetable -> sigma."""

    def coordinate(self) -> Callable[[float], float] | None:
        """sigma -> the coordinate to extrapolate in. None: log sigma."""
        return self._floats.coordinate()

    def parametrization(self, sigma: float) -> Parametrization:
        """What the network's input and output mean at sigma."""
        return self._floats.parametrization(sigma)

    def unpaired(self) -> str | None:
        """Why the rows of one branch do not match those of another, so that none can be predicted from another."""
        return None

    @property
    def _floats(self) -> ScalingsAsFloats:
        return ScalingsAsFloats(self.scalings, self._device)

    @property
    def _device(self) -> torch.device | str:
        """Where the scalings can be asked for."""
        return "cpu"

    @property
    def _sigma_table(self) -> Tensor:
        """Sigma of each training timestep."""
        products = self._denoiser.inner_model.inner_model.alphas_cumprod.float()
        return ((1 - products) / products).sqrt()
