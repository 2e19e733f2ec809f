"""The colour network trained larger on an accelerator for some seconds, then Forecast beside fewer steps on it.

python benchmarks/gpu_train.py --images package --seconds 90 --out gpu-output

The data and the loss are those of examples/train_emoji.py, which says where the images come from. The network works on
pixels instead of 2x2 blocks and is twice as wide: 16 times the work. PSNR is against the same sampler's full run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_emoji import emoji

from stepcache import Forecast, Method
from stepcache.demo import networks
from stepcache.samplers.k_diffusion import CachedDenoiser, sample

STEPS, GUIDANCE = 20, 3.0


class Large(nn.Module):
    """v(x_t, t, label), as `networks.Emoji`."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=networks.EMOJI_SIZE,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=networks.NO_EMOJI + 1,
            norm_num_groups=16,
            attention_head_dim=32,
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.net(x, t * 1000, class_labels=label).sample


class Guided:
    """denoised(x, sigma) of a flow with sigma = t under classifier-free guidance, both branches in one call."""

    scalings = "flow"

    def __init__(self, network: nn.Module, label: Tensor) -> None:
        self.network, self.calls = network.eval(), 0
        self.labels = torch.cat([label, torch.full_like(label, networks.NO_EMOJI)])

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        with torch.autocast(x.device.type, torch.bfloat16):
            velocity = self.network(torch.cat([x, x]), torch.cat([sigma, sigma]), self.labels)
        cond, uncond = velocity.float().chunk(2)
        return x - sigma.view(-1, 1, 1, 1) * (uncond + GUIDANCE * (cond - uncond))


def shapes(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Coloured discs, for a run without the emoji: the position and the colour depend on the class."""
    label = torch.arange(count) % networks.NO_EMOJI
    centre = torch.stack([label % 4, label // 4], dim=1).float() / 2 - 0.75
    axis = torch.linspace(-1, 1, size)
    inside = ((axis.view(1, -1, 1) - centre[:, 1].view(-1, 1, 1)) ** 2 + (axis - centre[:, :1, None]) ** 2) < 0.1
    colour = torch.stack([label / 5 - 1, 1 - label / 5, (label % 3) - 1.0], dim=1).view(-1, 3, 1, 1)
    return torch.where(inside[:, None], colour, torch.ones(())), label


def train(network: nn.Module, images: Tensor, labels: Tensor, seconds: float, batch: int) -> dict[str, Any]:
    """Trains for so long and leaves the average of the weights in `network`."""
    device = images.device
    averaged = deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-4, weight_decay=0.01, betas=(0.9, 0.99))
    torch.manual_seed(0)
    begun, step, losses = time.monotonic(), 0, list[Tensor]()
    while (elapsed := time.monotonic() - begun) < seconds or step == 0:
        rate = 3e-4 * min(1.0, (step + 1) / 100) * max(0.02, 1 - elapsed / seconds)
        for group in optimiser.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(images), (batch,), device=device)
        clean, label = images[rows], labels[rows].clone()
        clean = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, clean.flip(-1), clean)
        label[torch.rand(batch, device=device) < 0.1] = networks.NO_EMOJI
        t = torch.randn(batch, device=device).sigmoid()
        noise = torch.randn_like(clean)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = network(torch.lerp(clean, noise, t.view(-1, 1, 1, 1)), t, label)
        loss = functional.mse_loss(velocity.float(), noise - clean)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        share = 1 - min(0.999, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), share)
        losses.append(loss.detach())
    network.load_state_dict(averaged.state_dict())
    return {"optimiser_steps": step, "loss": float(torch.stack(losses[-100:]).mean())}


@torch.no_grad()
def images_of(
    network: nn.Module, steps: int, method: Method | str, count: int, device: torch.device
) -> tuple[Tensor, int]:
    """`count` samples with guidance, Euler on sigma = t, and how many calls that took."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, networks.EMOJI_SIZE, networks.EMOJI_SIZE, generator=generator).to(device)
    model = Guided(network, (torch.arange(count) % networks.NO_EMOJI).to(device))
    sigmas = torch.linspace(1, 0, steps + 1, device=device)
    return sample("euler", CachedDenoiser(model, method), x, sigmas), model.calls


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over the samples, each sample's own range as the peak."""
    peak = (b.amax((1, 2, 3)) - b.amin((1, 2, 3))).double()
    error = ((a.double() - b.double()) ** 2).mean((1, 2, 3))
    return float((10 * torch.log10(peak**2 / error)).mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of the npm package; without it, coloured discs")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs=3, default=(128, 192, 320))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-output"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    images, labels = emoji(options.images) if options.images else shapes(1000, networks.EMOJI_SIZE)
    network = Large(tuple(options.widths)).to(device)
    found = train(network, images.to(device), labels.to(device), options.seconds, options.batch)
    found |= {
        "images": "emoji" if options.images else "coloured discs",
        "parameters": sum(p.numel() for p in network.parameters()),
        "rows": [],
    }
    full, calls = images_of(network, STEPS, "none", options.samples, device)
    for interval in (2, 3):
        cached, made = images_of(network, STEPS, Forecast(interval), options.samples, device)
        fewer, _ = images_of(network, made, "none", options.samples, device)
        found["rows"].append(
            {"method": f"Forecast({interval})", "calls": made, "of": calls,
             "psnr": psnr(cached, full), "psnr_fewer_steps": psnr(fewer, full)}
        )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "train.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    torch.save(network.state_dict(), options.out / "emoji-large.pt")


if __name__ == "__main__":
    main()
