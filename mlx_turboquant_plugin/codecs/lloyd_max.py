"""The Lloyd-Max codec: TurboQuant-MSE of arXiv 2504.19874, section 3.1.

A rotated vector's coordinates, divided by their root mean square, are close to
N(0, 1). Each is replaced by the nearest level of a scalar quantizer made for
N(0, 1) (Lloyd 1957, Max 1960), and one scale per vector is stored.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..compiling import compiled
from . import packing
from .byte_matrix import Prepared, multiply, prepare
from .exponential import exp2

# A level is a byte less this: symmetric around zero.
OFFSET = 127.5


@dataclass(frozen=True)
class Codebook:
    """The levels of a symmetric quantizer, as bytes.

    Whole numbers are exact in every format that a kernel may compute in, and a curve
    through them costs less than a table on every device.

    Attributes:
        levels: the positive levels, ascending, in halves: byte - 127.5.
        unit: what they are divided by to suit N(0, 1).
        curve: (a, d, shift, b) of the whole-number curve through them, see :func:`level_bytes`.
    """

    levels: tuple[float, ...]
    unit: float
    curve: tuple[int, int, int, int]


# Mean squared errors for N(0, 1): 0.11748, 0.03455 and 0.00951, at most 0.15% above
# those of the best quantizers. tests/lloyd_max.py finds them.
CODEBOOKS = {
    2: Codebook((35.5, 118.5), 78.4522, (0, 1009, 0, 9061)),
    3: Codebook((13.5, 41.5, 73.5, 117.5), 54.6415, (47, 280, 2, 3439)),
    4: Codebook((5.5, 16.5, 28.5, 40.5, 54.5, 70.5, 90.5, 119.5), 43.6528, (5, 30, 3, 1437)),
}

# A scale is a power of 2^(1/12): 8 bits from 1.2e-4 to 310, 3% off at most.
STEPS_PER_OCTAVE = 12
LOWEST_OCTAVE = -13
OCTAVES = 22

# How far, in steps, the scale is searched around the root mean square.
SEARCH = (0, -1, 1, -2, 2)

# With fewer numbers, counted once for each scale that is tried, all are tried at once: the CPU
# needs longer to begin an operation than for so few numbers.
AT_ONCE = 2**17

# How much more an error along the vector itself costs than one across it. The queries
# that attend to a key point its way, so such an error scales the scores that matter;
# and it makes all values of an average shorter or longer alike.
ALONG = 1


@dataclass(frozen=True)
class LloydMax:
    """Quantizes rotated vectors to ``bits`` (2, 3 or 4) bits per channel and an 8-bit scale.

    ``codes`` are the packed codes (:func:`packing.pack`), uint8 (..., T, bytes), and last
    the scales, uint8 (..., T, 1): token-major. Channel-major is with the last two axes
    swapped. :meth:`scores` and :meth:`mix` can be traced once for any number of vectors.
    """

    bits: int
    offset = OFFSET

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        """The codes of rotated vectors ``x``, fp32 (..., T, D)."""
        rounded = _rounded(self.bits)
        scale, size = best_scale(x, lambda x, size: rounded(x / size)[1] * size - x)
        return (*packing.pack(rounded(x / size)[0], self.bits), scale)

    def decode(self, codes: tuple[mx.array, ...]) -> mx.array:
        """The vectors, fp32 (..., T, D) and still rotated, that token-major ``codes`` stand for."""
        *packed, scale = codes
        levels = level_bytes(packing.unpack(packed, self.bits), self.bits)
        return (levels.astype(mx.float32) - OFFSET) * self._width(scale)

    def expand(self, codes: tuple[mx.array, ...], axis: int) -> tuple[Prepared, mx.array]:
        """The levels as a matrix for products, and the scales.

        Args:
            axis: that of the channels, -1 (token-major) or -2 (channel-major).
        """
        *packed, scale = codes
        levels = _levels(self.bits)(packing.unpack(packed, self.bits, axis))
        return prepare(levels, OFFSET), scale

    def scores(self, q: mx.array, levels: Prepared, scale: mx.array) -> mx.array:
        """Dot products of queries with vectors.

        Args:
            q: fp32 (..., R, D).
            levels, scale: expanded channel-major codes.

        Returns:
            fp32 (..., R, T).
        """
        return multiply(q, levels, OFFSET) * self._width(scale)

    def mix(self, p: mx.array, levels: Prepared, scale: mx.array) -> mx.array:
        """Weighted sums of vectors.

        Args:
            p: the weights, fp32 (..., R, T).
            levels, scale: expanded token-major codes.

        Returns:
            fp32 (..., R, D).
        """
        return multiply(p * self._width(mx.swapaxes(scale, -1, -2)), levels, OFFSET)

    def _width(self, scale: mx.array) -> mx.array:
        # What one step of a level, a byte, stands for.
        return size_of(scale) * (1 / CODEBOOKS[self.bits].unit)


def size_of(scale: mx.array) -> mx.array:
    """What 8-bit scales stand for, fp32."""
    below = scale.astype(mx.float32) * (1 / STEPS_PER_OCTAVE) - OCTAVES
    return exp2(below) * 2.0 ** (LOWEST_OCTAVE + OCTAVES)


def level_bytes(codes: mx.array, bits: int) -> mx.array:
    """Levels of ``codes`` as bytes: 128 + (u (b + (j (a j + d) >> shift)) >> 8).

    With u = 2 code - (2^bits - 1), odd, and j = (u^2 - 1) / 8. In 16 bits, where eight
    numbers at a time fit the registers of every processor.
    """
    a, d, shift, b = CODEBOOKS[bits].curve
    u = codes.astype(mx.int16) * 2 - (2**bits - 1)
    j = (u * u) >> 3
    return (((b + ((j * (a * j + d)) >> shift)) * u >> 8) + 128).astype(mx.uint8)


@functools.cache
def _levels(bits: int) -> Callable:
    """:func:`level_bytes` of any number of codes, in few passes over them."""
    return compiled(lambda codes: level_bytes(codes, bits))


def _nearest(z: mx.array, bits: int) -> mx.array:
    """Codes of the levels nearest to ``z``: thresholds lie half-way between levels."""
    book = CODEBOOKS[bits]
    size = mx.abs(z) * book.unit
    thresholds = [(low + high) / 2 for low, high in zip(book.levels, book.levels[1:])]
    # In 16 bits, as in level_bytes.
    above = [(size > threshold).astype(mx.int16) for threshold in thresholds]
    magnitude = sum(above[1:], start=above[0])
    half = len(book.levels)
    return mx.where(z < 0, half - 1 - magnitude, half + magnitude).astype(mx.uint8)


@functools.cache
def _rounded(bits: int) -> Callable:
    """From any numbers to the codes of the levels nearest to them, and to these levels."""

    def rounded(z):
        codes = _nearest(z, bits)
        return codes, (level_bytes(codes, bits).astype(mx.float32) - OFFSET) / CODEBOOKS[bits].unit

    return compiled(rounded)


def best_scale(x: mx.array, errors: Callable, shift: Any = 0) -> tuple[mx.array, mx.array]:
    """The scales near the root mean squares of ``x``, fp32 (..., T, D), that lose least.

    Args:
        errors: from x and sizes (..., T, 1) to those of the nearest levels, (..., T, D).
        shift: by how many steps the search begins above the root mean square.

    Returns:
        The scales, uint8 (..., T, 1), and the sizes that they stand for, fp32.
    """
    rms = mx.maximum(mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True)), 1e-20)
    norm = rms * math.sqrt(x.shape[-1])
    start = mx.round((mx.log2(rms) - LOWEST_OCTAVE) * STEPS_PER_OCTAVE + shift)
    sizes = _sizes(mx.default_device().type)

    def scale(steps):
        return mx.clip(start + steps, 0, 255).astype(mx.uint8)

    def cost(steps):
        error = errors(x, sizes[scale(steps)])
        along = mx.sum(error * x, axis=-1, keepdims=True) / norm
        return mx.sum(error * error, axis=-1, keepdims=True) + ALONG * along * along

    steps = mx.array(SEARCH, mx.float32)
    tried = steps.reshape(-1, *[1] * x.ndim)
    if len(SEARCH) * x.size <= AT_ONCE:
        costs = cost(tried)
    else:
        costs = mx.concatenate([cost(step) for step in mx.split(tried, len(SEARCH))])
    best = scale(steps[mx.argmin(costs, axis=0)])
    return best, sizes[best]


@functools.cache
def _sizes(device: mx.DeviceType) -> mx.array:
    """What all scales stand for, as computed on a kind of device."""
    sizes = size_of(mx.arange(256))
    mx.eval(sizes)
    return sizes
