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

# How far, in steps, the scale is searched around the root mean square.
SEARCH = (0, -1, 1, -2, 2)

# How much more an error along the vector itself costs than one across it. The queries
# that attend to a key point its way, so such an error scales the scores that matter;
# and it makes all values of an average shorter or longer alike.
ALONG = 16


def levels(bits: int) -> List[float]:
    """The positive levels of the ``bits``-bit codebook for N(0, 1), ascending."""
    c1, c3, c5 = CODEBOOKS[bits]
    halves = [i + 0.5 for i in range(2 ** (bits - 1))]
    return [c1 * u + c3 * u**3 + c5 * u**5 for u in halves]


@dataclass(frozen=True)
class LloydMax:
    """Quantises rotated vectors to ``bits`` (2, 3 or 4) bits per channel and an 8-bit scale."""

    bits: int

    @property
    def fields(self) -> int:
        """Into how many fields of channels the queries of :meth:`scores` are cut."""
        return packing.FIELDS[self.bits]

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

    def scores(self, q: Sequence[mx.array], codes: Tuple[mx.array, ...]) -> mx.array:
        """Dot products of queries with vectors whose ``codes`` are channel-major.

        Like :meth:`mix`, it can be traced once for all numbers of rows and vectors.

        Args:
            q: the fields of the queries, (..., R, D / n) each.
            codes: those of :meth:`encode` with the last two axes swapped.

        Returns:
            (..., R, T).
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
    above = [(size > (low + high) / 2).astype(z.dtype) for low, high in zip(positive, positive[1:])]
    magnitude = sum(above[1:], start=above[0])
    half = len(positive)
    return mx.where(z < 0, half - 1 - magnitude, half + magnitude).astype(mx.uint8)


def _search(bits: int):
    """The encoder for ``bits``: x (..., T, D) to codes (..., T, D) and scales (..., T, 1)."""
    if bits not in _encoders:

        def encode(x):
            rms = mx.maximum(mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True)), 1e-20)
            norm = rms * math.sqrt(x.shape[-1])
            start = mx.round((mx.log2(rms) - LOWEST_OCTAVE) * STEPS_PER_OCTAVE)
            best = None
            for step in SEARCH:
                scale = mx.clip(start + step, 0, 255).astype(mx.uint8)
                width = _widen(scale)
                codes = _nearest(x / width, bits)
                missing = x - _level(codes, bits) * width
                along = mx.sum(missing * x, axis=-1, keepdims=True) / norm
                error = mx.sum(missing * missing, axis=-1, keepdims=True) + ALONG * along * along
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
