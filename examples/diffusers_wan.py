"""Samples a video from Wan 2.1 with diffusers, its transformer cached by stepcache inside a `with`.

python examples/diffusers_wan.py --prompt "waves roll against a lighthouse" --method forecast --compare
python examples/diffusers_wan.py --tiny --device cpu --compare  # random weights, offline, seconds
"""

from __future__ import annotations

try:
    import numpy as np
    import tiny_diffusers as shared
    import torch
    from diffusers import AutoencoderKLWan, WanPipeline

    import stepcache
except ImportError as error:
    needed = "pip install --upgrade 'stepcache[diffusers]' 'diffusers>=0.33'"
    raise SystemExit(f"{error}. Install what this needs: {needed}") from error


def main() -> None:
    options = shared.arguments(
        __doc__,
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        steps=50,
        guidance=5.0,
        size=(832, 480),
        dtype="bfloat16",
        out="wan.gif",  # any other ending saves the middle frame
        tiny_size=(32, 32),
        frames=81,
    )
    if options.tiny:
        pipe = shared.wan(options.dtype)
        prompt = shared.inputs(options.prompt, options, negative=True)
    else:
        # Wan's VAE is meant to run in float32
        vae = shared.load(AutoencoderKLWan, options, subfolder="vae", torch_dtype=torch.float32)
        pipe = shared.load(WanPipeline, options, vae=vae)
        prompt = {"prompt": options.prompt}
    shared.place(pipe, pipe.transformer, options)

    def generate(steps: int = options.steps) -> np.ndarray:
        return pipe(
            **prompt,
            num_inference_steps=steps,
            guidance_scale=options.guidance,
            width=options.width,
            height=options.height,
            num_frames=options.frames,
            # drawn on the CPU, so that a seed means the same video on every device
            generator=torch.Generator().manual_seed(options.seed),
            output_type="np",
        ).frames[0]

    def cached() -> np.ndarray:
        with stepcache.attach(pipe, options.cache) as cache:
            frames = generate()
        print(cache.report)
        return frames

    shared.run(options, pipe.transformer, generate, cached)


if __name__ == "__main__":
    main()
