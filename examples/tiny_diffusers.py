"""What the diffusers_*.py examples share: their arguments, the measuring, and miniatures of the pipelines.

`sdxl()`, `flux()` and `wan()` build the real pipeline classes offline with seeded random weights. They have no text
encoder; `inputs(prompt)` is what they take in a prompt's place.
"""

from __future__ import annotations

import argparse
import inspect
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

import stepcache

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TINY_STEPS = 20


def arguments(
    doc: str,
    model: str,
    *,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    dtype: str,
    out: str,
    tiny_size: tuple[int, int],
    frames: int | None = None,
) -> argparse.Namespace:
    """The command line. `options.cache` is the method, None for `--method none`; sizes are (width, height)."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, help="hub id or folder (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="instead a miniature with random weights, built offline")
    parser.add_argument("--prompt", default="a lighthouse at dusk, waves against the rocks")
    parser.add_argument("--steps", type=int, help=f"(default {steps}; {TINY_STEPS} with --tiny)")
    parser.add_argument("--guidance", type=float, default=guidance, help="guidance scale (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, help=f"pixels (default {size[0]}; {tiny_size[0]} with --tiny)")
    parser.add_argument("--height", type=int, help=f"pixels (default {size[1]}; {tiny_size[1]} with --tiny)")
    if frames is not None:
        parser.add_argument("--frames", type=int, help=f"4n + 1 (default {frames}; 5 with --tiny)")
    parser.add_argument("--method", default="forecast", choices=[*stepcache.METHODS], help="(default %(default)s)")
    parser.add_argument("--options", default="", help='the method\'s options, as in "threshold=0.5,start=0.2"')
    parser.add_argument("--mask", help='steps that must compute: "1,1,0,..." or slow, medium, fast, ultra')
    parser.add_argument("--device", default=device, help="(default here: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of the networks (default {dtype}; float32 on a cpu)")
    parser.add_argument("--cpu-offload", action="store_true", help="only the part at work is on the device")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser")
    parser.add_argument("--compare", action="store_true", help="also sample without the cache, and compare")
    parser.add_argument("--out", type=Path, default=Path(out), help="(default %(default)s)")
    options = parser.parse_args()

    on_cpu = torch.device(options.device).type == "cpu"
    options.dtype = DTYPES[options.dtype or ("float32" if on_cpu else dtype)]
    options.steps = options.steps or (TINY_STEPS if options.tiny else steps)
    options.width = options.width or (tiny_size if options.tiny else size)[0]
    options.height = options.height or (tiny_size if options.tiny else size)[1]
    if frames is not None:
        options.frames = options.frames or (5 if options.tiny else frames)
    if options.cpu_offload and on_cpu:
        parser.error("--cpu-offload moves the networks to an accelerator in turn, and --device is cpu: leave it out")
    if options.method == "none":
        if options.options or options.mask or options.compare:
            parser.error("--options, --mask and --compare need a cache: choose another --method than none")
        options.cache = None
        return options
    if options.method == "static" and options.mask is None:
        parser.error("--method static skips what a mask says: give --mask slow, medium, fast, ultra or digits")
    try:
        mask = stepcache.StepMask(options.mask) if options.mask else None
        if mask is not None:
            mask.for_steps(options.steps)  # a mask of the wrong length is told before the checkpoint is loaded
        given = {} if mask is None else {"mask": mask}
        options.cache = stepcache.method(options.method, options.options, **given)
    except (ValueError, TypeError) as error:
        raise SystemExit(f"--method, --options or --mask: {error}") from error
    return options


def load(pipeline: type, options: argparse.Namespace, **parts: Any) -> Any:
    """`pipeline.from_pretrained(...)`; what cannot be read ends the program with a sentence."""
    try:
        return pipeline.from_pretrained(options.model, **{"torch_dtype": options.dtype, **parts})
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--model {options.model} is no {pipeline.__name__} that can be read here: {error}\n"
            "A gated model needs its licence accepted and `hf auth login`; --tiny needs no model."
        ) from error


def place(pipe: Any, denoiser: nn.Module, options: argparse.Namespace) -> None:
    """Puts the pipeline on the device, offloaded and compiled as asked: the cache then stands outside of both."""
    if options.cpu_offload:
        pipe.enable_model_cpu_offload(device=options.device)
    else:
        pipe.to(options.device)
    if options.compile:
        denoiser.compile()


def measure(denoiser: nn.Module, generate: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, int]:
    """The frames (F, H, W, 3) as uint8, the wall time in seconds, and the denoiser's forwards in it."""
    forwards = 0
    before = denoiser.__dict__.get("_compiled_call_impl")

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        forwards += 1
        return (before or denoiser._call_impl)(*args, **kwargs)

    # where Module.compile() puts its function: a hook would be compiled along, and again at every count
    denoiser.__dict__["_compiled_call_impl"] = counted
    try:
        start = time.perf_counter()
        frames = generate()
        seconds = time.perf_counter() - start
    finally:
        del denoiser.__dict__["_compiled_call_impl"]
        if before is not None:
            denoiser.__dict__["_compiled_call_impl"] = before
    return (np.asarray(frames).clip(0, 1) * 255).round().astype(np.uint8), seconds, forwards


