"""Keys in two segments: more bits for the channels that matter more.

How much a channel's error moves the scores differs by an order of magnitude between the
channels of a head. Keys are sorted by it (:attr:`KVCodec.order`) and cut in two halves, the
segments, which are rotated, quantised and scaled each by itself: 5 bits uniformly, and 3 bits by
Lloyd and Max. Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3)
would give every channel bits of its own; two segments come within a fifth of four, and two codes
fill a byte.
"""

import functools
from dataclasses import dataclass
from typing import Callable, Tuple

import mlx.core as mx

from ..compiling import compiled
from .byte_matrix import Prepared, multiply, prepare
from .lloyd_max import OFFSET, encoder, level_bytes, size_of, unit_of

# Of the first and of the second segment.
BITS = (5, 3)


@dataclass(frozen=True)
class Segmented:
    """Quantises vectors whose two segments are rotated.

    ``codes`` are bytes, uint8 (..., T, D / 2), the code of a channel of the first segment above
    that of the same channel of the second, and scales, uint8 (..., T, 2): token-major.
    Channel-major is with the last two axes swapped. Made for keys.
    """

    def encode(self, x: mx.array) -> Tuple[mx.array, mx.array]:
        """The codes of ``x``, fp32 (..., T, D)."""
        (high, high_scale), (low, low_scale) = (
            encoder(bits, part.shape[-1])(part) for bits, part in zip(BITS, mx.split(x, 2, axis=-1))
        )
        return (high << BITS[1]) | low, mx.concatenate([high_scale, low_scale], axis=-1)

    def decode(self, codes: Tuple[mx.array, mx.array]) -> mx.array:
        """The vectors, fp32 (..., T, D) and still rotated, that token-major ``codes`` stand for."""
        packed, scale = codes
        return mx.concatenate(
            [
                (x.astype(mx.float32) - OFFSET) * (size_of(own_scale) / unit_of(bits))
                for x, own_scale, bits in zip(
                    _level_bytes(packed), mx.split(scale, 2, axis=-1), BITS
                )
            ],
            axis=-1,
        )

    def expand(
        self, codes: Tuple[mx.array, mx.array], axis: int
    ) -> Tuple[Prepared, mx.array]:
        """The levels of both segments as matrices for products, (..., 2, D / 2, T), and scales.

        Args:
            axis: that of the channels: -2, as only channel-major codes are multiplied.
        """
        packed, scale = codes
        return prepare(_stacked()(packed), OFFSET), scale

    def scores(self, q: mx.array, levels: Prepared, scale: mx.array) -> mx.array:
        """Dot products of queries with vectors.

        Args:
            q: fp32 (..., 2, R, D / 2), the segments apart.
            levels, scale: expanded codes.

        Returns:
            fp32 (..., R, T).
        """
        widths = size_of(mx.expand_dims(scale, -2)) * mx.array(UNITS)
        return mx.sum(multiply(q, levels, OFFSET) * widths, axis=-3)


# What one step of a byte stands for, (2, 1, 1), at size 1.
UNITS = [[[1 / unit_of(bits)]] for bits in BITS]


def _level_bytes(packed: mx.array) -> Tuple[mx.array, mx.array]:
    """The levels of both segments, as bytes."""
    low = packed & (2 ** BITS[1] - 1)
    return level_bytes(packed >> BITS[1], BITS[0]), level_bytes(low, BITS[1])


@functools.lru_cache(maxsize=None)
def _stacked() -> Callable:
    return compiled(lambda packed: mx.stack(_level_bytes(packed), axis=-3))
