"""ComfyUI's samplers by the name of their function: how many evaluations a step has, and at which sigmas."""

from __future__ import annotations

from typing import Any

from ..k_diffusion import EVALUATIONS as K_DIFFUSION
from ..k_diffusion import NEGATIVE_ONLY_SAMPLERS

EVALUATIONS = {
    **K_DIFFUSION,
    **dict.fromkeys(
        (
            "sample_euler_cfg_pp",
            "sample_euler_ancestral_cfg_pp",
            "sample_dpmpp_2m_cfg_pp",
            "sample_dpmpp_2m_sde_gpu",
            "sample_dpmpp_2m_sde_heun",
            "sample_dpmpp_2m_sde_heun_gpu",
            "sample_dpmpp_3m_sde_gpu",
            "sample_ddpm",
            "sample_lcm",
            "sample_ipndm",
            "sample_ipndm_v",
            "sample_deis",
            "sample_res_multistep",
            "sample_res_multistep_cfg_pp",
            "sample_res_multistep_ancestral",
            "sample_res_multistep_ancestral_cfg_pp",
            "sample_gradient_estimation",
            "sample_gradient_estimation_cfg_pp",
            "sample_er_sde",
            "sample_sa_solver",
            "sample_unipc",
            "sample_unipc_bh2",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "sample_dpmpp_2s_ancestral_cfg_pp",
            "sample_dpmpp_sde_gpu",
            "sample_seeds_2",
            "sample_sa_solver_pece",
        ),
        2,
    ),
}
"""Evaluations of a step, by the name of the sampler function, as counted in ComfyUI 0.3.64. The last step has one."""

NEGATIVE_ONLY = NEGATIVE_ONLY_SAMPLERS | {
    "sample_dpmpp_2m_sde_gpu",
    "sample_dpmpp_2m_sde_heun",
    "sample_dpmpp_2m_sde_heun_gpu",
    "sample_dpmpp_3m_sde_gpu",
}
"""Samplers with which the negative prompt only is skipped if nothing else is asked for."""

AT_STEP_ENDS = ("sample_heun", "sample_sa_solver_pece")
"""Samplers with two evaluations a step, both at sigmas of the schedule."""

OFF_SCHEDULE = ("dpm_fast_function",)
"""Samplers whose evaluations are not at the schedule's sigmas."""

ADAPTIVE = ("dpm_adaptive_function",)
"""Samplers that choose their step sizes by comparing evaluations: all of them are computed."""


def function_name(sampler: Any) -> str:
    """The name of the function behind one of ComfyUI's SAMPLER objects; "" if it has none."""
    function = getattr(sampler, "sampler_function", None)
    function = getattr(function, "func", function)  # a functools.partial
    return getattr(function, "__name__", "")
