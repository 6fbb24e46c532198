"""Which attention kernels this machine can run. Must not import mlx_lm."""

from typing import List

from ..kernels import fused_kernels
from ..rules import SettingsError


def available_kernels() -> List[str]:
    """The kernels that this machine can run, the best first."""
    return [*fused_kernels(), "compiled", "eager"]


def resolve_kernel(name: str) -> str:
    """The kernel that ``TURBOQUANT_KERNEL=name`` means on this machine.

    Raises:
        SettingsError: the kernel can't run here.
    """
    available = available_kernels()
    if name == "auto":
        return available[0]
    if name not in available:
        raise SettingsError(
            f"TURBOQUANT_KERNEL is {name!r}, which this machine can't run; available "
            f"here: auto, {', '.join(available)}: choose one of these"
        )
    return name
