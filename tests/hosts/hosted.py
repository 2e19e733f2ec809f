"""Runs a real checkout of A1111 or Forge headless on the CPU, with a tiny random network, through `process_images`.

A process of its own, because every host calls its package `modules`: see `situations.py`. What is the
host's own: its processing, scripts, prompt parser, samplers, CFG denoiser and, in the Forge family, the U-Net, the
patcher and the sampling function. What is ours: the weights, a text encoder and a decoder in a few lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[2]
WIDTH = 24
"""Of the text encoder's vectors."""


def encoded(prompts: list[str], width: int = WIDTH) -> Tensor:
    """A text encoder: 77 vectors a prompt (154 from 40 words on), drawn by the prompt's own seed."""
    longest = max(77 * (1 + len(prompt.split()) // 40) for prompt in prompts)
    seeds = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
    return torch.stack([torch.randn(longest, width, generator=seed) for seed in seeds])


class TinyNetwork(nn.Module):
    """A random network of latent, time and prompt, for hosts without one of their own. Counts its rows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("first", (16, 4, 3, 3)), ("last", (4, 16, 3, 3)), ("prompt", (WIDTH, 16))):
            self.register_buffer(name, torch.randn(shape, generator=generator) * 0.2)
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.calls.append(len(x))
        hidden = nn.functional.conv2d(x, self.first, padding=1)
        told = context.mean(1) @ self.prompt + torch.sin(t.float() / 300)[:, None]
        return nn.functional.conv2d(torch.tanh(hidden + told[:, :, None, None]), self.last, padding=1) + 0.5 * x


class Host:
    """What both families share: a job, and what is left of it."""

    family = "forge"
    refiner: Any = None

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.data = tempfile.mkdtemp()
        sys.modules["wandb"] = None  # the installed one may not fit the host's pydantic; no host needs it
        sys.argv = ["webui", "--skip-install", "--skip-torch-cuda-test", "--data-dir", self.data, *self.flags]
        os.chdir(checkout)
        sys.path.insert(0, str(checkout))
        self.start()
        from modules import processing, script_callbacks, script_loading, scripts, shared

        self.processing, self.scripts, self.shared, self.callbacks = processing, scripts, shared, script_callbacks
        self.loading = script_loading
        shared.state.job_count = 1
        for option, value in self.options.items():
            shared.opts.data[option] = value
        self.model = self.make_model()

    flags: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    """Samplers that the others have."""
    upscaler = "Latent"
    hires: ClassVar[dict[str, Any]] = {}
    options: ClassVar[dict[str, Any]] = {
        "live_previews_enable": False,
        "samples_save": False,
        "grid_save": False,
        "do_not_reload_embeddings": True,
        "sd_vae_encode_method": "Full",
        "sd_model_checkpoint": "tiny",
    }

    def start(self) -> None:
        raise NotImplementedError

    def make_model(self) -> Any:
        raise NotImplementedError

    @property
    def calls(self) -> list[int]:
        """Rows of every call of the network since it was last emptied."""
        raise NotImplementedError

    def network_failure(self, hook: Any) -> None:
        """`hook` is called before every call of the network, and may raise; None for none."""
        if self._failure is not None:
            self._failure.remove()
        self._failure = None if hook is None else self.network.register_forward_pre_hook(lambda *a: hook())

    _failure: Any = None

    def load(self, *paths: str | Path) -> None:
        """Scripts of the host's or ours, registered as its own loader does it."""
        for path in paths:
            path = Path(path) if Path(path).is_absolute() else self.checkout / path
            sys.path.insert(0, str(path.parent.parent))
            module = self.loading.load_module(str(path))
            for kind in vars(module).values():
                if isinstance(kind, type) and issubclass(kind, self.scripts.Script) and kind.__module__ == path.name:
                    self.scripts.scripts_data.append(
                        self.scripts.ScriptClassData(kind, str(path), str(path.parent.parent), module)
                    )
        self.runners: dict[bool, Any] = {}

    def runner(self, is_img2img: bool) -> Any:
        """A script runner with its panel built, which gives the scripts their places among the arguments."""
        if is_img2img not in self.runners:
            import gradio as gr

            runner = self.runners[is_img2img] = self.scripts.ScriptRunner()
            runner.initialize_scripts(is_img2img=is_img2img)
            with gr.Blocks():
                if hasattr(runner, "prepare_ui"):
                    runner.prepare_ui()
                runner.setup_ui()
        return self.runners[is_img2img]

    def arguments(self, runner: Any, given: dict[str, list[Any]]) -> list[Any]:
        """The panel's values, with `given` over a script's own, by its title, as the API does it."""
        arguments = [None] * max((script.args_to for script in runner.scripts), default=1)
        arguments[0] = 0
        for script in runner.scripts:
            values = [component.value for component in runner.inputs[script.args_from : script.args_to]]
            mine = given.get(script.title(), [])
            arguments[script.args_from : script.args_to] = mine + values[len(mine) :]
        return arguments

    def job(
        self, image: Any = None, given: dict[str, list[Any]] | None = None, watch: Any = None, **fields: Any
    ) -> Any:
        """One job; `given`: script arguments by title; `watch(p)` is called with it before it begins."""
        kind = "Txt2Img" if image is None else "Img2Img"
        is_img2img = image is not None
        fields = {
            "sd_model": self.model,
            "prompt": "a cat",
            "negative_prompt": "a dog",
            "seed": 7,
            "steps": 12,
            "cfg_scale": 5.0,
            "width": 128,
            "height": 128,
            "sampler_name": "Euler",
            "do_not_save_samples": True,
            "do_not_save_grid": True,
            "do_not_reload_embeddings": True,
            **({"init_images": [image]} if is_img2img else {}),
            **fields,
        }
        if fields.get("enable_hr"):
            known = getattr(self.processing, f"StableDiffusionProcessing{kind}").__dataclass_fields__
            fields.update({key: value for key, value in self.hires.items() if key in known})
        p = getattr(self.processing, f"StableDiffusionProcessing{kind}")(**fields)
        runner = self.runner(is_img2img)
        p.scripts, p.script_args = runner, self.arguments(runner, given or {})
        self.shared.state.interrupted = self.shared.state.skipped = False
        if watch is not None:
            watch(p)
        self.calls.clear()
        said = io.StringIO()
        result = types.SimpleNamespace(error=None, images=[], infotexts=[])
        try:
            with contextlib.redirect_stdout(said):
                done = self.processing.process_images_inner(p)
            result.images, result.infotexts = done.images, done.infotexts
            result.comments = done.comments
        except Exception as error:
            result.error = f"{type(error).__name__}: {error}"
        result.said = [line for line in said.getvalue().splitlines() if line.startswith("StepCache")]
        result.calls, result.p = list(self.calls), p
        result.latents = (
            [latent.clone() for latent in p.latents_after_sampling] if hasattr(p, "latents_after_sampling") else []
        )
        pixels = b"".join(image.tobytes() for image in result.images)
        result.digest = hashlib.sha256(pixels).hexdigest()[:12]
        p.close()
        return result


class A1111(Host):
    family = "a1111"
    flags = ("--no-half", "--use-cpu", "all")

    def start(self) -> None:
        import modules.paths
        import modules.shared_cmd_options
        from modules import shared_init

        with contextlib.suppress(AttributeError):
            modules.shared_cmd_options.cmd_opts.no_prompt_history = True
        shared_init.initialize()
        import modules.processing
        import modules.sd_samplers

        modules.sd_samplers.set_samplers()

    def make_model(self) -> Any:
        from modules import sd_models, sd_unet, sd_vae

        model = TinyLatentDiffusion()
        sd_models.model_data.sd_model = model
        sd_models.model_data.was_loaded_at_least_once = True
        self.shared.sd_model = model
        sd_unet.apply_unet = lambda option=None: None
        sd_models.apply_token_merging = lambda model, ratio: None
        sd_models.reload_model_weights = self.switched
        sd_vae.get_loaded_vae_name = sd_vae.get_loaded_vae_hash = lambda: None
        self.refiner = TinyLatentDiffusion("refiner")
        return model

    def switched(self, model: Any = None, info: Any = None, forced_reload: bool = False) -> Any:
        """What loading another checkpoint comes to."""
        from modules import sd_models

        if info is not None:
            chosen = self.refiner if info is self.refiner.sd_checkpoint_info else self.model
            self.shared.sd_model = sd_models.model_data.sd_model = chosen
        return self.shared.sd_model

    @property
    def network(self) -> nn.Module:
        return TinyLatentDiffusion.network

    @property
    def calls(self) -> list[int]:
        return self.network.calls


class TinyLatentDiffusion(nn.Module):
    """What A1111 asks of a Stable Diffusion 1 model."""

    network = TinyNetwork()

    def __init__(self, title: str = "tiny") -> None:
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
        self.register_buffer("empty", encoded([""]), persistent=False)
        self.title, self.parameterization, self.cond_stage_key = title, "eps", "txt"
        self.model = nn.Module()
        self.model.conditioning_key = "crossattn"
        self.sd_checkpoint_info = types.SimpleNamespace(
            name_for_extra=title, short_title=title, title=title, filename=title
        )
        self.sd_model_hash, self.is_sdxl, self.is_sdxl_inpaint, self.is_sd1 = title, False, False, True
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.cond_stage_model_empty_prompt = self.empty
        self.first_stage_model, self.lowvram = nn.Module(), False
        self.first_stage_model.dtype = torch.float32
        self.is_sd2 = self.is_sd3 = self.is_ssd = False

    def get_learned_conditioning(self, prompts: list[str]) -> Tensor:
        return encoded(list(prompts))

    def apply_model(self, x: Tensor, t: Tensor, cond: dict[str, list[Tensor]]) -> Tensor:
        out = self.network(x, t, torch.cat(cond["c_crossattn"], 1))
        return out + 0.1 if self.title == "refiner" else out

    def decode_first_stage(self, z: Tensor) -> Tensor:
        return nn.functional.interpolate(z[:, :3] / 4, scale_factor=8)

    def encode_first_stage(self, x: Tensor) -> Tensor:
        small = nn.functional.interpolate(x, scale_factor=1 / 8)
        return torch.cat([small, small[:, :1]], 1)

    def get_first_stage_encoding(self, z: Tensor) -> Tensor:
        return z

    def ema_scope(self) -> Any:
        return contextlib.nullcontext()


class Forge(Host):
    flags = ("--always-cpu",)
    hires: ClassVar[dict[str, Any]] = {"hr_additional_modules": ["Use same choices"], "hr_cfg": 5.0}

    def start(self) -> None:
        from modules_forge.initialization import initialize_forge

        initialize_forge()
        from modules import shared_init

        shared_init.initialize()
        import modules.processing
        import modules.sd_samplers

        modules.sd_samplers.set_samplers()

    def make_model(self) -> Any:
        from modules import sd_models, sd_unet, sd_vae

        model = tiny_forge_engine("tiny", isinstance(self, Neo))
        sd_models.model_data.sd_model = model
        sd_models.forge_model_reload = lambda: (self.shared.sd_model, False)
        sd_unet.apply_unet = lambda option=None: None
        sd_vae.get_loaded_vae_name = sd_vae.get_loaded_vae_hash = lambda: None
        self.processing.apply_circular_forge = lambda model, tiling: None
        self.processing.apply_token_merging = lambda model, ratio: None
        return model

    @property
    def memory(self) -> Any:
        from backend import memory_management

        return memory_management

    @property
    def network(self) -> nn.Module:
        return self.model.forge_objects_original.unet.model.diffusion_model

    @property
    def calls(self) -> list[int]:
        return self.model.calls


class Neo(Forge):
    """Forge Neo: Forge's layout, without its switches for old cards."""

    flags = ("--cpu", "--skip-version-check")
    lacks = ("DPM adaptive", "DPM++ 2S a")
    upscaler = "None"  # resizes the image; there is none for latents

    def start(self) -> None:
        super().start()
        from backend.args import dynamic_args
        from modules import modelloader

        importlib.import_module("backend.nn.cnets.cldm")  # its ControlNet can be imported from this end only
        dynamic_args.ops = ""
        modelloader.load_upscalers()


class Patched(Forge):
    """reForge and Forge Classic, whose U-Net, patcher and sampling function are in ldm_patched."""

    def make_model(self) -> Any:
        import modules_forge.forge_loader as loader
        from ldm_patched.modules import model_base, supported_models
        from modules import sd_models, sd_unet, sd_vae
        from modules_forge.unet_patcher import UnetPatcher

        torch.manual_seed(3)
        config = supported_models.SD15({**TINY_UNET, "image_size": 32, "dtype": torch.float32})
        if not hasattr(config, "manual_cast_dtype"):
            config.manual_cast_dtype = None
        base = randomised(model_base.BaseModel(config, model_base.ModelType.EPS, device=torch.device("cpu")))
        cpu = torch.device("cpu")
        model = TinyLatentDiffusion()
        model.calls = counted(base.diffusion_model)
        kept = getattr(loader, "ForgeObjects", None) or loader.ForgeSD
        model.forge_objects = kept(UnetPatcher(base, load_device=cpu, offload_device=cpu), None, None, None)
        model.forge_objects.vae = types.SimpleNamespace(latent_channels=4)
        model.forge_objects_original = model.forge_objects.shallow_copy()
        model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()
        model.current_lora_hash = str([])
        sd_models.model_data.sd_model = self.shared.sd_model = model
        sd_models.model_data.was_loaded_at_least_once = True
        sd_models.reload_model_weights = lambda *arguments, **keywords: model
        sd_models.select_checkpoint = lambda: model.sd_checkpoint_info
        sd_unet.apply_unet = lambda option=None: None
        sd_vae.get_loaded_vae_name = sd_vae.get_loaded_vae_hash = lambda: None
        self.processing.apply_circular_forge = lambda model, tiling: None
        self.processing.apply_token_merging = lambda model, ratio: None
        return model

    @property
    def memory(self) -> Any:
        from ldm_patched.modules import model_management

        return model_management


TINY_UNET: dict[str, Any] = {
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "num_heads": 2,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "context_dim": WIDTH,
}


def randomised(network: nn.Module) -> nn.Module:
    """Random weights where the host left them at 0 or unset."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5 / weight[0].numel() ** 0.5)
            else:
                weight.zero_()
        for module in network.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                module.weight.fill_(1)
    return network.eval().requires_grad_(False)


def counted(network: nn.Module) -> list[int]:
    calls: list[int] = []
    network.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    return calls


def tiny_forge_engine(title: str, neo: bool) -> Any:
    """A Stable Diffusion 1 engine of Forge, with its own U-Net at 32 channels and random weights."""
    from backend.diffusion_engine.base import ForgeDiffusionEngine, ForgeObjects
    from backend.modules.k_prediction import Prediction
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.patcher.unet import UnetPatcher

    class Engine(ForgeDiffusionEngine):
        def get_learned_conditioning(self, prompt: list[str]) -> Tensor:
            return encoded(list(prompt))

        def decode_first_stage(self, x: Tensor) -> Tensor:
            return nn.functional.interpolate(x[:, :3] / 4, scale_factor=8)

        def encode_first_stage(self, x: Tensor) -> Tensor:
            small = nn.functional.interpolate(x, scale_factor=1 / 8)
            return torch.cat([small, small[:, :1]], 1)

    torch.manual_seed(3)
    network = randomised(IntegratedUNet2DConditionModel(**{**TINY_UNET, "num_res_blocks": 1}))
    network.storage_dtype = network.computation_dtype = torch.float32
    network.load_device = network.offload_device = network.initial_device = torch.device("cpu")
    calls = counted(network)
    config = types.SimpleNamespace(inpaint_model=lambda: False, huggingface_repo="", ztsnr=False)
    prediction: dict[str, Any] = {"prediction_type": "epsilon"}
    vae = types.SimpleNamespace(latent_channels=4)
    if neo:
        prediction |= {"sigma_data": 1.0, "beta_schedule": "linear", "timesteps": 1000}
        prediction |= {"linear_start": 0.00085, "linear_end": 0.012}
        config.latent_format, config.memory_usage_factor = types.SimpleNamespace(latent_channels=4), 1.0
        config.model_type = types.SimpleNamespace(name="EPS")
    unet = UnetPatcher.from_model(
        model=network, diffusers_scheduler=None, config=config, k_predictor=Prediction(**prediction)
    )
    engine = Engine(config, {"vae": types.SimpleNamespace()})
    engine.forge_objects = ForgeObjects(unet=unet, clip=None, vae=vae, clipvision=None)
    engine.forge_objects_original = engine.forge_objects.shallow_copy()
    engine.forge_objects_after_applying_lora = engine.forge_objects.shallow_copy()
    engine.is_sd1, engine.cond_stage_model_empty_prompt = True, encoded([""])
    engine.sd_checkpoint_info = types.SimpleNamespace(
        name_for_extra=title, short_title=title, title=title, filename=title
    )
    engine.sd_model_hash, engine.is_sdxl_inpaint, engine.calls = title, False, calls
    return engine


HOSTS = {"a1111": A1111, "forge": Forge, "reforge": Patched, "classic": Patched, "neo": Neo}
