"""What runs the attention over codes: one backend for each value of the setting ``kernel``.

Adding one means a module or a folder with a class that does what :class:`~.protocol.Backend` asks,
its line and its place here, and its name in ``rules.KERNELS``.
"""

import functools
from collections.abc import Callable

from .bridge import Bridge
from .cuda.backend import Cuda
from .metal.backend import Metal
from .mlx_ops import MLXOps
from .protocol import Backend

BACKENDS: dict[str, Callable[[], Backend]] = {
    "metal": Metal,
    "cuda": Cuda,
    "compiled": functools.partial(MLXOps, "compiled", compiled=True),
    "eager": functools.partial(MLXOps, "eager"),
    "bridge": Bridge,
}
# For "auto", the best first. The bridge is asked for by another setting.
CHOICES = ("metal", "cuda", "compiled", "eager")

__all__ = ["CHOICES", "Backend", "available_kernels", "backend", "fused_kernels"]


@functools.cache
def backend(kernel: str) -> Backend:
    """The backend of this name; it is not asked whether it runs here."""
    return BACKENDS[kernel]()


def available_kernels() -> list[str]:
    """The names of the backends that can run on the default device, the best first."""
    return [name for name in CHOICES if backend(name).runs_here()]


def fused_kernels() -> list[str]:
    """Those that attend to a few queries themselves, see :attr:`Backend.max_queries`."""
    return [name for name in available_kernels() if backend(name).max_queries]
