"""Real diffusers pipeline classes with tiny seeded random weights, built offline, for the whole-denoiser matrix.

What the categories exercise:

- batched: guidance as one call on a doubled (or tripled) batch; sequential: one call per branch, in a row
- guider: the branches come from a guider object that the pipeline loops over; single: one call per step (distilled)
- unconditional: one call per step, no text, no callback_on_step_end
- img2img: only the last part of the schedule runs; mid-run: batch or number of calls changes inside a run
- extra-in: more channels in than out (inpainting, pix2pix, depth, image to video), on dim 1 mostly, on dim 2 in SVD and
  CogVideoX, on the last dim in packed Flux and Kandinsky 5
- learned-sigma: more channels out than in; lists: lists of tensors in and out
- audio: audio only (StableAudio) or a pair of video and audio, three calls per step with differing batch (LTX-2)
- experts: two denoisers share one schedule; per-token: a tensor of timesteps per call
- control: a ControlNet runs before the denoiser; scheduler: two calls a step, or one more than asked for

Every class and model is looked up when an entry is built, so this file imports without diffusers. What an older release
lacks is skipped. `PIPELINES[name].build()` twice gives the same weights bit for bit.
"""

# ruff: noqa: C408 - configurations read best as keyword arguments

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

STEPS = 6


@dataclass(frozen=True)
class Tiny:
    build: Callable[[], Any]
    call: Callable[[Any], dict]
    denoisers: tuple[str, ...]
    category: str
    forwards: int | None  # calls of the denoisers' forward in an uncached run, all denoisers together


def run(pipe, tiny: Tiny) -> torch.Tensor:
    """The pipeline's output as one tensor; several outputs (video and audio) are flattened and joined."""
    tensors = list(_tensors(pipe(**tiny.call(pipe))))
    return tensors[0] if len(tensors) == 1 else torch.cat([t.flatten().float() for t in tensors])


def of_diffusers(name: str) -> Any:
    """What diffusers has under this name, as `hooks.MagCacheConfig`. If this release has none, the test is skipped."""
    module, _, attribute = f"diffusers.{name}".rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        pytest.skip(f"diffusers {version('diffusers')} has no {name}")


def _tensors(out):
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, np.ndarray):
        yield torch.from_numpy(out)
    elif isinstance(out, dict):
        yield from (t for value in out.values() for t in _tensors(value))
    elif isinstance(out, (list, tuple)):
        yield from (t for value in out for t in _tensors(value))


