"""The Lloyd-Max codec: TurboQuant-MSE of arXiv 2504.19874, section 3.1.

A rotated vector's coordinates, divided by their root mean square, are close to
N(0, 1). Each is replaced by the nearest level of a scalar quantiser made for
N(0, 1) (Lloyd 1957, Max 1960), and one scale per vector is stored.
"""

import math
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import mlx.core as mx

from . import packing

# The positive levels of each codebook are c1 u + c3 u^3 + c5 u^5 at u = 1/2, 3/2, ...:
# on every device arithmetic is faster than a table. The coefficients minimise the
# mean squared error for N(0, 1): 0.11748, 0.03455 and 0.00952, within 0.2% of the
# best quantiser's. tests/lloyd_max.py computes them.
CODEBOOKS: Dict[int, Tuple[float, float, float]] = {
    2: (0.89288694, 0.0506925043, 0.0),
    3: (0.490661287, 0.004788697, 0.000436545479),
    4: (0.262655001, 0.000129165995, 2.95824274e-05),
}

# A scale is a power of 2^(1/12): 8 bits from 1.2e-4 to 310, 3% off at most.
STEPS_PER_OCTAVE = 12
LOWEST_OCTAVE = -13

# How far, in steps, the scale is searched around the root mean square. What is kept
# is the one with the least error: 10 to 15% less than the nearest one has.
SEARCH = (0, -1, 1, -2, 2)


def levels(bits: int) -> List[float]:
    """The positive levels of the ``bits``-bit codebook for N(0, 1), ascending."""
    c1, c3, c5 = CODEBOOKS[bits]
    halves = [i + 0.5 for i in range(2 ** (bits - 1))]
    return [c1 * u + c3 * u**3 + c5 * u**5 for u in halves]


@dataclass(frozen=True)
class LloydMax:
    """Quantises rotated vectors to ``bits`` (2, 3 or 4) bits per channel and an 8-bit scale."""

    bits: int

    def encode(self, x: mx.array) -> Tuple[mx.array, ...]:
        """Encode rotated vectors.

        Args:
            x: (..., T, D) fp32.

        Returns:
            The packed codes (:func:`packing.pack`), uint8 (..., T, bytes), and the
            scales, uint8 (..., T, 1).
        """
        codes, scale = _search(self.bits)(x)
        return (*packing.pack(codes, self.bits), scale)

    def decode(self, codes: Tuple[mx.array, ...]) -> mx.array:
        """The vectors (..., T, D), fp32 and still rotated, that token-major ``codes`` stand for."""
        *packed, scale = codes
        return mx.concatenate(self._levels(packed), axis=-1) * _widen(scale)

    def scores(self, q: mx.array, codes: Tuple[mx.array, ...]) -> mx.array:
        """Dot products of ``q`` (..., R, D) with vectors whose ``codes`` are channel-major.

        ``codes`` are those of :meth:`encode` with the last two axes swapped; returns (..., R, T).
        """
        *packed, scale = codes
        return packing.dot(q, self._levels(packed)) * _widen(scale)

    def mix(self, p: mx.array, codes: Tuple[mx.array, ...]) -> mx.array:
        """The sums, weighted by ``p`` (..., R, T), of vectors with token-major ``codes``: (..., R, D)."""
        *packed, scale = codes
        return packing.mix(p * mx.swapaxes(_widen(scale), -1, -2), self._levels(packed))

    def _levels(self, packed: Sequence[mx.array]) -> List[mx.array]:
        return [_level(field, self.bits) for field in packing.unpack(packed, self.bits)]


def _level(codes: mx.array, bits: int) -> mx.array:
    c1, c3, c5 = CODEBOOKS[bits]
    u = codes.astype(mx.float32) - (2**bits - 1) / 2
    square = u * u
    return ((square * c5 + c3) * square + c1) * u


def _widen(scale: mx.array) -> mx.array:
    octaves = scale.astype(mx.float32) * (1 / STEPS_PER_OCTAVE) + LOWEST_OCTAVE
    return mx.exp(octaves * math.log(2))


def _nearest(z: mx.array, bits: int) -> mx.array:
    """Codes of the levels nearest to ``z``: thresholds lie half-way between levels."""
    positive = levels(bits)
    size = mx.abs(z)
    magnitude = mx.zeros_like(z)
    for low, high in zip(positive, positive[1:]):
        magnitude = magnitude + (size > (low + high) / 2)
    half = len(positive)
    return mx.where(z < 0, half - 1 - magnitude, half + magnitude).astype(mx.uint8)


def _search(bits: int):
    """The encoder for ``bits``: x (..., T, D) to codes (..., T, D) and scales (..., T, 1)."""
    if bits not in _encoders:

        def encode(x):
            rms = mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True))
            start = mx.round((mx.log2(mx.maximum(rms, 1e-30)) - LOWEST_OCTAVE) * STEPS_PER_OCTAVE)
            best = None
            for step in SEARCH:
                scale = mx.clip(start + step, 0, 255).astype(mx.uint8)
                width = _widen(scale)
                codes = _nearest(x / width, bits)
                error = mx.sum((x - _level(codes, bits) * width) ** 2, axis=-1, keepdims=True)
                if best is None:
                    best = error, codes, scale
                else:
                    better = error < best[0]
                    candidates = zip((error, codes, scale), best)
                    best = tuple(mx.where(better, new, old) for new, old in candidates)
            return best[1:]

        # Elementwise work in one pass, and one trace for all numbers of tokens.
        _encoders[bits] = mx.compile(encode, shapeless=True)
    return _encoders[bits]


_encoders: Dict[int, object] = {}
