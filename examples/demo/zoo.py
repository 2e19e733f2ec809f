"""The zoo: every network that the forecast is measured on, by name, ready for `stepcache.bench`.

    from stepcache.demo import zoo

    zoo.subject("unet@7.5"), zoo.subjects(zoo.TEST)

The digits' networks are those of `networks`: "unet" (eps), "dit" (rectified flow), "edm" (Karras' preconditioning) and
"v" (v prediction). "@" names the guidance scale; "edm" and "v" are at 3. "colour" is a rectified flow of emoji, three
channels, at guidance 3. The rest are galaxygrad's (see `galaxy`): without classes, and in a range of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from stepcache.bench import KDiffusion
from stepcache.bench.metrics import psnr_of_range
from stepcache.extend import require, unknown
from stepcache.samplers.k_diffusion import FlowDenoiser

from . import galaxy, networks, sampling

GUIDANCES = 1.0, 3.0, 7.5
SHIFT = 3.0

SHIPPED = (
    *(f"{network}@{scale:g}" for network in ("unet", "dit") for scale in GUIDANCES),
    f"dit@{sampling.GUIDANCE:g}, shift {SHIFT:g}",
)
DEVELOPMENT = (*SHIPPED, "edm", "v", "hsc32", "ztf32", "lsst60")
TEST = ("hsc64", "ztf64", "quasar72", "roman120", "colour")
"""The split, declared before anything was measured on `TEST`.

Whatever is chosen - an order, a rule, a default - is chosen on `DEVELOPMENT` alone. `TEST` is only measured, once the
choice is made.
"""

SPLITS: dict[str, tuple[str, ...]] = {"development": DEVELOPMENT, "test": TEST}
NAMES = (*DEVELOPMENT, *TEST)


def subjects(names: Iterable[str] = NAMES) -> list[KDiffusion]:
    """The subjects of these names, in their order."""
    return [subject(name) for name in names]


def subject(name: str) -> KDiffusion:
    """One of `NAMES`, ready to be sampled in x = x0 + sigma noise. A seed is a start noise, and the class asked for.

    OptionError for another name; ImportError, with the extra to install, where a package is missing.
    """
    if name not in NAMES:
        raise unknown("network", name, NAMES)
    if name in galaxy.FILES:
        galaxies = galaxy.load(name)
        side = galaxies.inner_model.size
        schedule = partial(karras, galaxy.SIGMA_MIN, galaxy.SIGMA_MAX)
        return KDiffusion(name, galaxies, (1, side, side), schedule, metrics={"PSNR": psnr_of_range})
    if name == "colour":
        flow = FlowDenoiser(networks.load("emoji"))
        shape = (3, networks.EMOJI_SIZE, networks.EMOJI_SIZE)
        return _with_classes(name, flow, shape, flow.get_sigmas, networks.NO_EMOJI)
    shape = (1, networks.SIZE, networks.SIZE)
    if name == "edm":
        preconditioned = require("k_diffusion.layers", "k-diffusion").Denoiser
        denoiser = preconditioned(networks.load(name), networks.EDM_SIGMA_DATA)
        return _with_classes(name, denoiser, shape, partial(karras, *networks.EDM_SIGMAS))
    if name == "v":
        denoiser = require("k_diffusion.external", "k-diffusion").VDenoiser(networks.load(name))
        return _with_classes(name, denoiser, shape, partial(karras, *networks.V_SIGMAS))
    network, _, rest = name.partition("@")
    scale, _, shift = rest.partition(", shift ")
    plain = sampling.subject(network)
    denoiser = FlowDenoiser(plain.model.inner_model, float(shift)) if shift else plain.model
    return _with_classes(name, denoiser, shape, partial(sampling.sigmas, denoiser), guidance=float(scale))


def karras(low: float, high: float, steps: int) -> Tensor:
    """Karras' schedule (steps + 1,), from `high` down to `low`, then 0."""
    return require("k_diffusion.sampling", "k-diffusion").get_sigmas_karras(steps, low, high)


def asked(classes: int, seeds: Sequence[int]) -> dict[str, Tensor]:
    """The classes asked for, (B,), as the networks' extra argument."""
    return {"label": torch.tensor(seeds) % classes}


def _with_classes(
    name: str,
    denoiser: nn.Module,
    shape: tuple[int, ...],
    sigmas: Callable[[int], Tensor],
    null: int = networks.NO_CLASS,
    guidance: float = sampling.GUIDANCE,
) -> KDiffusion:
    """At guidance 1, where uncond would not count, only cond is called. Label `null` follows the last class."""
    alone = guidance == 1
    return KDiffusion(
        name,
        denoiser,
        shape,
        sigmas,
        guided=None if alone else partial(sampling.Guided, scale=guidance, null=null),
        extra_args=partial(asked, null),
        cached={"branches": ("cond",)} if alone else {"branches": ("uncond", "cond")},
        metrics={"PSNR": psnr_of_range},
    )
