"""Samples FLUX.1 with diffusers, its transformer cached by stepcache: the cache as the pipeline's callback.

python examples/diffusers_flux.py --prompt "a lighthouse at dusk" --cpu-offload --method forecast --compare
python examples/diffusers_flux.py --tiny --device cpu --compare  # random weights, offline, seconds
"""

from __future__ import annotations

try:
    import numpy as np
    import tiny_diffusers as shared
    import torch
    from diffusers import FluxPipeline

    from stepcache.samplers.diffusers import StepCacheCallback
except ImportError as error:
    raise SystemExit(f"{error}. Install what this needs: pip install 'stepcache[diffusers]'") from error


def main() -> None:
    options = shared.arguments(
        __doc__,
        "black-forest-labs/FLUX.1-dev",
        steps=28,
        guidance=3.5,
        size=(1024, 1024),
        dtype="bfloat16",
        out="flux.png",
        tiny_size=(32, 32),
    )
    if options.tiny:
        pipe = shared.flux(options.dtype)
        prompt = shared.inputs(options.prompt, options, pooled=True)
    else:
        pipe = shared.load(FluxPipeline, options)
        prompt = {"prompt": options.prompt}
    shared.place(pipe, pipe.transformer, options)

    def generate(steps: int = options.steps, callback: StepCacheCallback | None = None) -> np.ndarray:
        return pipe(
            **prompt,
            num_inference_steps=steps,
            guidance_scale=options.guidance,
            width=options.width,
            height=options.height,
            # drawn on the CPU, so that a seed means the same image on every device
            generator=torch.Generator().manual_seed(options.seed),
            callback_on_step_end=callback,
            output_type="np",
        ).images

    cache = StepCacheCallback(options.cache) if options.cache else None
    shared.run(options, pipe.transformer, generate, lambda: generate(callback=cache))
    if cache is not None:
        print(cache.report)


if __name__ == "__main__":
    main()
