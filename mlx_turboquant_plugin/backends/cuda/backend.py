"""The backend for NVIDIA GPUs (compute capability 8.0 on)."""

import mlx.core as mx

from ..fused import Fused
from . import portable
from .attend import attend
from .encode import encode


class Cuda(Fused):
    """Kernels in CUDA; what they are not made for runs those in Metal, compiled as CUDA."""

    name = "cuda"
    fixed_shapes = True
    attend = staticmethod(attend)
    encode = staticmethod(encode)
    kernel = staticmethod(portable.kernel)

    def runs_here(self) -> bool:
        # The kernels need instructions of Ampere.
        major = int(mx.device_info().get("compute_capability_major", 8))
        return super().runs_here() and major >= 8
