"""The codec that loses nothing: rotated vectors in fp32, for ``TURBOQUANT_BYPASS=identity``."""

from dataclasses import dataclass
from typing import Sequence, Tuple

import mlx.core as mx


@dataclass(frozen=True)
class Exact:
    """Methods take and return what those of :class:`LloydMax` do."""

    fields = 1

    def encode(self, x: mx.array) -> Tuple[mx.array, ...]:
        return (x,)

    def decode(self, codes: Tuple[mx.array, ...]) -> mx.array:
        return codes[0]

    def scores(self, q: Sequence[mx.array], codes: Tuple[mx.array, ...]) -> mx.array:
        return q[0] @ codes[0]

    def mix(self, p: mx.array, codes: Tuple[mx.array, ...]) -> mx.array:
        return p @ codes[0]