def E(*shape: int, seed: int = 1) -> torch.Tensor:
    """A fixed random tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(channels: int = 3, size: int = 16) -> torch.Tensor:
    return E(1, channels, size, size, seed=7).sigmoid()


def mask(size: int = 16) -> torch.Tensor:
    return (torch.arange(size) < size // 2).float().expand(1, 1, size, size).clone()


def make(name: str, **config):
    """A diffusers or transformers model whose every weight is drawn here, zero-initialised and empty ones too."""
    import diffusers

    return seeded(getattr(diffusers, name)(**config))


def seeded(model):
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.ndim > 1:
                p.normal_(0, 0.7 * p[0].numel() ** -0.5)
            else:
                p.normal_(float(name.endswith("weight")), 0.1)
    return model.eval().requires_grad_(False)


def sched(name: str, **config):
    import diffusers

    return getattr(diffusers, name + "Scheduler")(**config)


PIPELINES: dict[str, Tiny] = {}
SINCE_0_33 = ("sana", "ltx", "latte")
"""Pipelines that diffusers 0.32 has, but not without a VAE or a tokenizer, or without returning latents."""


def add(key, cls, category, forwards, parts, call, denoisers=("transformer",), after=None) -> None:
    """`parts()` gives the components; every other required argument of the class becomes None."""

    def build():
        kind = of_diffusers(cls)
        if key in SINCE_0_33 and version("diffusers").startswith("0.32."):
            pytest.skip(f"diffusers 0.32 has no {cls} that is built and run without a VAE or a tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = parts()
            for name, p in list(inspect.signature(kind.__init__).parameters.items())[1:]:
                if name not in given and p.default is p.empty:
                    given[name] = None
                elif name == "requires_safety_checker":
                    given[name] = False
            pipe = kind(**given)
        pipe.set_progress_bar_config(disable=True)
        if after:
            after(pipe)
        return pipe

    def kwargs(pipe) -> dict:
        generator = torch.Generator().manual_seed(0)
        return {"generator": generator, "num_inference_steps": STEPS, "output_type": "latent", **call()}

    PIPELINES[key] = Tiny(build, kwargs, tuple(denoisers), category, forwards)


# Tables of configurations: one keyword a line would make them 1,400 lines.
# fmt: off

# --- text conditions -------------------------------------------------------------------------------------------------


def text(negative=True, pooled=(), mask="", length=5) -> dict:
    """prompt_embeds and what goes with them: `pooled` names and `mask` name of the pipeline in question."""
    out = {"prompt_embeds": E(1, length, 16)}
    out |= {name: E(1, 16, seed=2) for name in pooled}
    if mask:
        out[mask] = torch.ones(1, length, dtype=torch.long)
    if negative:
        out |= {"negative_" + k: v if k == mask else E(*v.shape, seed=3) for k, v in out.items()}
    return out


# --- Stable Diffusion and other U-Nets -------------------------------------------------------------------------------

BLOCKS = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
ATTN = dict(
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=4,
)
XL = dict(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40)
POOLED = ("pooled_prompt_embeds",)
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def unet(**config):
    return make("UNet2DConditionModel", **BLOCKS, **ATTN, **config)


def vae(**config):
    return make("AutoencoderKL", **BLOCKS, **VAE, sample_size=16, **config)


def control(**config):
    attn = {k: v for k, v in ATTN.items() if k not in ("sample_size", "up_block_types")}
    return make("ControlNetModel", **BLOCKS, **attn, conditioning_embedding_out_channels=(4, 8), **config)


def ddim(**config):
    return sched("DDIM", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SD_BETAS, **config)


def euler():
    return sched("EulerDiscrete", steps_offset=1, **SD_BETAS)


def sd(key, cls, category, forwards, call, parts=None, scheduler=ddim, **config):
    add(
        key,
        "StableDiffusion" + cls + "Pipeline",
        category,
        forwards,
        lambda: {"unet": unet(**config), "vae": vae(), "scheduler": scheduler(), **(parts() if parts else {})},
        call,
        ("unet",),
    )


sd("sd", "", "batched", STEPS, text)
sd("sd-no-guidance", "", "single", STEPS, lambda: text() | {"guidance_scale": 1.0})
sd("sdxl", "XL", "batched", STEPS, lambda: text(pooled=POOLED), scheduler=euler, **XL)
sd("sd-img2img", "Img2Img", "img2img", 3, lambda: text() | {"image": image(), "strength": 0.5})
sd("sdxl-img2img", "XLImg2Img", "img2img", 3,
   lambda: text(pooled=POOLED) | {"image": image(), "strength": 0.5}, scheduler=euler, **XL)
sd("sd-inpaint", "Inpaint", "extra-in", STEPS,
   lambda: text() | {"image": image(), "mask_image": mask()}, in_channels=9)
sd("pix2pix", "InstructPix2Pix", "extra-in", STEPS, lambda: text() | {"image": image()}, in_channels=8)
sd("sd-controlnet", "ControlNet", "control", STEPS,
   lambda: text() | {"image": image()}, lambda: {"controlnet": control()})
sd("sdxl-controlnet", "XLControlNet", "control", STEPS,
   lambda: text(pooled=POOLED) | {"image": image()}, lambda: {"controlnet": control(**XL)}, euler, **XL)
sd("sd-pag", "PAG", "batched", STEPS, text)

add("marigold", "MarigoldDepthPipeline", "extra-in", STEPS,
    lambda: {"unet": unet(in_channels=8), "vae": vae(), "scheduler": ddim(prediction_type="v_prediction"),
             "prediction_type": "depth"},
    lambda: {"image": image(), "processing_resolution": 0, "output_type": "np"}, ("unet",),
    lambda pipe: setattr(pipe, "empty_text_embedding", E(1, 2, 16)))

# --- unconditional ---------------------------------------------------------------------------------------------------


def unet2d():
    return make("UNet2DModel", **BLOCKS, sample_size=8, attention_head_dim=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))


add("ddpm", "DDPMPipeline", "unconditional", STEPS, lambda: {"unet": unet2d(), "scheduler": sched("DDPM")},
    lambda: {"output_type": "np"}, ("unet",))
add("ddim", "DDIMPipeline", "unconditional", STEPS, lambda: {"unet": unet2d(), "scheduler": sched("DDIM")},
    lambda: {"output_type": "np"}, ("unet",))

# --- image transformers ----------------------------------------------------------------------------------------------


def flow(**config):
    return sched("FlowMatchEulerDiscrete", **config)


def dit(key, cls, category, forwards, model, call, scheduler=flow, **config):
    add(key, cls + "Pipeline", category, forwards,
        lambda: {"transformer": make(model, **config), "vae": vae(shift_factor=0.1), "scheduler": scheduler()}, call)


HEADS = dict(num_attention_heads=2, attention_head_dim=4)
dit("dit", "DiT", "learned-sigma", STEPS, "DiTTransformer2DModel",
    lambda: {"class_labels": [3], "output_type": "np"}, lambda: sched("DDIM"),
    **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000)

FLUX = dict(in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8))
FLUX_GUIDED = FLUX | dict(pooled_projection_dim=16, guidance_embeds=True)
SIZE = dict(height=16, width=16)
dit("flux", "Flux", "single", STEPS, "FluxTransformer2DModel",
    lambda: text(False, POOLED) | SIZE, lambda: flow(use_dynamic_shifting=True), **FLUX_GUIDED)
dit("flux-true-cfg", "Flux", "sequential", 2 * STEPS, "FluxTransformer2DModel",
    lambda: text(True, POOLED) | SIZE | {"true_cfg_scale": 4.0}, **FLUX_GUIDED)
dit("sd3", "StableDiffusion3", "batched", STEPS, "SD3Transformer2DModel", lambda: text(pooled=POOLED),
    sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8)
dit("pixart", "PixArtAlpha", "learned-sigma", STEPS, "PixArtTransformer2DModel",
    lambda: text(mask="prompt_attention_mask") | {"negative_prompt": None, "use_resolution_binning": False},
    lambda: sched("DPMSolverMultistep"),
    **HEADS, num_layers=2, cross_attention_dim=8, sample_size=8, caption_channels=16)


def bare(key, cls, category, forwards, model, call, scheduler=flow, parts=None, denoisers=("transformer",), after=None,
         **config):
    """No VAE: the output is the latent and the pipeline's own scale factors hold."""
    add(key, cls + "Pipeline", category, forwards,
        lambda: {"transformer": make(model, **config), "scheduler": scheduler(), **(parts() if parts else {})},
        call, denoisers, after)