def save(frames: np.ndarray, path: Path) -> None:
    """All frames if `path` is a .gif, 16 a second as near as a GIF can; otherwise the middle one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame) for frame in frames]
    if path.suffix.lower() == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:], duration=60, loop=0)
    else:
        images[len(images) // 2].save(path)


def run(
    options: argparse.Namespace,
    denoiser: nn.Module,
    uncached: Callable[..., np.ndarray],
    cached: Callable[[], np.ndarray],
) -> None:
    """Samples, saves and tells; with --compare without the cache as well. `uncached(steps)` is also the warm-up."""
    if options.cache is None:
        frames, seconds, forwards = measure(denoiser, uncached)
        save(frames, options.out)
        print(f"{options.out}: {seconds:.2f} s, {forwards} forwards of the denoiser")
        return
    if options.compare:
        uncached(steps=2)  # first calls are slow, and belong to neither run's time
        reference, without, all_forwards = measure(denoiser, uncached)
        path = options.out.with_stem(f"{options.out.stem}-uncached")
        save(reference, path)
        print(f"{path}: {without:.2f} s, {all_forwards} forwards of the denoiser")
    frames, seconds, forwards = measure(denoiser, cached)
    save(frames, options.out)
    print(f"{options.out}: {seconds:.2f} s, {forwards} forwards of the denoiser")
    if options.compare:
        print(
            f"{all_forwards - forwards} of {all_forwards} forwards skipped, {without / seconds:.2f}x as fast as "
            f"without the cache, PSNR {psnr(frames, reference):.2f} dB"
        )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """`10 log10(255^2 / mean((a - b)^2))` in dB; infinite when they are equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def inputs(prompt: str, options: argparse.Namespace, *, pooled: bool = False, negative: bool = False) -> dict[str, Any]:
    """Random embeddings seeded by the prompt's text: (1, 5, 16), and the `pooled` one (1, 16)."""
    found = {}
    for prefix, text in (("", prompt), ("negative_", ""))[: 1 + negative]:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        found[f"{prefix}prompt_embeds"] = torch.randn(1, 5, 16, generator=generator)
        if pooled:
            found[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, 16, generator=generator)
    return {name: value.to(options.device, options.dtype) for name, value in found.items()}


def sdxl(dtype: torch.dtype) -> Any:
    unet = _seeded(
        diffusers.UNet2DConditionModel,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return _pipeline(diffusers.StableDiffusionXLPipeline, dtype, unet=unet, vae=_vae(), scheduler=scheduler)


def flux(dtype: torch.dtype) -> Any:
    transformer = _seeded(
        diffusers.FluxTransformer2DModel,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return _pipeline(diffusers.FluxPipeline, dtype, transformer=transformer, vae=_vae(), scheduler=scheduler)


def wan(dtype: torch.dtype) -> Any:
    transformer = _seeded(
        diffusers.WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = _seeded(
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _pipeline(diffusers.WanPipeline, dtype, transformer=transformer, vae=vae, scheduler=scheduler)


def _vae() -> nn.Module:
    return _seeded(
        diffusers.AutoencoderKL,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        shift_factor=0.1,
    )


def _seeded(kind: type, **config: Any) -> nn.Module:
    """A model whose every weight is drawn here, those that start as zero too."""
    model = kind(**config)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, 0, 0.7 * p[0].numel() ** -0.5, generator=generator)
        else:
            nn.init.normal_(p, float(name.endswith("weight")), 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def _pipeline(kind: type, dtype: torch.dtype, **parts: Any) -> Any:
    """Every other argument that the class requires is None."""
    required = [n for n, p in inspect.signature(kind.__init__).parameters.items() if p.default is p.empty]
    pipe = kind(**{name: None for name in required if name != "self"} | parts)
    return pipe if dtype == torch.float32 else pipe.to(dtype)  # diffusers warns about every cast
