"""Random orthogonal rotations that spread a vector's energy over its channels.

TurboQuant (arXiv 2504.19874, section 3.1) rotates every vector before it is
quantized: after the rotation each coordinate of a unit vector is close to
N(0, 1/D), whatever the vector was, so one codebook serves all.
"""

import functools
import math
import random
from dataclasses import dataclass

import mlx.core as mx

SEED = 2504


@dataclass(frozen=True)
class Rotation:
    """The rotation of vectors of ``head_dim`` channels.

    Random signs, then the orthonormal Walsh-Hadamard transform where
    ``head_dim`` is a power of two. Otherwise, with D = m * 2^k and m odd, a matrix:
    random signs, then the Kronecker product of the Walsh-Hadamard transform of
    order 2^k with the orthonormal DCT-II of order m. Both are functions of
    (head_dim, seed) alone and the same on every machine.
    """

    head_dim: int
    seed: int = SEED

    @property
    def array(self) -> mx.array:
        """What :meth:`forward` and :meth:`inverse` take: signs (D,) or a matrix (D, D), fp32."""
        return _rotation_array(self.head_dim, self.seed)

    def fingerprint(self) -> bytes:
        """The rotation's coefficients to three digits: the same wherever it is the same."""
        return bytes(mx.round(self.array * 1000).astype(mx.int32))

    @staticmethod
    def forward(x: mx.array, array: mx.array) -> mx.array:
        """Rotate ``x`` (..., D). Dot products and norms do not change."""
        if array.ndim == 1:
            return mx.hadamard_transform(x * array)
        return x @ array

    @staticmethod
    def inverse(x: mx.array, array: mx.array) -> mx.array:
        """Undo :meth:`forward` on ``x`` (..., D)."""
        if array.ndim == 1:
            return mx.hadamard_transform(x) * array
        return x @ array.T


@functools.cache
def _rotation_array(head_dim: int, seed: int) -> mx.array:
    bits = random.Random(seed * 65536 + head_dim).getrandbits(head_dim)
    signs = mx.array([1.0 if bits >> i & 1 else -1.0 for i in range(head_dim)])
    order = head_dim & -head_dim
    if order == head_dim:
        array = signs
    else:
        walsh = mx.hadamard_transform(mx.eye(order))
        matrix = mx.kron(walsh, _dct(head_dim // order))
        array = signs[:, None] * matrix
    # A lazy array is tied to the thread that made it; this one is shared by all.
    mx.eval(array)
    return array


def _dct(n: int) -> mx.array:
    """The orthonormal DCT-II matrix of order ``n``: an orthogonal matrix with a closed form."""
    rows = []
    for i in range(n):
        norm = math.sqrt((1 if i == 0 else 2) / n)
        rows.append([norm * math.cos(math.pi * (j + 0.5) * i / n) for j in range(n)])
    return mx.array(rows)