dit("flux-fill", "FluxFill", "extra-in", STEPS, "FluxTransformer2DModel",
    lambda: text(False, POOLED) | SIZE | {"image": image(), "mask_image": mask()}, **FLUX_GUIDED | {"in_channels": 48})
dit("flux-control", "FluxControl", "extra-in", STEPS, "FluxTransformer2DModel",
    lambda: text(False, POOLED) | SIZE | {"control_image": image()}, **FLUX_GUIDED | {"in_channels": 32})
dit("chroma", "Chroma", "sequential", 2 * STEPS, "ChromaTransformer2DModel",
    lambda: {k: v.bool() if "mask" in k else v for k, v in text(mask="prompt_attention_mask").items()} | SIZE,
    **FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
bare("sana", "Sana", "batched", STEPS, "SanaTransformer2DModel",
     lambda: text(mask="prompt_attention_mask") | dict(
         height=128, width=128, negative_prompt=None, use_resolution_binning=False),
     lambda: sched("DPMSolverMultistep", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
     **HEADS, in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=4,
     cross_attention_dim=8, caption_channels=16, sample_size=4)
QWEN = dict(in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
LATENT4 = dict(height=32, width=32)
bare("qwen-image", "QwenImage", "sequential", 2 * STEPS, "QwenImageTransformer2DModel",
     lambda: text(mask="prompt_embeds_mask") | LATENT4, lambda: flow(use_dynamic_shifting=True), **QWEN)


def lists(**more):
    return {"prompt_embeds": [E(5, 16)], "negative_prompt_embeds": [E(5, 16, seed=3)], **LATENT4, **more}


ZIMAGE = dict(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
              axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
bare("z-image", "ZImage", "lists", STEPS, "ZImageTransformer2DModel", lists, lambda: flow(shift=3.0), **ZIMAGE)
bare("z-image-truncated", "ZImage", "mid-run", STEPS, "ZImageTransformer2DModel",
     lambda: lists(cfg_truncation=0.5), lambda: flow(shift=3.0), **ZIMAGE)
LUMINA2 = dict(sample_size=4, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
               num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=16)
bare("lumina2", "Lumina2", "sequential", 2 * STEPS, "Lumina2Transformer2DModel",
     lambda: text(mask="prompt_attention_mask") | LATENT4, **LUMINA2)
bare("lumina2-truncated", "Lumina2", "mid-run", 9, "Lumina2Transformer2DModel",
     lambda: text(mask="prompt_attention_mask") | LATENT4 | {"cfg_trunc_ratio": 0.5}, **LUMINA2)
bare("auraflow", "AuraFlow", "batched", STEPS, "AuraFlowTransformer2DModel",
     lambda: text(mask="prompt_attention_mask") | LATENT4,
     sample_size=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
     joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=16)
bare("lumina", "Lumina", "learned-sigma", STEPS, "LuminaNextDiT2DModel",
     lambda: text(mask="prompt_attention_mask") | LATENT4,
     sample_size=4, hidden_size=16, num_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
     cross_attention_dim=16)
dit("hunyuan-dit", "HunyuanDiT", "learned-sigma", STEPS, "HunyuanDiT2DModel",
    lambda: text(mask="prompt_attention_mask")
    | {k.replace("_embeds", "_embeds_2") if "embeds" in k else k + "_2": v
       for k, v in text(mask="prompt_attention_mask").items()}
    | SIZE | {"use_resolution_binning": False},
    lambda: sched("DDPM"),
    sample_size=8, num_layers=4, patch_size=2, num_attention_heads=2, attention_head_dim=8, in_channels=4,
    hidden_size=16, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=5,
    text_len_t5=5, activation_fn="gelu-approximate")
COGVIEW = dict(in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, text_embed_dim=16, time_embed_dim=8,
               condition_dim=2, pos_embed_max_size=8, sample_size=4)
bare("cogview3", "CogView3Plus", "batched", STEPS, "CogView3PlusTransformer2DModel",
     lambda: text() | LATENT4, lambda: sched("CogVideoXDDIM", prediction_type="v_prediction"),
     attention_head_dim=4, **COGVIEW)
bare("cogview4", "CogView4", "sequential", 2 * STEPS, "CogView4Transformer2DModel",
     lambda: text() | LATENT4, lambda: flow(use_dynamic_shifting=True),
     attention_head_dim=8, rope_axes_dim=(8, 8), **COGVIEW)

# --- video -----------------------------------------------------------------------------------------------------------

FRAMES = LATENT4 | {"num_frames": 5}
WAN = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
           ffn_dim=16, num_layers=1, rope_max_seq_len=32)
WAN_VAE = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
               latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def unipc():
    return sched("UniPCMultistep", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


bare("wan", "Wan", "sequential", 2 * STEPS, "WanTransformer3DModel", lambda: text() | FRAMES, unipc, **WAN)
bare("wan-2.2", "Wan", "experts", 2 * STEPS, "WanTransformer3DModel", lambda: text() | FRAMES, unipc,
     lambda: {"transformer_2": make("WanTransformer3DModel", **WAN), "boundary_ratio": 0.875},
     ("transformer", "transformer_2"), **WAN)
bare("wan-per-token", "Wan", "per-token", 2 * STEPS, "WanTransformer3DModel", lambda: text() | FRAMES, unipc,
     lambda: {"expand_timesteps": True}, **WAN)
bare("wan-i2v", "WanImageToVideo", "extra-in", 2 * STEPS, "WanTransformer3DModel",
     lambda: text() | FRAMES | {"image": image(size=32)}, unipc,
     lambda: {"vae": make("AutoencoderKLWan", **WAN_VAE)}, **WAN | {"in_channels": 12})
bare("ltx", "LTX", "batched", STEPS, "LTXVideoTransformer3DModel",
     lambda: text(mask="prompt_attention_mask") | dict(height=64, width=64, num_frames=9),
     in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
     caption_channels=16)
COGVIDEO = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
                text_embed_dim=16, num_layers=1, sample_width=4, sample_height=4, sample_frames=9,
                max_text_seq_length=5, use_rotary_positional_embeddings=True)
bare("cogvideox", "CogVideoX", "batched", STEPS, "CogVideoXTransformer3DModel", lambda: text() | FRAMES,
     lambda: sched("CogVideoXDDIM", prediction_type="v_prediction", timestep_spacing="trailing"), **COGVIDEO)
bare("cogvideox-i2v", "CogVideoXImageToVideo", "extra-in", STEPS, "CogVideoXTransformer3DModel",
     lambda: text() | FRAMES | {"image": image(size=32)},
     lambda: sched("CogVideoXDPM", prediction_type="v_prediction", timestep_spacing="trailing"),
     lambda: {"vae": make("AutoencoderKLCogVideoX", block_out_channels=(8,) * 4, latent_channels=4,
                          layers_per_block=1, norm_num_groups=2)},
     **COGVIDEO | {"in_channels": 8})
bare("hunyuan-video", "HunyuanVideo", "single", STEPS, "HunyuanVideoTransformer3DModel",
     lambda: text(False, POOLED, "prompt_attention_mask") | FRAMES, lambda: flow(shift=7.0),
     in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
     num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 4, 4))
bare("mochi", "Mochi", "batched", STEPS, "MochiTransformer3DModel",
     lambda: text(mask="prompt_attention_mask") | LATENT4 | {"num_frames": 7},
     num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
     text_embed_dim=16, time_embed_dim=4, max_sequence_length=5)
dit("latte", "Latte", "learned-sigma", STEPS, "LatteTransformer3DModel",
    lambda: text() | SIZE | {"video_length": 2, "negative_prompt": None}, lambda: sched("DDIM"),
    **HEADS, sample_size=8, num_layers=1, patch_size=2, caption_channels=16, in_channels=4, cross_attention_dim=8,
    out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
    norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2)
bare("allegro", "Allegro", "batched", STEPS, "AllegroTransformer3DModel",
     lambda: text(mask="prompt_attention_mask") | FRAMES | {"negative_prompt": None},
     lambda: sched("EulerAncestralDiscrete"),
     num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=48,
     sample_height=4, sample_width=4, sample_frames=2, caption_channels=16)


def svd_parts():
    import transformers

    clip = transformers.CLIPVisionConfig(hidden_size=32, projection_dim=32, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=16, image_size=16, patch_size=8)
    blocks = dict(block_out_channels=(32, 64), layers_per_block=1)
    return {
        "unet": make("UNetSpatioTemporalConditionModel", **blocks, sample_size=8, num_frames=2,
                     down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                     up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                     num_attention_heads=(2, 4), cross_attention_dim=32, addition_time_embed_dim=8,
                     projection_class_embeddings_input_dim=24),
        "vae": make("AutoencoderKLTemporalDecoder", **blocks, down_block_types=("DownEncoderBlock2D",) * 2),
        "image_encoder": seeded(transformers.CLIPVisionModelWithProjection(clip)),
        "feature_extractor": transformers.CLIPImageProcessor(crop_size=16, size=16),
        "scheduler": sched("EulerDiscrete", prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002,
                           sigma_max=700.0, timestep_spacing="leading", timestep_type="continuous"),
    }


add("svd", "StableVideoDiffusionPipeline", "extra-in", STEPS, svd_parts,
    lambda: SIZE | {"image": image(), "num_frames": 2}, ("unet",))
add("animatediff", "AnimateDiffPipeline", "batched", STEPS,
    lambda: {"unet": unet(), "vae": vae(), "scheduler": sched("DDIM", clip_sample=False, beta_schedule="linear"),
             "motion_adapter": make("MotionAdapter", block_out_channels=(8, 16), motion_layers_per_block=1,
                                    motion_norm_num_groups=4, motion_num_attention_heads=2)},
    lambda: text() | SIZE | {"num_frames": 3}, ("unet",))

# --- more U-Nets -----------------------------------------------------------------------------------------------------


def vq(**config):
    return make("VQModel", **BLOCKS | config, **VAE, num_vq_embeddings=8)


add("ldm", "LDMPipeline", "unconditional", STEPS,
    lambda: {"unet": unet2d(), "vqvae": vq(), "scheduler": sched("DDIM")}, lambda: {"output_type": "np"}, ("unet",))
add("kandinsky-2.2", "KandinskyV22Pipeline", "learned-sigma", STEPS,
    lambda: {"movq": vq(latent_channels=4, norm_type="spatial", vq_embed_dim=4, block_out_channels=(32, 32)),
             "scheduler": sched("DDPM", variance_type="learned_range", thresholding=True),
             "unet": make("UNet2DConditionModel", **BLOCKS, sample_size=8, out_channels=8, cross_attention_dim=16,
                          attention_head_dim=4, encoder_hid_dim=16, encoder_hid_dim_type="image_proj",
                          addition_embed_type="image", resnet_time_scale_shift="scale_shift",
                          down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                          up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                          mid_block_type="UNetMidBlock2DSimpleCrossAttn")},
    lambda: SIZE | {"image_embeds": E(1, 16), "negative_image_embeds": E(1, 16, seed=3)}, ("unet",))


CASCADE = dict(conditioning_dim=16, block_out_channels=(16, 16), num_attention_heads=(2, 2), dropout=(0.0, 0.0),
               down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=16)
CASCADE_POOLED = ("prompt_embeds_pooled",)


def cascade_text():
    return {k: v[:, None] if "pooled" in k else v for k, v in text(pooled=CASCADE_POOLED).items()}


add("cascade-decoder", "StableCascadeDecoderPipeline", "batched", STEPS,
    lambda: {"decoder": make("StableCascadeUNet", in_channels=4, out_channels=4, patch_size=2, **CASCADE),
             "scheduler": sched("DDPMWuerstchen"), "latent_dim_scale": 4.0},
    lambda: cascade_text() | {"image_embeddings": E(1, 4, 2, 2), "guidance_scale": 2.0}, ("decoder",))
def clip_text():
    import transformers

    config = transformers.CLIPTextConfig(hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=16, vocab_size=16, bos_token_id=0, eos_token_id=1)
    return seeded(transformers.CLIPTextModelWithProjection(config))


add("cascade-prior", "StableCascadePriorPipeline", "batched", STEPS,
    lambda: {"prior": make("StableCascadeUNet", switch_level=(False,), clip_image_in_channels=16,
                           clip_text_in_channels=16, **CASCADE),
             "scheduler": sched("DDPMWuerstchen"), "text_encoder": clip_text()},
    lambda: cascade_text() | {"height": 128, "width": 128, "output_type": "pt"}, ("prior",))

bare("hidream", "HiDreamImage", "batched", STEPS, "HiDreamImageTransformer2DModel",
     lambda: {f"{n}{k}": v + s for n, s in (("", 0.0), ("negative_", 0.5)) for k, v in {
         "prompt_embeds_t5": E(1, 5, 16), "prompt_embeds_llama3": E(2, 1, 5, 16), "pooled_prompt_embeds": E(1, 16),
     }.items()} | LATENT4,
     after=lambda pipe: setattr(pipe, "default_sample_size", 2),
     patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
     num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
     axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=(0, 1))

# --- audio -----------------------------------------------------------------------------------------------------------


def ltx2_parts():
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    one = dict(block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,), upsample_factor=(1,),
               spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), upsample_residual=(False,))
    heads = {f"{kind}_connector_{k}": v for kind in ("video", "audio") for k, v in dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, num_learnable_registers=None).items()}
    return {
        "vae": make("AutoencoderKLLTX2Video", latent_channels=4, decoder_layers_per_block=(1, 1), patch_size=1,
                    decoder_inject_noise=(False, False), downsample_type=("spatial",), **one),
        "audio_vae": make("AutoencoderKLLTX2Audio", base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32,
                          latent_channels=2, mel_bins=8),
        "connectors": seeded(LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=1, connector_rope_base_seq_len=32, rope_double_precision=False,
            causal_temporal_positioning=False, rope_type="split", rope_theta=10000.0, **heads)),
        "vocoder": seeded(LTX2Vocoder(in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4],
                                      upsample_factors=[2], resnet_kernel_sizes=[3], resnet_dilations=[[1]])),
    }


