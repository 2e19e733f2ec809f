"""The score networks of the package galaxygrad as k-diffusion models: real galaxies, lensed quasars and arcs.

They were trained and published by others and are read from the installed package: nothing of them is in this
repository. galaxygrad itself runs them with JAX, which is not needed here.

Source: galaxygrad 0.2.0, an MLP-Mixer (arXiv 2105.01601) per survey.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from stepcache import OptionError
from stepcache.extend import require, unknown

FILES = {
    "hsc32": "eqx_hsc_ScoreNet32.eqx",
    "hsc64": "eqx_hsc_ScoreNet64.eqx",
    "ztf32": "eqx_ZTF_ScoreNet32.eqx",
    "ztf64": "eqx_ZTF_ScoreNet64.eqx",
    "lsst60": "eqx_lsst_ScoreNet60.eqx",
    "quasar72": "eqx_quasar_lens72.eqx",
    "roman120": "eqx_roman_Scorenet120.eqx",
}
"""Networks by survey and size in pixels."""

BLOCKS = 4
SIGMA_MIN, SIGMA_MAX = 0.02, 148.0


class Mixer(nn.Module):
    """MLP-Mixer on 4x4 patches: score(x_t, t) of the variance-preserving process, x_t (B, 1, S, S), t (B,) in [0, 10].

    x_t = exp(-t / 2) x_0 + sqrt(1 - exp(-t)) noise.
    """

    def __init__(self, arrays: list[Tensor]) -> None:
        super().__init__()
        defer = iter(arrays).__next__
        self.enter = _parameters(defer(), defer())
        # A transposed convolution in JAX does not flip its kernel, torch's does.
        self.leave = _parameters(defer().transpose(0, 1).flip(-1, -2), defer())
        self.blocks = nn.ModuleList(
            nn.ModuleList([_parameters(*(defer() for _ in range(count))) for count in (4, 4, 2, 2)])
            for _ in range(BLOCKS)
        )
        self.norm = _parameters(defer(), defer())
        self.end = float(defer())
        patches = self.norm[0].shape[1]
        self.size = 4 * int(patches**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t / self.end).reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        kernel, bias = self.enter
        y = nn.functional.conv2d(torch.cat([x, time], dim=1), kernel, bias.flatten(), stride=4)
        shape = y.shape
        y = y.flatten(2)
        for patch, channel, before_patch, before_channel in cast("Iterable[tuple[nn.ParameterList, ...]]", self.blocks):
            y = y + _mlp(patch, _norm(before_patch, y))
            y = y.mT
            y = (y + _mlp(channel, _norm(before_channel, y))).mT
        y = _norm(self.norm, y).reshape(shape)
        kernel, bias = self.leave
        return nn.functional.conv_transpose2d(y, kernel, bias.flatten(), stride=4)


def _parameters(*arrays: Tensor) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(array.contiguous(), requires_grad=False) for array in arrays])


def _mlp(layers: nn.ParameterList, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = layers
    return nn.functional.linear(nn.functional.linear(x, w1, b1).relu_(), w2, b2)


def _norm(layer: nn.ParameterList, x: Tensor) -> Tensor:
    weight, bias = layer
    return nn.functional.layer_norm(x, weight.shape, weight, bias)


class ScoreDenoiser(nn.Module):
    """A score network of the variance-preserving process as a k-diffusion model.

    With t = log(1 + sigma^2) and c_in = 1 / sqrt(1 + sigma^2): eps = -sigma c_in score(c_in x, t), denoised = x - sigma
    eps.
    """

    sigma_min, sigma_max = SIGMA_MIN, SIGMA_MAX

    def __init__(self, inner_model: Mixer) -> None:
        super().__init__()
        self.inner_model = inner_model

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_out and c_in of eps, which is what counts as the network's output."""
        return -sigma, (1 + sigma**2).rsqrt()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        c_out, c_in = (c.reshape(-1, 1, 1, 1) for c in self.get_scalings(sigma))
        return x + c_out**2 * c_in * self.inner_model(x * c_in, (sigma**2).log1p())


def load(name: str) -> ScoreDenoiser:
    """One of `FILES` in float32. OptionError for another name, ImportError without the package."""
    if name not in FILES:
        raise unknown("galaxy network", name, FILES)
    numpy = require("numpy", "zoo")
    found = find_spec("galaxygrad")
    if found is None or found.origin is None:
        raise ImportError(f"{name} comes with the package galaxygrad: pip install 'stepcache[zoo]'")
    arrays = []
    with (Path(found.origin).parent / FILES[name]).open("rb") as file:
        while file.peek(1):
            arrays.append(torch.from_numpy(numpy.load(file).astype("float32")))
    if len(arrays) != 7 + 12 * BLOCKS:
        raise OptionError(f"{name}: {len(arrays)} arrays in galaxygrad's file; this reader knows galaxygrad 0.2.0")
    return ScoreDenoiser(Mixer(arrays)).eval()
