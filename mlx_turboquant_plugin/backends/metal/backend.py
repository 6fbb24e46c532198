"""The backend for GPUs of Apple."""

from ..fused import Fused
from . import launch


class Metal(Fused):
    """Kernels in Metal."""

    name = "metal"
    attend = staticmethod(launch.attend)
    encode = staticmethod(launch.encode)
    kernel = staticmethod(launch.kernel)