bare("ltx-2", "LTX2", "audio", 3 * STEPS, "LTX2VideoTransformer3DModel",
     lambda: text(mask="prompt_attention_mask") | LATENT4 | {"num_frames": 3, "spatio_temporal_guidance_blocks": [1]},
     flow, ltx2_parts,
     in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
     audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
     audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False, rope_type="split")


def stable_audio_parts():
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    return {
        "vae": make("AutoencoderOobleck", encoder_hidden_size=4, downsampling_ratios=[1, 2], channel_multiples=[1, 2],
                    decoder_channels=4, decoder_input_channels=4, sampling_rate=4),
        "projection_model": seeded(StableAudioProjectionModel(16, 16, 0, 32)),
        "transformer": make("StableAudioDiTModel", sample_size=4, in_channels=4, out_channels=4, num_layers=1,
                            attention_head_dim=8, num_attention_heads=2, num_key_value_attention_heads=1,
                            cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=32,
                            cross_attention_input_dim=16),
        "scheduler": sched("CosineDPMSolverMultistep", sigma_data=1.0, prediction_type="v_prediction"),
    }


add("stable-audio", "StableAudioPipeline", "audio", STEPS, stable_audio_parts,
    lambda: {k.replace("prompt_attention", "attention"): v for k, v in text(mask="prompt_attention_mask").items()})

