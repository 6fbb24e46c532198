"""The Lloyd-Max codec: TurboQuant-MSE of arXiv 2504.19874, section 3.1.

A rotated vector's coordinates, divided by their root mean square, are close to
N(0, 1). Each is replaced by the nearest level of the scalar quantiser that is
optimal for N(0, 1) (Lloyd 1957, Max 1960), and one scale per vector is stored.
"""

from dataclasses import dataclass
from typing import Tuple

import mlx.core as mx

from .packing import pack, unpack


@dataclass(frozen=True)
class Codebook:
    """A symmetric scalar codebook.

    Attributes:
        levels: the positive levels as integers of at most 7 bits, so that every
            number format a kernel may compute in (int8, fp16, bf16) holds them exactly.
        unit: levels divided by it are the Lloyd-Max levels for N(0, 1).
        odd: (c1, c3, c5) with level = round(c1 u + c3 u^3 + c5 u^5), u = code - (2^bits - 1) / 2:
            arithmetic is many times faster than a table look-up on the CPU.
    """

    levels: Tuple[int, ...]
    unit: float
    odd: Tuple[float, float, float]


# Made by tools in tests/test_lloyd_max.py: the Lloyd iteration for N(0, 1), then the
# multiple whose rounding to integers costs least. Distortions: 0.11748, 0.03456,
# 0.00951, within 0.1% of the optimum.
CODEBOOKS = {
    2: Codebook((30, 100), 66.21, (59.166667, 3.3333333, 0.0)),
    3: Codebook((9, 28, 50, 80), 36.95, (17.441667, 0.43333333, 0.0)),
    4: Codebook(
        (5, 15, 25, 36, 48, 62, 79, 104), 38.01, (10.1031813, 1.73849588e-3, 1.14182692e-3)
    ),
}


@dataclass(frozen=True)
class LloydMax:
    """Quantises rotated vectors to ``bits`` (2, 3 or 4) bits per channel and an fp16 scale."""

    bits: int

    @property
    def unit(self) -> float:
        return CODEBOOKS[self.bits].unit

    def encode(self, x: mx.array) -> Tuple[mx.array, ...]:
        """Encode rotated vectors.

        Args:
            x: (..., T, D) fp32.

        Returns:
            The planes of the packed codes, uint8 (..., T, D * width / 8) each, and
            the scales, fp16 (..., T, 1). The scale is the least-squares one,
            <r, x> / <r, r> for the reconstruction r.
        """
        rms = mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True))
        codes = self._nearest(x / mx.maximum(rms, 1e-30))
        r = self._levels(codes) / self.unit
        scale = mx.sum(r * x, axis=-1, keepdims=True) / mx.sum(r * r, axis=-1, keepdims=True)
        return (*pack(codes, self.bits), scale.astype(mx.float16))

    def decode(self, codes: Tuple[mx.array, ...]) -> mx.array:
        """The vectors (..., T, D), fp32 and still rotated, that token-major ``codes`` stand for."""
        *planes, scale = codes
        return self.levels(planes, axis=-1) * (scale.astype(mx.float32) / self.unit)

    def scores(self, q: mx.array, codes: Tuple[mx.array, ...]) -> mx.array:
        """Dot products of ``q`` (..., R, D) with vectors whose ``codes`` are channel-major.

        ``codes`` are those of :meth:`encode` with the last two axes swapped; returns (..., R, T).
        """
        *planes, scale = codes
        levels = self.levels(planes, axis=-2)
        return ((q * (1 / self.unit)) @ levels) * scale.astype(mx.float32)

    def mix(self, p: mx.array, codes: Tuple[mx.array, ...]) -> mx.array:
        """The sums, weighted by ``p`` (..., R, T), of vectors with token-major ``codes``: (..., R, D)."""
        *planes, scale = codes
        weights = p * mx.swapaxes(scale.astype(mx.float32) * (1 / self.unit), -1, -2)
        return weights @ self.levels(planes, axis=-1)

    def levels(self, planes, axis: int) -> mx.array:
        """The integer levels, as fp32, of packed codes with the channels along ``axis``."""
        return self._levels(unpack(planes, self.bits, axis))

    def _levels(self, codes: mx.array) -> mx.array:
        c1, c3, c5 = CODEBOOKS[self.bits].odd
        u = codes.astype(mx.float32) - (2**self.bits - 1) / 2
        square = u * u
        return mx.round(((square * c5 + c3) * square + c1) * u)

    def _nearest(self, z: mx.array) -> mx.array:
        """Codes of the levels nearest to ``z``: thresholds lie half-way between levels."""
        levels = CODEBOOKS[self.bits].levels
        size = mx.abs(z) * self.unit
        magnitude = mx.zeros(z.shape, mx.uint8)
        for low, high in zip(levels, levels[1:]):
            magnitude = magnitude + (size > (low + high) / 2)
        half = len(levels)
        return mx.where(z < 0, half - 1 - magnitude, half + magnitude).astype(mx.uint8)
