"""Products with matrices of bytes, the form in which codes meet queries and weights.

MLX's CPU matmul multiplies one number at a time; its ``quantized_matmul`` of 8-bit
words is several times faster, and it needs a quarter of the memory of floats. Its
scales are 1 here, and its biases take the offset of the bytes away.
"""

import functools
from typing import Sequence, Tuple

import mlx.core as mx

# The columns that share a scale in quantized_matmul.
GROUP = 32

Prepared = Tuple[mx.array, ...]


def prepare(fields: Sequence[mx.array], axis: int, offset: float) -> Prepared:
    """Join ``fields``, uint8, along ``axis`` to the matrix (..., K, N) that :func:`multiply` takes.

    Views can't be traced for all shapes at once, so this is not part of compiled functions.
    """
    columns = fields[0].shape[-1] * (len(fields) if axis == -1 else 1)
    if mx.default_device().type != mx.cpu or columns % GROUP:
        return (mx.concatenate(fields, axis=axis),)
    # Four bytes at a time: MLX copies words as fast as it copies bytes.
    matrix = mx.concatenate([field.view(mx.uint32) for field in fields], axis=axis)
    shape = (*matrix.shape[:-1], columns // GROUP)
    return (matrix, *constants(shape, offset))


def multiply(a: mx.array, prepared: Prepared, offset: float) -> mx.array:
    """``a @ (matrix - offset)`` for ``a`` fp32 (..., M, K): fp32 (..., M, N)."""
    if len(prepared) == 1:
        return a @ (prepared[0].astype(mx.float32) - offset)
    return mx.quantized_matmul(a, *prepared, transpose=False, group_size=GROUP, bits=8)


@functools.lru_cache(maxsize=8)
def constants(shape: Tuple[int, ...], offset: float) -> Tuple[mx.array, mx.array]:
    """Scales and biases, fp32, for all matrices with as many groups as ``shape`` says."""
    pair = mx.ones(shape), mx.full(shape, -offset)
    mx.eval(pair)
    return pair
