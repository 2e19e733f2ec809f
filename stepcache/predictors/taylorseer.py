"""TaylorSeer's series."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..branch import Branch
from .base import Baseline, FixedOrder, Terms, on_host


@dataclass(frozen=True)
class TaylorSeer(FixedOrder):
    """TaylorSeer's series in the index n of the evaluation, around the last computed one:

        out = sum_k D_k(n') (n - n')^k / k!,   D_0(n') = out',   D_k(n') = (D_(k-1)(n') - D_(k-1)(n'')) / (n' - n'')

    with n' the last computed evaluation and n'' the one computed before it. At equal gaps D_k is the k-th derivative
    k / 2 gaps before n', at others not even that: degree 1 is reproduced, higher ones are not. Published so.

    Args:
        order: the highest k; lower while fewer evaluations were computed. Default 1, as in diffusers and cache-dit.
        baseline: what is extrapolated is out - baseline: the residual ("input") or the output ("zero"). Published is
            the output of every attention block or block; here it is the network's.

    Keeps order + 1 evaluations, 2 (order + 1) latents a branch.
    Source: arXiv 2503.06923; diffusers' `TaylorSeerCacheConfig` (max_order), commit 58eb52c0.

    Example:
        >>> from stepcache import Static
        >>> from stepcache.extend import TaylorSeer
        >>> Static("fast", predictor=TaylorSeer(2)).predictor.history_size
        3
    """

    order: int = 1
    baseline: Baseline = "zero"

    def weights(self, branch: Branch) -> Terms:
        entries = list(branch.history)[-self.history_size :]
        index = on_host([entry.position.evaluation for entry in entries])
        ahead = branch.position.evaluation - entries[-1].position.evaluation
        derivatives = torch.eye(
            len(entries), dtype=index.dtype, device=index.device
        )  # D_k at each node, over all nodes
        weights = derivatives[-1].clone()
        for k in range(1, len(entries)):
            derivatives = derivatives.diff(dim=0) / index.diff()[k - 1 :, None]
            weights += derivatives[-1] * (ahead**k / math.factorial(k))
        return list(zip(entries, weights.tolist(), strict=True))
