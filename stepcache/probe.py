"""Looking inside a network: what its first blocks add to their input, observed while the forward goes on.

One forward hook is put on one block for the length of one call. If the signal spans several blocks, a second hook is
put before the first of them. No block is replaced and nothing is left behind. If the evaluation is skipped, an
exception of our own ends the forward pass at that point; otherwise it simply goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .options import OptionError, number, unknown

CONTAINERS = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_stream_blocks",
    "visual_transformer_blocks",
    "single_transformer_blocks",
    "single_stream_blocks",
    "double_blocks",
    "joint_blocks",
    "single_blocks",
    "blocks",
    "layers",
    "down_blocks",
    "input_blocks",
)
"""Names under which networks keep their blocks; of one network's several, in the order in which they run."""

BEHIND = (
    "Bn={}: outside of {} nothing can run its last blocks behind skipped ones. For a pipeline, install cache-dit "
    "(pip install 'stepcache[cache-dit]') and use attach(pipe, method), which lets its DBCache run inside; else Bn=0"
)


class _EarlyExit(BaseException):
    """Raised in a hook, caught by the `Probe` that put it there. Not an Exception: hosts catch those."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe


@dataclass(frozen=True)
class Blocks:
    """Which blocks a criterion looks at: what the first `count` of them add to their input.

    Attributes:
        count: so many blocks, at least 1; of a network with fewer, all but its last.
        name: the path of one block instead, "transformer_blocks.0", as `named_modules` gives it or its end.
        within: the part of the model that has the blocks, if it has a part of that name.
        required: a model without blocks is an error; else its input is the signal.
        after: so many of the last blocks should run on skipped evaluations too, which is refused here: nothing outside
            of a model can leave out blocks in its middle.

    If the last of these blocks returns another shape than the first takes (the down blocks of a U-Net), the signal
    is what it returns. `input_blocks` begin with the input convolution, which is not counted.
    """

    count: int = 1
    name: str | None = None
    within: str = "diffusion_model"
    required: bool = True
    after: int = 0

    def __post_init__(self) -> None:
        number("count", self.count, low=1, whole=True)

    def find(self, model: Any) -> Probe | None:
        """The probe of these blocks of `model`; None if it has none and they are not required."""
        root = _module(model)
        if root is None:
            if self.required or self.name is not None:
                raise OptionError(self._unsupported(model, "it is no torch module"))
            return None
        part = self._part(root)
        if self.name is not None:
            path, block = _named(part, self.name)
            chosen, note, label = [block], "", path
        else:
            found = _listed(part)
            if found is None:
                if self.required:
                    raise OptionError(self._unsupported(part, "none of these lists of blocks is in it"))
                return None
            owner, path, blocks = found
            if self.after:
                raise OptionError(BEHIND.format(self.after, type(owner).__name__))
            count = min(self.count, max(len(blocks) - 1, 1))
            note = f"{type(owner).__name__} has {len(blocks)} blocks: looks at {count}, not {self.count}"
            note = note if count < self.count else ""
            chosen, label = blocks[:count], f"the first {count} of {len(blocks)} blocks ({path})"
        for module in _compiled(root, chosen):
            raise OptionError(
                f"{type(module).__name__} is compiled (torch.compile), and a hook inside it is not called: compile "
                "only the blocks behind the one looked at, one by one (block.compile()), or use a method that looks at "
                "no block (forecast, ucache, static)"
            )
        return Probe(_end(chosen[0], 0), _end(chosen[-1], -1), label, note)

    def _part(self, root: nn.Module) -> nn.Module:
        parts = dict(root.named_modules())
        found = [m for name, m in parts.items() if name == self.within or name.endswith(f".{self.within}")]
        if found:
            return found[0]
        if self.within not in ("", Blocks.within):
            names = [name for name in parts if name]
            raise OptionError(str(unknown("object_to_patch", self.within, names[:40])))
        return root

    def _unsupported(self, model: Any, why: str) -> str:
        return (
            f"Unsupported model {type(model).__name__}: {why}; looked for {', '.join(CONTAINERS)}. Name the block to "
            "look at with block='path.of.the.block', or use a method that looks at no block (forecast, ucache)"
        )


class Probe:
    """The block observed, and the one that its signal begins with."""

    def __init__(self, first: nn.Module, last: nn.Module, label: str, note: str = "") -> None:
        self.first, self.last, self.label, self.note = first, last, label, note
        self._choice: int | None = None

    def call(self, compute: Callable[[], Any], look: Callable[[Tensor | None], bool]) -> Any:
        """`compute()`, during which `look(signal)` is called when the block is done; True ends the forward pass
        there, and the call gives None.

        The signal is None if the block returns no tensor. A block that runs more than once in a call is looked at
        the first time; a block that is never reached is not looked at.
        """
        thread, seen, before = threading.get_ident(), False, None

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal before
            if before is None and threading.get_ident() == thread:
                before = _input(args, kwargs)

        def done(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            nonlocal seen
            if seen or threading.get_ident() != thread:
                return
            seen = True
            with torch.no_grad():
                signal = self._signal(_input(args, kwargs) if self.first is self.last else before, out)
            if look(signal):
                raise _EarlyExit(self)

        handles = [self.last.register_forward_hook(done, with_kwargs=True)]
        if self.first is not self.last:
            handles.append(self.first.register_forward_pre_hook(enter, with_kwargs=True))
        try:
            return compute()
        except _EarlyExit as early:
            if early.probe is not self:
                raise
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _signal(self, before: Tensor | None, out: Any) -> Tensor | None:
        """What the blocks add; of several tensors of that shape (text and image) the one nearest to what came in.

        Which that is, is found out once, for one transfer.
        """
        outs = [one for one in _tensors(out) if one.is_floating_point()]
        alike = [] if before is None else [k for k, one in enumerate(outs) if one.shape == before.shape]
        if before is None or not alike:
            return outs[0].detach().clone() if outs else None
        if len(alike) == 1:
            self._choice = None
        elif self._choice not in alike:
            self._choice = min(alike, key=lambda k: float((outs[k] - before).abs().mean()))
        return outs[alike[0] if self._choice is None else self._choice] - before


def _named(part: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The path of a block, given by its path or the end of it, and the block."""
    parts = dict(part.named_modules())
    found = [path for path in parts if path and (path == name or path.endswith(f".{name}"))]
    if not found:
        raise unknown(f"block of {type(part).__name__}", name, [path for path in parts if "." in path][:40])
    return found[0], parts[found[0]]


