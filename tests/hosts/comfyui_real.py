"""A real ComfyUI checkout, headless on the CPU, with a tiny random U-Net of Stable Diffusion 1's form.

What is the host's own: guiders, samplers, schedules, branches, ControlNet base, model patcher, U-Net. What is ours:
the size and the weights of the U-Net, and prompts as random vectors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Real:
    """The methods of `comfyui_double.Double`, on the checkout."""

    samplers = (
        "euler",
        "euler_ancestral",
        "dpmpp_2m",
        "dpmpp_2m_sde",
        "heun",
        "dpm_2",
        "dpmpp_sde",
        "ddim",
        "uni_pc",
        "lms",
    )
    kinds = ("eps", "v", "flow", "edm", "cosmos", "flux")

    def __init__(self, checkout: Path) -> None:
        sys.path.insert(0, str(checkout))
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.samplers

        self.rows: list[int] = []
        self.calc_cond_batch = comfy.samplers.calc_cond_batch

    def model(self, kind: str = "eps") -> Any:
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models

        types = comfy.model_base.ModelType
        kinds = {"v": types.V_PREDICTION, "cosmos": types.FLOW_COSMOS}
        size = {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": (1, 2),
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 16,
            "num_heads": 2,
            "num_head_channels": -1,
            "use_spatial_transformer": True,
            "legacy": False,
            "dtype": torch.float32,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
        }
        config = comfy.supported_models.SD15(size)
        config.unet_config = size
        torch.manual_seed(0)
        model = comfy.model_base.BaseModel(config, kinds.get(kind) or getattr(types, kind.upper()), device="cpu")
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                torch.nn.init.normal_(parameter, 0, 0.05)
            if "Norm" in type(module).__name__:
                torch.nn.init.ones_(module.weight)
        model.diffusion_model.register_forward_pre_hook(lambda m, args: self.rows.append(len(args[0])))
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)

    def cond(self, seed: int, **more: Any) -> list:
        return [[torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed)), more]]

    def part(self, value: Any) -> Any:
        import comfy.conds

        return (comfy.conds.CONDList if isinstance(value, list) else comfy.conds.CONDRegular)(value)

    def guider(self, patcher: Any, positive: list, negative: list, cfg: float = 5.0) -> Any:
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return guider

    def sampler(self, name: str) -> Any:
        import comfy.samplers

        return comfy.samplers.sampler_object(name)

    def own_sampler(self, function: Callable[..., Tensor]) -> Any:
        import comfy.samplers

        return comfy.samplers.KSAMPLER(function)

    def control(self, span: tuple[float, float] = (0.0, 1.0)) -> Any:
        import comfy.controlnet

        class Control(comfy.controlnet.ControlBase):
            asked = 0

            def get_control(self, *args: Any) -> None:
                self.asked += 1

        control = Control()
        control.timestep_percent_range = span
        return control

    def controlled(self, control: Any) -> tuple[list, list]:
        more = {"control": control, "control_apply_to_uncond": True}
        return self.cond(1, **more), self.cond(2)

    def windows(self, patcher: Any, length: int) -> Any:
        import comfy.context_windows as windows

        clone = patcher.clone()
        clone.model_options["context_handler"] = windows.IndexListContextHandler(
            context_schedule=windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
            fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.FLAT),
            context_length=length,
            context_overlap=0,
            dim=3,
        )
        return clone

    @staticmethod
    def latent_out(x: Tensor) -> Tensor:
        """What the host does with a sampler's result: out of SD 1's latent scale."""
        return x / 0.18215
