"""Llama: no norm on queries and keys; a bias only if its config says so."""

from types import ModuleType

from .balance import projection_rms
from .family import Family, patch_family


def patch(module: ModuleType) -> None:
    """Hook of ``mlx_lm.models.llama``."""
    patch_family(module, Family(channel_rms=projection_rms))
