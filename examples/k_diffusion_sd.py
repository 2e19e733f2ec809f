"""Samples Stable Diffusion 1.x or 2.x (a diffusers checkpoint) with k-diffusion, its denoiser cached by stepcache.

python examples/k_diffusion_sd.py --model path/or/hub-id --prompt "a lighthouse at dusk" --method forecast --compare
python examples/k_diffusion_sd.py --tiny --device cpu --compare  # random weights, offline, seconds
"""

from __future__ import annotations

import argparse
import inspect
import time
from dataclasses import dataclass
from pathlib import Path

try:
    import k_diffusion as K
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import WordLevelTrainer
    from torch import Tensor, nn
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

    import stepcache
    from stepcache.samplers.k_diffusion import CachedDenoiser, sample
except ImportError as error:
    raise SystemExit(f"{error}. Install what this needs: pip install 'stepcache[k-diffusion,diffusers]'") from error

DENOISERS = {"epsilon": K.external.DiscreteEpsDDPMDenoiser, "v_prediction": K.external.DiscreteVDDPMDenoiser}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a diffusers checkpoint, each named as its subfolder."""

    tokenizer: PreTrainedTokenizerFast | CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler  # only its noise schedule and prediction type; k-diffusion does the sampling


def load(model: str, dtype: torch.dtype) -> Checkpoint:
    """Reads a diffusers checkpoint from a local folder or from the hub."""
    if Path(model).is_file():
        raise SystemExit(
            f"{model} is one file, and --model takes a diffusers folder or a hub id. Convert it first: "
            f"diffusers.StableDiffusionPipeline.from_single_file({model!r}).save_pretrained('folder')"
        )
    try:
        checkpoint = Checkpoint(
            tokenizer=CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
            text_encoder=CLIPTextModel.from_pretrained(model, subfolder="text_encoder", torch_dtype=dtype),
            unet=UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype),
            vae=AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype),
            scheduler=DDPMScheduler.from_pretrained(model, subfolder="scheduler"),
        )
    except OSError as error:
        raise SystemExit(f"--model {model} is no diffusers checkpoint that can be read here: {error}") from error
    unet, prediction = checkpoint.unet.config, checkpoint.scheduler.config.prediction_type
    if unet.in_channels != checkpoint.vae.config.latent_channels or unet.addition_embed_type is not None:
        raise SystemExit(f"{model} is not a text-to-image Stable Diffusion 1.x or 2.x: choose one that is.")
    if prediction not in DENOISERS:
        raise SystemExit(
            f"{model} predicts {prediction!r}: choose a checkpoint that predicts {' or '.join(DENOISERS)}."
        )
    return checkpoint


def tiny(texts: list[str], dtype: torch.dtype) -> Checkpoint:
    """Stable Diffusion's architecture in miniature: seeded random weights, and a vocabulary of the words in `texts`."""
    words = Tokenizer(WordLevel(unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    words.train_from_iterator(texts, WordLevelTrainer(special_tokens=["<start>", "<end>"]))
    words.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<end>", pad_token="<end>", eos_token="<end>", model_max_length=77
    )
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    # .type, because diffusers warns about an empty list of modules on .to(dtype)
    return Checkpoint(
        tokenizer, CLIPTextModel(text).to(dtype).eval(), unet.type(dtype).eval(), vae.type(dtype).eval(), scheduler
    )


class Network(nn.Module):
    """The U-Net as k-diffusion calls it: float32 outside, the U-Net's own dtype inside.

    `x` (B, 4, h, w) of unit scale, `t` (B,) in [0, 999] and fractional, `cond` (B, 77, D); returns (B, 4, h, w).
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        # t stays float32: bfloat16 has no room for a timestep of three digits and a fraction
        return self.unet(x.to(self.unet.dtype), t, encoder_hidden_states=cond).sample.to(x.dtype)


class Guided(nn.Module):
    """Classifier-free guidance in one call of twice the batch, uncond first.

    `denoised = uncond + guidance_scale * (cond - uncond)`; `x` (B, 4, h, w), `sigma` (B,), `cond` and `uncond`
    (B, 77, D) the prompt's and the negative prompt's embeddings.
    """

    def __init__(self, denoiser: nn.Module, guidance_scale: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([uncond, cond]))
        uncond_denoised, cond_denoised = both.chunk(2)
        return uncond_denoised + self.guidance_scale * (cond_denoised - uncond_denoised)


def encode(checkpoint: Checkpoint, text: str) -> Tensor:
    """The text encoder's last hidden state (1, 77, D)."""
    tokenizer = checkpoint.tokenizer
    tokens = tokenizer(
        text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return checkpoint.text_encoder(tokens.input_ids.to(checkpoint.text_encoder.device)).last_hidden_state


def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """The first image of `latents` (B, 4, h, w) as uint8 (8h, 8w, 3)."""
    image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample[0]
    return (image.float() / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0).byte().cpu().numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """`10 log10(255^2 / mean((a - b)^2))` in dB; infinite when the images are equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def arguments() -> argparse.Namespace:
    # dpm_fast and dpm_adaptive choose their own noise levels and take no list of sigmas
    samplers = [
        name.removeprefix("sample_")
        for name, function in inspect.getmembers(K.sampling, inspect.isfunction)
        if name.startswith("sample_") and "sigmas" in inspect.signature(function).parameters
    ]
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="diffusers checkpoint of Stable Diffusion 1.x or 2.x: a folder or a hub id")
    source.add_argument("--tiny", action="store_true", help="a miniature with random weights, built offline")
    parser.add_argument("--prompt", default="a photograph of a lighthouse at dusk")
    parser.add_argument("--negative", default="", help="negative prompt")
    parser.add_argument("--sampler", default="euler", choices=samplers, help="k-diffusion's (default %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="(default %(default)s)")
    parser.add_argument("--guidance", type=float, default=7.5, help="guidance scale (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, help="pixels (default: the checkpoint's own size)")
    parser.add_argument("--height", type=int, help="pixels (default: the checkpoint's own size)")
    parser.add_argument("--method", default="forecast", choices=[*stepcache.METHODS], help="(default %(default)s)")
    parser.add_argument("--options", default="", help='the method\'s options, as in "interval=3"')
    parser.add_argument("--mask", help='steps that must compute: "1,1,0,..." or slow, medium, fast, ultra')
    parser.add_argument("--policy", choices=["dynamic", "static"], default="dynamic", help="what --mask's zeros mean")
    parser.add_argument("--device", default=device, help="(default here: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks (default: float16 on cuda, else float32)")
    parser.add_argument("--out", type=Path, default=Path("image.png"), help="(default %(default)s)")
    parser.add_argument("--compare", action="store_true", help="also sample without the cache, and compare")
    options = parser.parse_args()
    if options.method == "none" and (options.options or options.mask or options.compare):
        parser.error("--options, --mask and --compare need a cache: choose another --method than none")
    if options.dtype is None:
        options.dtype = "float16" if torch.device(options.device).type == "cuda" else "float32"
    return options


@torch.no_grad()
def main() -> None:
    options = arguments()
    method = None
    if options.method != "none":
        try:
            mask = stepcache.StepMask(options.mask, policy=options.policy) if options.mask else None
            if mask is not None:
                mask.for_steps(options.steps)  # a mask of the wrong length is told before the checkpoint is loaded
            method = stepcache.method(options.method, options.options, mask=mask)
        except ValueError as error:
            raise SystemExit(f"--method, --options or --mask: {error}") from error

    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    checkpoint = tiny([options.prompt, options.negative], dtype) if options.tiny else load(options.model, dtype)
    unet, vae = checkpoint.unet.to(device), checkpoint.vae.to(device)
    checkpoint.text_encoder.to(device)

    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    width = options.width or unet.config.sample_size * factor
    height = options.height or unet.config.sample_size * factor
    if width % factor or height % factor:
        raise SystemExit(f"{width}x{height}: --width and --height must be multiples of {factor}.")

    alphas_cumprod = checkpoint.scheduler.alphas_cumprod
    denoiser_type = DENOISERS[checkpoint.scheduler.config.prediction_type]
    denoiser = denoiser_type(Network(unet), alphas_cumprod, quantize=False).to(device)
    sigmas = K.sampling.get_sigmas_karras(
        options.steps, denoiser.sigma_min.item(), denoiser.sigma_max.item(), device=device
    )
    # drawn on the CPU, so that a seed means the same image on every device
    noise = torch.randn(
        (1, unet.config.in_channels, height // factor, width // factor),
        generator=torch.Generator().manual_seed(options.seed),
    )
    x = noise.to(device) * sigmas[0]
    extra_args = {"cond": encode(checkpoint, options.prompt), "uncond": encode(checkpoint, options.negative)}
    sampler = getattr(K.sampling, f"sample_{options.sampler}")

    def run(cached: CachedDenoiser, path: Path) -> tuple[np.ndarray, float]:
        """Samples, saves the image, and returns it with the sampling's wall time in seconds."""
        torch.manual_seed(options.seed)  # the noise that ancestral and SDE samplers draw
        start = time.perf_counter()
        latents = sample(sampler, Guided(cached, options.guidance), x, sigmas, extra_args=extra_args, cache=cached)
        latents = latents.cpu()  # waits for the device, so the clock has the whole run
        seconds = time.perf_counter() - start
        image = decode(vae, latents.to(device))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        print(f"{path}: {options.steps} steps of {options.sampler}, {seconds:.2f} s")
        return image, seconds

    cached = CachedDenoiser(denoiser, method, branches=("uncond", "cond"))
    if options.compare:
        # first calls are slow, and belong to neither run's time
        sampler(Guided(denoiser, options.guidance), x, sigmas[-3:], extra_args=extra_args, disable=True)
        full = CachedDenoiser(denoiser, None, branches=("uncond", "cond"))
        reference, without = run(full, options.out.with_stem(f"{options.out.stem}-uncached"))
    image, seconds = run(cached, options.out)
    if options.compare:
        print(f"{without / seconds:.2f}x as fast as without the cache, PSNR {psnr(image, reference):.2f} dB")
    if method is not None:
        print(cached.report)


if __name__ == "__main__":
    main()
