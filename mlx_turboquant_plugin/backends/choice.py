"""Which backend a setting means on this machine. Must not import mlx_lm."""

from ..rules import SettingsError
from ..settings import Settings
from . import available_kernels


def resolve_kernel(name: str, where: str = "kernel") -> str:
    """The kernel that the setting ``kernel`` means on this machine.

    Args:
        where: who asks for it, in the words of the error.

    Raises:
        SettingsError: the kernel can't run here.
    """
    available = available_kernels()
    if name == "auto":
        return available[0]
    if name not in available:
        raise SettingsError(
            f"{where} is {name!r}, which this machine can't run; available "
            f"here: auto, {', '.join(available)}: choose one of these"
        )
    return name


def kernel_of(chosen: Settings) -> str:
    """The same for settings; an error says where they come from."""
    return resolve_kernel(chosen.kernel, f"kernel ({chosen.source('kernel')})")
