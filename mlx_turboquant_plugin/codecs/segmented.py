"""Keys in two segments: more bits for the channels that matter more.

How much a channel's error moves the scores differs by an order of magnitude between the
channels of a head. Keys are sorted by it and cut in two halves, the segments, which are rotated,
quantized and scaled each by itself. Reverse water-filling (Cover and Thomas, Elements of
Information Theory, 10.3.3) would give every channel bits of its own. Here a code of each segment
fills a byte, and where the byte is cut is chosen for each head (:attr:`KVCodec.layout`).

Levels are uniform. As bytes, they begin with the code and go on with a one and zeros, the middle
of all bytes that begin so: no table, and the same function for any number of bits.
"""

import mlx.core as mx
import numpy as np

from ..compiling import compiled
from .byte_matrix import Prepared, multiply, prepare
from .feedback import FEEDBACK_BLOCK
from .lloyd_max import OFFSET, STEPS_PER_OCTAVE, best_scale, size_of

# The bits that the first segment can have, and has where nothing is known; the other has the
# rest of the byte.
FIRST_BITS, USUAL_BITS = (4, 5, 6), 5

# By how much levels, bytes less OFFSET, are divided at size 1.
UNIT = 2**5.5

# The best steps for N(0, 1) (Max 1960, table II), and the mean squared errors with them.
STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041}
ERRORS = {2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104}

# The size that suits a root mean square of 1, in steps of the scale.
SHIFTS = {
    bits: STEPS_PER_OCTAVE * np.log2(step / 2 ** (8 - bits) * UNIT) for bits, step in STEPS.items()
}


class Segmented:
    """Quantizes vectors whose two segments are rotated.

    ``codes`` are bytes, uint8 (..., T, D / 2), the code of a channel of the first segment above
    that of the same channel of the second, and scales, uint8 (..., T, 2): token-major.
    Channel-major is with the last two axes swapped. Made for keys.

    Args:
        first_bits: those of the first segment of each head, (H,); None stands for 5.
        feedback: see :attr:`KVCodec.feedback`.
    """

    def __init__(self, first_bits: mx.array | None = None, feedback: mx.array | None = None):
        first = np.array(USUAL_BITS if first_bits is None else first_bits)
        if first.ndim:
            first = first[:, None, None]
        second = 8 - first
        # Of both segments, (H, 2, 1, 1) or (2, 1, 1).
        bits = np.stack([first, second], axis=min(1, first.ndim)).reshape(*first.shape[:1], 2, 1, 1)
        counts = 2.0**bits
        # How far levels are apart at size 1, how many are below 0, and the last code.
        self._step, self._below, self._last = (
            mx.array(x.astype(np.float32))
            for x in (256 / counts / UNIT, OFFSET * counts / 256, counts - 1)
        )
        self._shift = mx.array(np.vectorize(SHIFTS.get)(bits).astype(np.float32))
        self._feedback = feedback
        self._second = mx.array(second.astype(np.uint8))
        # What a byte is multiplied by to begin with the code, what masks the rest, and the one
        # after the code, each (..., 2, 1, 1): processors have no shifts of bytes by different
        # numbers.
        above = (8 - bits) * np.arange(2)[:, None, None]
        self._factor, self._mask, self._one = (
            mx.array(x.astype(np.uint8)) for x in (2**above, 256 - 2 ** (8 - bits), 2 ** (7 - bits))
        )

    def encode(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The codes of ``x``, fp32 (..., T, D)."""
        segments = mx.stack([*mx.split(x, 2, axis=-1)], axis=-3)
        scale, size = best_scale(
            segments, lambda x, size: self._rounded(x, size * self._step)[1], self._shift
        )
        codes = self._codes(segments, size * self._step)
        first, second = (codes[..., segment, :, :] for segment in range(2))
        return (first << self._second) | second, mx.swapaxes(scale[..., 0], -1, -2)

    def _codes(self, x: mx.array, step: mx.array) -> mx.array:
        """Codes of ``x`` (..., 2, T, D / 2); block by block where errors are fed back."""
        if self._feedback is None:
            return self._rounded(x, step)[0]
        codes = []
        for first in range(0, x.shape[-1], FEEDBACK_BLOCK):
            own, x = x[..., :FEEDBACK_BLOCK], x[..., FEEDBACK_BLOCK:]
            found, errors = self._rounded(own, step)
            codes.append(found)
            if x.shape[-1]:
                after = first + FEEDBACK_BLOCK
                x = x + errors @ self._feedback[..., first:after, after:]
        return mx.concatenate(codes, axis=-1)

    def _rounded(self, x: mx.array, step: mx.array) -> tuple[mx.array, mx.array]:
        """Codes of ``x`` (..., 2, T, n) for levels (..., 2, T, 1) apart, and their errors."""
        return _nearest(x, step, self._below, self._last)

    def decode(self, codes: tuple[mx.array, mx.array]) -> mx.array:
        """The vectors, fp32 (..., T, D) and still rotated, that token-major ``codes`` stand for."""
        packed, scale = codes
        widths = size_of(mx.swapaxes(scale, -1, -2)[..., None]) / UNIT
        segments = (self._levels(packed).astype(mx.float32) - OFFSET) * widths
        return mx.concatenate([segments[..., 0, :, :], segments[..., 1, :, :]], axis=-1)

    def expand(self, codes: tuple[mx.array, mx.array], axis: int) -> tuple[Prepared, mx.array]:
        """The levels of both segments as matrices for products, (..., 2, D / 2, T), and scales.

        Args:
            axis: that of the channels: -2, as only channel-major codes are multiplied.
        """
        packed, scale = codes
        return prepare(self._levels(packed), OFFSET), scale

    def _levels(self, packed: mx.array) -> mx.array:
        """The levels (..., 2, m, n) of codes (..., m, n), as bytes; what overflows is lost."""
        return mx.expand_dims(packed, -3) * self._factor & self._mask | self._one

    @staticmethod
    def scores(q: mx.array, levels: Prepared, scale: mx.array) -> mx.array:
        """Dot products of queries with vectors.

        Args:
            q: fp32 (..., 2, R, D / 2), the segments apart.
            levels, scale: expanded codes.

        Returns:
            fp32 (..., R, T).
        """
        widths = size_of(mx.expand_dims(scale, -2)) * (1 / UNIT)
        return mx.sum(multiply(q, levels, OFFSET) * widths, axis=-3)


@compiled
def _nearest(
    x: mx.array, step: mx.array, below: mx.array, last: mx.array
) -> tuple[mx.array, mx.array]:
    codes = mx.clip(mx.floor(x / step + below), 0, last)
    # The middles of the bytes that begin with the codes.
    return codes.astype(mx.uint8), (codes + (0.5 - below)) * step - x
