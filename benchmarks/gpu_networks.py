"""SDXL's U-Net and Flux's and Wan's transformers with random weights, for benchmarks/gpu.py.

The configurations are the published ones of stabilityai/stable-diffusion-xl-base-1.0, black-forest-labs/FLUX.1-dev and
Wan-AI/Wan2.1-T2V-1.3B; `tiny=True` gives each a miniature for a dry run. Only the denoiser is built: prompts are random
embeddings, and the pipelines return latents. Random weights cost as much as trained ones, and say nothing about images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn


@dataclass(frozen=True)
class Network:
    """A denoiser in its pipeline.

    Args:
        build: the pipeline, for a device and a dtype.
        inputs: what the pipeline is called with, beside the number of steps.
        denoiser: the name of the component.
        last: the module at the end of the denoiser that runs in a computed step alone.
        steps: of a measured run.
    """

    build: Callable[[torch.device, torch.dtype], Any]
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]
    denoiser: str
    last: str
    steps: int


SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_SDXL = SDXL | {
    "sample_size": 8,
    "block_out_channels": (8, 8, 16),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
}
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TINY_FLUX = FLUX | {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
WAN: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
TINY_WAN = WAN | {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def network(name: str, tiny: bool = False) -> Network:
    """`sdxl`, `flux` or `wan`."""
    return {"sdxl": _sdxl, "flux": _flux, "wan": _wan}[name](tiny)


def _sdxl(tiny: bool) -> Network:
    config = TINY_SDXL if tiny else SDXL
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    text, pooled = config["cross_attention_dim"], 16 if tiny else 1280

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        size = 8 * config["sample_size"]
        return {
            "prompt_embeds": _random((1, 77, text), device, dtype, 1),
            "negative_prompt_embeds": _random((1, 77, text), device, dtype, 2),
            "pooled_prompt_embeds": _random((1, pooled), device, dtype, 3),
            "negative_pooled_prompt_embeds": _random((1, pooled), device, dtype, 4),
            "height": size,
            "width": size,
            "guidance_scale": 5.0,
        }

    def build(device: torch.device, dtype: torch.dtype) -> Any:
        unet = _made(diffusers.UNet2DConditionModel, config, device, dtype)
        euler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **scheduler)
        return _pipeline(diffusers.StableDiffusionXLPipeline, unet=unet, scheduler=euler)

    return Network(build, inputs, "unet", "up_blocks.2", 20)


def _flux(tiny: bool) -> Network:
    config, side = (TINY_FLUX, 32) if tiny else (FLUX, 1024)

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "prompt_embeds": _random((1, 8 if tiny else 512, config["joint_attention_dim"]), device, dtype, 1),
            "pooled_prompt_embeds": _random((1, config["pooled_projection_dim"]), device, dtype, 2),
            "height": side,
            "width": side,
            "guidance_scale": 3.5,
        }

    def build(device: torch.device, dtype: torch.dtype) -> Any:
        transformer = _made(diffusers.FluxTransformer2DModel, config, device, dtype)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return _pipeline(diffusers.FluxPipeline, transformer=transformer, scheduler=scheduler)

    last = config["num_single_layers"] - 1
    return Network(build, inputs, "transformer", f"single_transformer_blocks.{last}.attn", 20)


def _wan(tiny: bool) -> Network:
    config, size = (TINY_WAN, (16, 16, 5)) if tiny else (WAN, (480, 832, 81))

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        shape = (1, 8 if tiny else 512, config["text_dim"])
        height, width, frames = size
        return {
            "prompt_embeds": _random(shape, device, dtype, 1),
            "negative_prompt_embeds": _random(shape, device, dtype, 2),
            "height": height,
            "width": width,
            "num_frames": frames,
            "guidance_scale": 5.0,
        }

    def build(device: torch.device, dtype: torch.dtype) -> Any:
        transformer = _made(diffusers.WanTransformer3DModel, config, device, dtype)
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        return _pipeline(diffusers.WanPipeline, transformer=transformer, scheduler=scheduler)

    return Network(build, inputs, "transformer", f"blocks.{config['num_layers'] - 1}.attn1", 10)


def _made(kind: type[nn.Module], config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with its own random initialisation, drawn on the device and in the dtype: 12e9 weights fit once."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(**config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device, dtype).eval().requires_grad_(False)


def _pipeline(kind: type, **parts: Any) -> Any:
    """The pipeline without text encoders and VAE."""
    missing = [
        name
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in parts and name != "self" and parameter.default is parameter.empty
    ]
    pipe = kind(**parts, **dict.fromkeys(missing))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
