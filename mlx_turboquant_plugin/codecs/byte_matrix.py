"""Products with matrices of bytes, the form in which codes meet queries and weights.

MLX's CPU matmul multiplies one number at a time; its ``quantized_matmul`` of 8-bit
words is several times faster, and it needs a quarter of the memory of floats. Its
scales are 1 here, and its biases take the offset of the bytes away.
"""

import functools

import mlx.core as mx

# The columns that share a scale in quantized_matmul.
GROUP = 32

Prepared = tuple[mx.array, ...]


def prepare(matrix: mx.array, offset: float) -> Prepared:
    """What :func:`multiply` takes of a matrix (..., K, N), uint8.

    Views can't be traced for all shapes at once, so this is not part of compiled functions.
    """
    columns = matrix.shape[-1]
    if mx.default_device().type != mx.cpu or columns % GROUP:
        return (matrix,)
    shape = (*matrix.shape[:-1], columns // GROUP)
    return (matrix.view(mx.uint32), *constants(shape, offset))


def multiply(a: mx.array, prepared: Prepared, offset: float) -> mx.array:
    """``a @ (matrix - offset)`` for ``a`` fp32 (..., M, K): fp32 (..., M, N)."""
    if len(prepared) == 1:
        return a @ (prepared[0].astype(mx.float32) - offset)
    words, scales, biases = prepared
    return mx.quantized_matmul(a, words, scales, biases, transpose=False, group_size=GROUP, bits=8)


@functools.lru_cache(maxsize=8)
def constants(shape: tuple[int, ...], offset: float) -> tuple[mx.array, mx.array]:
    """Scales and biases, fp32, for all matrices with as many groups as ``shape`` says."""
    pair = mx.ones(shape), mx.full(shape, -offset)
    mx.eval(pair)
    return pair
