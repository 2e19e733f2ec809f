"""Writes a checkpoint like Stable Diffusion 1's with random weights, for ComfyUI's own node Load Checkpoint.

    python comfyui_checkpoint.py CHECKOUT FILE

The U-Net has the width that ComfyUI recognises and one level; CLIP-L has its size, because ComfyUI fixes it; the VAE is
a TAESD. 0.4 GB. The weights are drawn so that the output follows the input, as a trained model's does: the image says
nothing about quality.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def weights(module: torch.nn.Module, prefix: str, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The module's state, drawn anew: norms are 1, the rest keeps the size of what goes through it."""
    state = {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            state[prefix + name] = value.clone()
        elif "norm" in name and name.endswith("weight") and value.ndim == 1:
            state[prefix + name] = torch.ones(value.shape)
        elif value.ndim < 2:
            state[prefix + name] = torch.zeros(value.shape)
        else:
            state[prefix + name] = torch.randn(value.shape) * scale / value[0].numel() ** 0.5
    return state


def unet(comfy_ops: Any) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1],
        channel_mult=(1,),
        transformer_depth=[1],
        transformer_depth_output=[1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        num_head_channels=-1,
        use_spatial_transformer=True,
        legacy=False,
        use_linear_in_transformer=False,
        dtype=torch.float32,
        operations=comfy_ops,
    )


def main(checkout: str, path: str) -> None:
    sys.path.insert(0, checkout)
    sys.argv = sys.argv[:1]
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.ops
    import comfy.sd1_clip
    import comfy.taesd.taesd
    from safetensors.torch import save_file

    torch.manual_seed(0)
    text = comfy.sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float32, model_options={})
    made = weights(unet(comfy.ops.disable_weight_init), "model.diffusion_model.")
    made |= weights(text.clip_l.transformer, "cond_stage_model.transformer.")
    made |= weights(comfy.taesd.taesd.TAESD(), "first_stage_model.")
    for name in made:  # GroupNorms of the U-Net, which are not called so
        if name.endswith(("in_layers.0.weight", "out_layers.0.weight", "model.out.0.weight")) or ".out.0.w" in name:
            made[name] = torch.ones_like(made[name])
    made["first_stage_model.vae_scale"] = torch.tensor(1.0)
    save_file({name: value.half().contiguous() for name, value in made.items()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