# --- schedulers with two calls a step, or one more than asked for -----------------------------------------------------

sd("sd-heun", "", "scheduler", 2 * STEPS - 1, text, scheduler=lambda: sched("HeunDiscrete", **SD_BETAS))
sd("sd-pndm", "", "scheduler", STEPS + 1, text, scheduler=lambda: sched("PNDM", skip_prk_steps=True, **SD_BETAS))

# --- guiders that loop over their batches -----------------------------------------------------------------------------


def two_texts(mask="prompt_embeds_mask"):
    first = text(mask=mask)
    second = {k.replace("embeds", "embeds_2") if k.endswith("embeds") else k + "_2": v for k, v in first.items()}
    return first | second


def cfg():
    from diffusers.guiders import ClassifierFreeGuidance

    return ClassifierFreeGuidance(guidance_scale=4.0)


def mix():
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    return AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)


bare("hunyuan-video-1.5", "HunyuanVideo15", "guider", 2 * STEPS, "HunyuanVideo15Transformer3DModel",
     lambda: two_texts() | FRAMES, lambda: flow(shift=7.0),
     lambda: {"guider": cfg(),
              "vae": make("AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(16, 16),
                          layers_per_block=1, spatial_compression_ratio=4, temporal_compression_ratio=2,
                          downsample_match_channel=False,
                          upsample_match_channel=False)},
     in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
     mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=16,
     task_type="t2v")
