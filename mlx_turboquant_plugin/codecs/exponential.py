"""Powers of two, and of e, as fast as a device allows.

On the CPU, MLX's own ``exp`` works on one number at a time and takes three to four times
as long as what follows, which compilers turn into operations on several numbers.
"""

import math
from typing import Any

import mlx.core as mx

# 2^f for f from -1/2 to 1/2, by Taylor: the next term is 5e-9.
TAYLOR = [math.log(2) ** k / math.factorial(k) for k in range(8)]
LOG2_E = 1 / math.log(2)

# The largest power of two that fits an int32; shifted by one more than that it is 0.
TOP = 30


def exp(x: mx.array) -> mx.array:
    """e^x for ``x`` <= 0, fp32: within 1e-6 of it, or 0 instead of less than 1e-18."""
    return mx.exp(x) if mx.default_device().type != mx.cpu else exp2(x * LOG2_E)


def exp2(x: mx.array) -> mx.array:
    """2^x for ``x`` <= 0, fp32; on the CPU 0 below -60.5."""
    if mx.default_device().type != mx.cpu:
        return mx.exp(x * math.log(2))
    x = mx.maximum(x, -2 * TOP - 1)
    # Conversion cuts towards 0: this rounds.
    halvings = (0.5 - x).astype(mx.int32)
    first = mx.minimum(halvings, TOP)
    return _taylor(x + halvings) * _half_to_the(first) * _half_to_the(halvings - first)


def _taylor(f: mx.array) -> mx.array:
    result: Any = TAYLOR[-1]
    for coefficient in reversed(TAYLOR[:-1]):
        result = result * f + coefficient
    return result


def _half_to_the(n: mx.array) -> mx.array:
    """2^-n for whole ``n`` from 0 to 30, and 0 for 31."""
    return mx.right_shift(2**TOP, n).astype(mx.float32) * 2.0**-TOP
