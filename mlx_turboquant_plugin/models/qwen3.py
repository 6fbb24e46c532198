"""Qwen3: an RMS norm on the queries and keys of every head, no biases."""

from types import ModuleType

from .balance import norm_rms
from .family import Family, patch_family


def patch(module: ModuleType) -> None:
    """Hook of ``mlx_lm.models.qwen3``."""
    patch_family(module, Family(channel_rms=norm_rms))
