"""The Metal kernels on NVIDIA GPUs, for what ``split.cu`` is not made for.

They multiply number by number, where ``split.cu`` uses the matrix units.
"""

import functools
import re
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from . import cuda_source, metal

if TYPE_CHECKING:
    from ..attention.fused import Problem

# Memory of a threadgroup, and not pointers to it.
_MEMORY = re.compile(r"^threadgroup (\w+ \w+\[)", re.MULTILINE)


def attend(problem: "Problem") -> mx.array:
    """Attention (B, H_q, N, D_v), in the dtype of the queries."""
    return metal.attend(problem, kernel)


@functools.cache
def kernel(name: str, inputs: str, outputs: str) -> Any:
    """As :func:`metal.kernel`, compiled as CUDA."""
    body = _MEMORY.sub(r"__shared__ \1", metal.source(name))
    return cuda_source.kernel(f"metal_{name}", inputs.split(), outputs.split(), body)
