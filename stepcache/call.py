"""One call of the model as a host makes it: the contract between hosts and the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

CANNOT_BE_SPLIT = RuntimeError, ValueError, TypeError, LookupError, AssertionError
"""What a model raises if it is called for a part of a batch, and its arguments are not ordered by rows."""


class Call(ABC):
    """One call of the model, for one branch of guidance or for several that are batched together.

    A host writes four methods, sets the first three attributes, and passes the call to `Engine`. Inputs and outputs
    are one tensor for each branch, in the network's own space (`x c_in` and the raw output), in float32 or wider,
    without autograd.

    Attributes:
        sigma: the noise level, of any shape, the same in every row.
        names: the branches, in the order of the tensors of `inputs` and `outputs`.
        latent: what the host passes to the model.
        requires_grad: whether gradients are wanted through the call. It is then computed.
        place: (sigma, step, stage) if the host counts steps itself; `sigma` is then not read.
        evaluation: the host's number of the evaluation, if it counts them. Calls with the same number belong to the
            same evaluation, even if their sigmas differ.
        cache_key: the cache is dropped when this changes, e.g. the prompt or the model.
        keywords: what the host passes to the model by name.
        signal: what the probed blocks added, kept for a host that passes one call to the engine twice.
        raw: the model's own answer, once the whole call has been computed.
        answer: the model's answer, if it was called for several samples together.
        notes: sentences for the report.
        indivisible: computing one branch alone has failed.
    """

    sigma: Tensor
    names: tuple[str, ...]
    latent: Tensor
    requires_grad: bool = False
    place: tuple[float, int, int] | None = None
    evaluation: int | None = None
    cache_key: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = MappingProxyType({})
    signal: Tensor | None = None
    raw: Any = None
    answer: Any = None
    notes: tuple[str, ...] = ()
    indivisible: bool = False

    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """The network's inputs, as new tensors."""

    @abstractmethod
    def run_model(self) -> Any:
        """Calls the model and returns its own answer, which is what the host expects."""

    @abstractmethod
    def outputs(self, answer: Any) -> tuple[Tensor, ...] | None:
        """The raw network outputs in an answer, as new tensors; None if they cannot be related to the inputs."""

    @abstractmethod
    def rebuild(self, outputs: tuple[Tensor, ...]) -> Any:
        """What the host expects, made from raw network outputs."""

    def rounded(self, name: str, output: Tensor) -> Tensor:
        """The raw output of a branch as the host gets it: in float16 it may become infinite."""
        return output.to(self.latent.dtype) if self.latent.dtype == torch.float16 else output

    def part(self, name: str) -> Call | None:
        """The same call for one of its branches; None if the host's call cannot be split."""
        return None

    def of_samples(self, samples: Sequence[int]) -> Call | None:
        """The same call for some samples of the batch; None if the host's call cannot be split."""
        return None

    def split(self, answer: Any) -> Sequence[Any]:
        """The model's answer, taken apart into those of the samples; none if that cannot be done."""
        return ()

    def join(self, answers: Sequence[Any]) -> Any:
        """What the host expects, from the answers of all samples in their order: the reverse of `split`."""
        raise NotImplementedError

    def compute(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The raw outputs of these branches, by name; of all branches if the call cannot be split.

        Empty if the answer cannot be related to the inputs.
        """
        if len(names) == 1 < len(self.names) and (out := self._alone(names[0])) is not None:
            return {names[0]: out}
        self.raw = self.run_model() if self.answer is None else self.answer
        outputs = self.outputs(self.raw)
        return {} if outputs is None else dict(zip(self.names, outputs, strict=True))

    def _alone(self, name: str) -> Tensor | None:
        """The output of one branch, computed without the others; None if that cannot be done."""
        if (part := self.part(name)) is None:
            return None
        try:
            (x,), outputs = part.inputs(), part.outputs(part.run_model())
            if outputs is None or outputs[0].shape != x.shape:
                raise ValueError(f"it returned another shape than its input's {tuple(x.shape)}")
        except CANNOT_BE_SPLIT as error:
            # Arguments that are not ordered by rows. If the model itself fails, the whole call fails as well.
            self.indivisible, self.notes = True, (*self.notes, f"the call for {name} alone fails: {error}"[:300])
            return None
        return outputs[0]