bare("hunyuan-image", "HunyuanImage", "guider", 2 * STEPS, "HunyuanImageTransformer2DModel",
     lambda: two_texts() | dict(height=128, width=128), lambda: flow(shift=7.0), lambda: {"guider": mix()},
     in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
     num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(4, 4))

# --- the rest --------------------------------------------------------------------------------------------------------

add("lcm", "LatentConsistencyModelPipeline", "single", STEPS,
    lambda: {"unet": unet(time_cond_proj_dim=8), "vae": vae(), "scheduler": sched("LCM", **SD_BETAS)},
    lambda: text(False), ("unet",))
sd("sd-upscale", "Upscale", "extra-in", STEPS, lambda: text() | {"image": image(size=8)},
   lambda: {"low_res_scheduler": sched("DDPM")}, in_channels=7, num_class_embeds=1000)
sd("sd-depth", "Depth2Img", "extra-in", 4, lambda: text() | {"image": image(), "depth_map": E(1, 8, 8)}, in_channels=5)
add("deepfloyd-if", "IFPipeline", "learned-sigma", STEPS,
    lambda: {"unet": unet(in_channels=3, out_channels=6), "scheduler": sched("DDPM", variance_type="learned_range")},
    lambda: text() | {"output_type": "pt", "height": 8, "width": 8}, ("unet",))
