"""The Metal kernels on NVIDIA GPUs, for what ``split.cu`` is not made for.

They multiply number by number, where ``split.cu`` uses the matrix units.
"""

import functools
import re
from typing import Any

import mlx.core as mx

from ..metal import launch as metal
from ..problem import Problem
from . import source

# Memory of a threadgroup, and not pointers to it.
_MEMORY = re.compile(r"^threadgroup (\w+ \w+\[)", re.MULTILINE)


def attend(problem: Problem) -> mx.array:
    """Attention (B, H_q, N, D_v), in the dtype of the queries."""
    return metal.attend(problem, kernel)


@functools.cache
def kernel(name: str, inputs: str, outputs: str) -> Any:
    """As :func:`metal.kernel`, compiled as CUDA."""
    body = _MEMORY.sub(r"__shared__ \1", metal.body(name, inputs, outputs))
    return source.kernel(f"metal_{name}", inputs.split(), outputs.split(), body)
