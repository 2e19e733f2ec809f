"""Methods as other projects write them: command lines of stable-diffusion.cpp, configurations of cache-dit."""

from .cache_dit import load_config
from .stable_diffusion_cpp import parse

__all__ = ["load_config", "parse"]
