"""Ranks that call one model together take the same decisions: if one of them skips, all of them do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .options import OptionError, shown

Groups = Sequence[Any]
"""Process groups of torch.distributed."""

DROPPED = (
    "this copy was pickled, and a group of ranks cannot be: it decides without the other ranks. Give the copy its own "
    "group="
)

OTHER_RUN = (
    "the ranks are in different runs: runs at the same time must be begun and called in the same order on every rank. "
    "Threads and tasks have no such order: give each of them a model with a group of its own"
)


class Ranks:
    """The ranks that decide together with this one.

    Args:
        given: a process group; a `DeviceMesh`, of which all ranks decide together; several groups; a function without
            arguments that returns groups, called at the begin of every run; False: this rank decides alone. None: the
            groups are found in the network by `groups_of`.
        network: the network.

    A deep copy has the same groups. A pickled one has none, and says so.

    Example:
        >>> import torch
        >>> from stepcache.extend import Ranks
        >>> alone = Ranks(False)
        >>> alone.agree(True, evaluation=3, device=torch.device("cpu"))
        True
    """

    def __init__(self, given: Any = None, network: Any = None) -> None:
        self._find: Callable[..., Any] | None = None
        self._groups: dict[tuple[int, ...], Any] = {}
        self._given: Groups = ()
        if given is None:
            self._find = partial(groups_of, network)
        elif callable(given):
            self._find = given
        elif given is not False:
            self._given = _as_groups(given)
        self._dropped = False

    def begin(self) -> list[str]:
        """Another run: looks for groups, and returns sentences for its report. What was found once is kept."""
        if self._find is not None and is_distributed():
            self._groups.update((_members(group), group) for group in self._find())
        if self._dropped:
            return [DROPPED]
        if self._given:
            return ["decides together with the other ranks of group="]
        return [f"decides together with ranks {', '.join(map(str, ranks))}" for ranks in self._groups]

    def agree(self, skip: bool, evaluation: int, device: torch.device, slot: int = 0) -> bool:
        """Whether every rank would skip this evaluation. Waits for all of them, and for the device.

        `slot` says which of the runs at the same time it is; it must be the same on every rank.

        Raises:
            RuntimeError: another rank has failed, or is at another evaluation or in another run.
        """
        for group in (*self._given, *self._groups.values()):
            flags = torch.tensor([float(skip), evaluation, -evaluation, slot, -slot], device=device)
            try:
                torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN, group=group)
                agreed, first, last, one, other = flags.tolist()
            except RuntimeError as error:
                raise RuntimeError(
                    f"the ranks could not agree on evaluation {evaluation}: another rank has failed, has stopped, or "
                    f"did not get here within the group's timeout. Look for the first error of the others. ({error})"
                ) from error
            if one != -other:
                raise RuntimeError(OTHER_RUN)
            if first != -last:
                raise RuntimeError(
                    f"the ranks are at different evaluations ({first:.0f} to {-last:.0f}): one of them has failed and "
                    "begun again, or has another number of steps. All ranks of a group must sample with the same steps"
                )
            skip = bool(agreed)
        return skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        copied = Ranks(False)
        copied._find, copied._given = copy.deepcopy(self._find, memo), self._given
        copied._dropped = self._dropped
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: how groups are found, but no group."""
        dropped = self._dropped or bool(self._given)
        return {"_find": self._find, "_given": (), "_groups": {}, "_dropped": dropped}


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def groups_of(network: Any) -> list[Any]:
    """The groups whose ranks must call a network together, as its parameters show: FSDP and tensor parallelism.

    Replicated parameters do not count: ranks that only have the same weights are independent.
    """
    if not isinstance(network, nn.Module) or not is_distributed():
        return []
    found = {_members(group): group for group in _sharing(network)}
    return [group for members, group in found.items() if len(members) > 1]


def groups_of_mesh(mesh: Any) -> list[Any]:
    """The groups of every dimension of a `DeviceMesh` that has more than one rank."""
    return [group for group in mesh.get_all_groups() if len(_members(group)) > 1]


def _sharing(network: nn.Module) -> Iterator[Any]:
    for module in network.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            fsdp: Any = module
            if fsdp.sharding_strategy.name != "NO_SHARD":
                yield fsdp.process_group
    for parameter in network.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        for dimension, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
            if not placement.is_replicate():
                yield mesh.get_group(dimension)


def _members(group: Any) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))


def _as_groups(given: Any) -> Groups:
    if hasattr(given, "get_all_groups"):
        return tuple(groups_of_mesh(given))
    groups = tuple(given) if isinstance(given, Iterable) else (given,)
    if not is_distributed():
        raise OptionError(f"group={shown(given)}: torch.distributed has not been initialized in this process")
    for group in groups:
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise OptionError(
                f"group={shown(given)}: accepted are a process group of torch.distributed that this rank is in, a "
                "DeviceMesh, several groups, None (found in the model) and False (this rank decides alone)"
            )
    return groups