def _end(block: nn.Module, which: int) -> nn.Module:
    """The first or last module of a block that is a sequence: there are networks that run its layers one by one."""
    while isinstance(block, nn.Sequential) and len(block):
        block = block[which]
    return block


def _module(model: Any) -> nn.Module | None:
    """The torch module that `model` is, or wraps as `inner_model`."""
    while model is not None and not isinstance(model, nn.Module):
        model = getattr(model, "inner_model", None)
    return model


def _listed(root: nn.Module) -> tuple[nn.Module, str, list[nn.Module]] | None:
    """The first module, from the outside in, that has lists of blocks; the first list's path; all their blocks."""
    level = [("", root)]
    while level:
        for path, module in level:
            lists = {name: _kept(module, name) for name in CONTAINERS}
            if blocks := [block for kept in lists.values() for block in kept]:
                first = next(name for name, kept in lists.items() if kept)
                return module, f"{path}{first}", blocks
        level = [(f"{path}{name}.", child) for path, module in level for name, child in module.named_children()]
    return None


def _kept(module: nn.Module, name: str) -> list[nn.Module]:
    """The blocks that a module keeps under this name, without the input convolution that `input_blocks` begin with."""
    kept = getattr(module, name, None)
    blocks = _flat(kept) if isinstance(kept, (nn.ModuleList, nn.Sequential)) else []
    return blocks[1:] if name == "input_blocks" else blocks


def _flat(blocks: nn.ModuleList | nn.Sequential) -> list[nn.Module]:
    """The blocks of a list; of a list of lists (Stable Cascade) all of theirs, because a list is never called."""
    return [one for block in blocks for one in (_flat(block) if isinstance(block, nn.ModuleList) else [block])]


def _compiled(root: nn.Module, blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """The compiled modules that a call goes through on its way to the blocks."""
    for module in root.modules():
        slots = (module.__dict__.get(name) for name in ("_compiled_call_impl", "forward"))
        compiled = hasattr(module, "_orig_mod") or any(hasattr(slot, "_torchdynamo_orig_callable") for slot in slots)
        if compiled and any(inside is block for inside in module.modules() for block in (blocks[0], blocks[-1])):
            yield module


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A block's main input: its first tensor, by position or as `hidden_states`."""
    given = [*args, kwargs.get("hidden_states"), *kwargs.values()]
    return next((one for one in given if isinstance(one, Tensor) and one.is_floating_point()), None)


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [one for one in out if isinstance(one, Tensor)] if isinstance(out, (tuple, list)) else []
