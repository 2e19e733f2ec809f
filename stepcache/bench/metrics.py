"""How samples are marked: a number for each, from images (B, C, H, W) or videos (B, F, C, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from stepcache._optional import require

Metric = Callable[[Tensor, Tensor, Sequence[int]], Sequence[float]]
"""metric(images, reference, seeds) gives a number for every sample. `reference` is the full run of the same seeds."""

CAP = 100.0
"""In dB: what an identical sample counts, whose PSNR would be infinite. Float32 rounding is at 120 to 140."""


def psnr(images: Tensor, reference: Tensor, seeds: Sequence[int]) -> list[float]:
    """10 log10(4 / mean (image - reference)^2) in dB, at most `CAP`; images are clamped to [-1, 1]."""
    error = (images.clamp(-1, 1).double() - reference.clamp(-1, 1).double()).square().flatten(1).mean(1)
    return (4 / error).log10().mul(10).clamp(max=CAP).tolist()


def psnr_of_range(images: Tensor, reference: Tensor, seeds: Sequence[int]) -> list[float]:
    """PSNR with a peak of each sample's own: 10 log10(range^2 / mean (image - reference)^2) in dB, at most `CAP`.

    The range is that of the reference, max - min over all pixels and channels. Nothing is clamped: for samples that are
    not in [-1, 1], as those of the galaxies.
    """
    images, reference = images.double().flatten(1), reference.double().flatten(1)
    peak = reference.amax(1) - reference.amin(1)
    error = (images - reference).square().mean(1)
    return (peak.square() / error).log10().mul(10).nan_to_num(nan=CAP).clamp(max=CAP).tolist()


def ssim(images: Tensor, reference: Tensor, seeds: Sequence[int]) -> list[float]:
    """Structural similarity (scikit-image, window 7, data range 2); of videos the mean over frames."""
    score = require("skimage.metrics", "bench").structural_similarity
    ours, full = (t.clamp(-1, 1).float().cpu().numpy() for t in (images, reference))
    if ours.ndim == 4:
        ours, full = ours[:, None], full[:, None]
    return [
        sum(float(score(f, o, data_range=2.0, channel_axis=0)) for o, f in zip(our, whole, strict=True)) / len(our)
        for our, whole in zip(ours, full, strict=True)
    ]


METRICS: dict[str, Metric] = {"PSNR": psnr, "SSIM": ssim}
