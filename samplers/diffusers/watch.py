"""Notices that the prompt, the class labels or the weights have changed within a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

WATCHED = ("encoder_hidden_states", "class_labels", "pooled", "prompt", "text_emb", "cap_feats", "added_cond_kwargs")
"""Parts of the names under which denoisers are given what does not change from step to step."""

OPTIONS = "attention_kwargs"
"""Part of the names of options, of which only numbers and words are looked at: a LoRA's scale, for instance."""


class Watch:
    """Counts the changes of a denoiser's weights, and of what its branches are given beside latents and timestep.

    A tensor that is the very same, or the same part of the same memory, is not looked into: only one that was made
    anew is compared with the one before, which waits for the device. Changes are seen by torch's own count of changes
    in place. LoRA adapters are seen by their names, scales and whether they are fused.

    Example:
        >>> import torch
        >>> from stepcache.samplers.diffusers.watch import Watch
        >>> watch, prompt = Watch(torch.nn.Linear(1, 1)), torch.ones(2, 3)
        >>> watch.changes(("uncond", "cond"), 2, {"encoder_hidden_states": prompt})
        0
        >>> watch.changes(("cond",), 1, {"encoder_hidden_states": prompt[1:]})
        0
        >>> watch.changes(("cond",), 1, {"encoder_hidden_states": prompt[1:] + 1})
        1
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: nn.Module = getattr(module, "_orig_mod", module)
        self._count, self._closed = 0, False
        self._given: dict[str, list[Any]] = {}
        self._weights: Any = None
        self._adapters: Any = None
        self._tensors: list[Mapping[str, Tensor | None]] = []
        self._lora_layers: list[nn.Module] = []

    def begin(self) -> None:
        """Another run: nothing is known of it yet."""
        self._given.clear()
        self._weights = self._adapters = None
        self._closed = False

    def end(self) -> None:
        """The run's last evaluation: nothing is kept alive any longer."""
        self.begin()
        self._closed = True

    def changes(self, names: Sequence[str], rows: int, arguments: Mapping[str, Any]) -> int:
        """How many changes there have been so far, with this call of the branches `names`, of so many rows."""
        if self._closed:
            return self._count
        weights = self._weights_now()
        changed = self._weights is not None and weights != self._weights
        self._weights = weights
        leaves = [leaf for name, value in arguments.items() for leaf in _watched(name, value)]
        for k, name in enumerate(names):
            given = [_Seen(_rows(leaf, k, len(names), rows)) for leaf in leaves]
            before = self._given.get(name)
            self._given[name] = given
            changed |= before is not None and not (
                len(before) == len(given) and all(a.is_as(b) for a, b in zip(given, before, strict=True))
            )
        self._count += changed
        return self._count

    def _weights_now(self) -> tuple[Any, ...]:
        """What changes with the weights: torch's count of changes in place, and what LoRA adapters are set to."""
        adapters = tuple(
            (name, id(config)) for name, config in (getattr(self._module, "peft_config", None) or {}).items()
        )
        if adapters != self._adapters:
            modules = list(self._module.modules())
            self._adapters = adapters
            self._tensors = [kept for module in modules for kept in (module._parameters, module._buffers) if kept]
            self._lora_layers = [m for m in modules if hasattr(m, "scaling") and hasattr(m, "active_adapters")]
        return adapters, self._changed_in_place(), tuple(map(_adapter_state, self._lora_layers))

    def _changed_in_place(self) -> int:
        """How often the weights have been changed in place, all together. There are 1,676 of them in SDXL's network."""
        try:
            return sum([one._version for kept in self._tensors for one in kept.values() if one is not None])
        except RuntimeError:  # some were made in inference mode, and do not know
            return sum([_version(one) for kept in self._tensors for one in kept.values() if one is not None])


class _Seen:
    """A value, and how often it had been changed in place when it was seen."""

    def __init__(self, value: Any) -> None:
        self.value, self.version = value, _version(value) if isinstance(value, Tensor) else 0

    def is_as(self, before: _Seen) -> bool:
        a, b = self.value, before.value
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            return self.version == before.version
        return _version(b) == before.version and torch.equal(a, b)


def _watched(name: str, value: Any) -> list[Any]:
    """What must stay the same in an argument of this name."""
    if any(part in name for part in WATCHED):
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, (Tensor, int, float, str))]
    if OPTIONS in name:
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, (int, float, str))]
    return []


def _rows(leaf: Any, branch: int, branches: int, rows: int) -> Any:
    """What of an argument belongs to one of the branches that come in one call."""
    if isinstance(leaf, Tensor) and branches > 1 and leaf.ndim and len(leaf) == rows:
        return leaf.chunk(branches)[branch]
    return leaf


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; tensors made in inference mode do not know."""
    return 0 if tensor.is_inference() else tensor._version


def _adapter_state(layer: Any) -> tuple[Any, ...]:
    return (
        tuple(layer.active_adapters),
        getattr(layer, "disable_adapters", False),
        tuple(getattr(layer, "merged_adapters", ())),
        tuple(layer.scaling.values()),
    )
