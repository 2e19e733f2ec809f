"""What stepcache itself costs beside a U-Net of real size: one evaluation's bookkeeping as a share of one call.

python benchmarks/share.py [--size sdxl|sd15|small] [--device cuda] [--dtype bfloat16] [--calls 5]

Random weights in Stable Diffusion XL's configuration (128x128 latents), in Stable Diffusion 1's (64x64), or a small one
in that form (64x64). A call is guidance's batch of two. The bookkeeping is timed with a model that does nothing, on
latents of the same size.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from overhead import seconds
from rich.console import Console
from rich.progress import track

from stepcache import Forecast, Method, UCache
from stepcache.samplers.k_diffusion import CachedDenoiser

XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD = {"cross_attention_dim": 768, "attention_head_dim": 8}
SMALL = {"block_out_channels": (32, 64, 128, 256), "cross_attention_dim": 64, "attention_head_dim": 8}


@dataclass(frozen=True)
class Size:
    config: dict
    side: int


SIZES = {"sdxl": Size(XL, 128), "sd15": Size(SD, 64), "small": Size(SMALL, 64)}
METHODS: dict[str, tuple[Method, str]] = {
    "Forecast, computed": (Forecast(), "C"),
    "Forecast, skipped": (Forecast(), "S"),
    "UCache, computed": (UCache(1e-30, start=0.0, end=1.0), "C"),
    "UCache, skipped": (UCache(1e30, start=0.0, end=1.0), "S"),
}


@torch.no_grad()
def call(size: Size, device: torch.device, dtype: torch.dtype, calls: int) -> tuple[int, float]:
    """Parameters of the U-Net, and median seconds of one call, both branches in a batch."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        unet = UNet2DConditionModel(sample_size=size.side, **size.config).eval()
        torch.set_default_dtype(torch.float32)
    make = {"device": device, "dtype": dtype}
    x, text = (
        torch.randn(2, 4, size.side, size.side, **make),
        torch.randn(2, 77, size.config["cross_attention_dim"], **make),
    )
    added = (
        {"text_embeds": torch.randn(2, 1280, **make), "time_ids": torch.ones(2, 6, **make)}
        if "addition_embed_type" in size.config
        else None
    )
    time = torch.tensor(500, device=device)
    work = lambda: unet(x, time, text, added_cond_kwargs=added)  # noqa: E731
    seconds(work, device)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return parameters, statistics.median(seconds(work, device) for _ in track(range(calls), "calls"))


@torch.no_grad()
def bookkeeping(method: Method, decision: str, side: int, device: torch.device) -> float:
    """Median seconds of an evaluation of that decision, latents in float32 as samplers keep them."""
    answers = [torch.randn(2, 4, side, side, device=device) for _ in range(4)]
    turn = iter(range(10_000))
    model = CachedDenoiser(lambda x, sigma: answers[next(turn) % 4], method, branches=("uncond", "cond"))
    sigmas = torch.linspace(10, 0.1, 60)
    times = []
    with model.run(torch.cat([sigmas, torch.zeros(1)]), stages=1):
        for k, sigma in enumerate(sigmas):
            level = sigma.to(device).expand(2)
            times.append(seconds(lambda level=level, k=k: model(answers[(k + 1) % 4], level), device))
        decisions = model.report.decisions("cond")
    return statistics.median(t for t, f in list(zip(times, decisions, strict=True))[10:] if f == decision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--calls", type=int, default=5)
    options = parser.parse_args()
    device, size = torch.device(options.device), SIZES[options.size]
    parameters, one = call(size, device, getattr(torch, options.dtype), options.calls)
    console = Console()
    console.print(f"{options.size}, {parameters / 1e6:.0f} M, {options.dtype}: a call of both takes {one * 1e3:.1f} ms")
    for name, (method, decision) in METHODS.items():
        ours = bookkeeping(method, decision, size.side, device)
        console.print(f"{name:<20} {ours * 1e3:8.3f} ms  {ours / one:8.3%} of a call")


if __name__ == "__main__":
    main()