add("consistency", "ConsistencyModelPipeline", "unconditional", STEPS,
    lambda: {"unet": unet2d(), "scheduler": sched("CMStochasticIterative")}, lambda: {"output_type": "pt"}, ("unet",))
add("flux-controlnet", "FluxControlNetPipeline", "control", STEPS,
    lambda: {"transformer": make("FluxTransformer2DModel", **FLUX_GUIDED), "vae": vae(shift_factor=0.1),
             "controlnet": make(
                 "FluxControlNetModel", **{k: v for k, v in FLUX_GUIDED.items() if k != "out_channels"}),
             "scheduler": flow()},
    lambda: text(False, POOLED) | SIZE | {"control_image": image()})


def flux2_vae():
    return make("AutoencoderKLFlux2", **BLOCKS, **VAE, latent_channels=4, sample_size=16)


bare("flux-2", "Flux2", "single", STEPS, "Flux2Transformer2DModel",
     lambda: text(False) | LATENT4, lambda: flow(use_dynamic_shifting=True), lambda: {"vae": flux2_vae()},
     in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
     joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4))


def kandinsky5_text():
    out = {"prompt_embeds_qwen": E(1, 5, 16), "prompt_embeds_clip": E(1, 16),
           "prompt_cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}
    return out | {"negative_" + k: v + 0.5 if v.is_floating_point() else v for k, v in out.items()}


KANDINSKY5 = dict(in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, model_dim=16,
                  ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2))


