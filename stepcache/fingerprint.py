"""By what a model is known again: its architecture and a few of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .options import OptionError, number, shown

SAMPLED = 8
"""So many parameters are looked at, spread over the model, one number of each."""

SAME = 0.02
"""Weights that differ by less than this share are the same: another dtype rounds them."""

_KNOWN: WeakKeyDictionary[nn.Module, Fingerprint] = WeakKeyDictionary()


@dataclass(frozen=True)
class Fingerprint:
    """By what a model is known again.

    Attributes:
        architecture: the class of the model.
        shapes: a hash of its parameters' shapes; empty if it has none.
        weights: root mean squares of a few parameters; empty if they were offloaded so that none can be read.
    """

    architecture: str
    shapes: str = ""
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, model: Any) -> Fingerprint:
        """Looks at a model once; one transfer from its device."""
        if not isinstance(model, nn.Module):
            return cls(type(model).__name__)
        if model not in _KNOWN:
            _KNOWN[model] = cls._look(model)
        return _KNOWN[model]

    @classmethod
    @torch.no_grad()
    def _look(cls, model: nn.Module) -> Fingerprint:
        parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        if not parameters:
            return cls(type(model).__name__)
        shapes = hashlib.sha1(repr([tuple(parameter.shape) for parameter in parameters]).encode()).hexdigest()[:12]
        chosen = parameters[:: max(1, len(parameters) // SAMPLED)][:SAMPLED]
        if any(parameter.is_meta for parameter in chosen):  # the weights are elsewhere until the model runs
            return cls(type(model).__name__, shapes)
        sizes = torch.stack([p.detach().flatten()[:65536].float().square().mean().sqrt().cpu() for p in chosen])
        return cls(type(model).__name__, shapes, tuple(float(f"{size:.5g}") for size in sizes.tolist()))

    @classmethod
    def read(cls, given: Any) -> Fingerprint:
        """From JSON; OptionError for anything else than `written` writes."""
        if not isinstance(given, Mapping) or not isinstance(given.get("weights", []), list):
            raise OptionError(f"profile: model={shown(given)}: accepted is an object with class, shapes and weights")
        weights = [number("profile: model weights", weight, high=1e30) for weight in given.get("weights", [])]
        return cls(str(given.get("class", ""))[:200], str(given.get("shapes", ""))[:64], tuple(weights))

    def written(self) -> dict[str, Any]:
        return {"class": self.architecture, "shapes": self.shapes, "weights": list(self.weights)}

    def difference(self, other: Fingerprint) -> str | None:
        """What a profile for this model cannot know of the other; None if it is the same model."""
        if self.shapes != other.shapes or (not self.shapes and self.architecture != other.architecture):
            return f"another model ({self.architecture}; this is {other.architecture})"
        pairs = zip(self.weights, other.weights, strict=False)
        if any(abs(a - b) > SAME * max(a, b) for a, b in pairs):
            return f"other weights of {self.architecture}"
        return None
