"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from types import ModuleType

from .balance import projection_rms
from .family import Family, patch_family


def patch(module: ModuleType) -> None:
    """Hook of ``mlx_lm.models.qwen2``."""
    patch_family(module, Family(channel_rms=projection_rms))