def hunyuan_vae():
    return make("AutoencoderKLHunyuanVideo", block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1,
                norm_num_groups=4)


bare("kandinsky-5", "Kandinsky5T2V", "sequential", 2 * STEPS, "Kandinsky5Transformer3DModel",
     lambda: kandinsky5_text() | FRAMES, flow, lambda: {"vae": hunyuan_vae()}, **KANDINSKY5)
bare("kandinsky-5-i2v", "Kandinsky5I2V", "extra-in", 2 * STEPS, "Kandinsky5Transformer3DModel",
     lambda: kandinsky5_text() | LATENT4 | {"num_frames": 21, "image": image(size=32)}, flow,
     lambda: {"vae": hunyuan_vae()},
     **KANDINSKY5, visual_cond=True)
bare("skyreels-v2-df", "SkyReelsV2DiffusionForcing", "per-token", 2 * STEPS, "SkyReelsV2Transformer3DModel",
     lambda: text() | FRAMES | {"prompt": None, "base_num_frames": 5}, unipc, **WAN, inject_sample_info=True)
bare("skyreels-v2-long", "SkyReelsV2DiffusionForcing", "per-token", 4 * STEPS, "SkyReelsV2Transformer3DModel",
     lambda: text() | LATENT4 | dict(prompt=None, num_frames=13, base_num_frames=9, overlap_history=5), unipc,
     lambda: {"vae": make("AutoencoderKLWan", **WAN_VAE)}, **WAN, inject_sample_info=True)


class Harmless:
    """Stands where Cosmos wants its guardrail."""

    def to(self, *args):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


COSMOS = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
              text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32))
bare("cosmos", "CosmosTextToWorld", "sequential", 2 * STEPS, "CosmosTransformer3DModel", lambda: text() | FRAMES,
     lambda: sched("EDMEuler", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min"),
     lambda: {"safety_checker": Harmless()}, **COSMOS)
