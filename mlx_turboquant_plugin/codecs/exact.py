"""The codec that loses nothing: rotated vectors in fp32, for ``TURBOQUANT_BYPASS=identity``."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Exact:
    """Methods are those of :class:`LloydMax`; ``codes`` are the vectors."""

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        return (x,)

    def decode(self, codes: tuple[mx.array, ...]) -> mx.array:
        return codes[0]

    def expand(self, codes: tuple[mx.array, ...], axis: int) -> tuple[mx.array, ...]:
        return codes

    def scores(self, q: mx.array, x: mx.array) -> mx.array:
        return q @ x

    def mix(self, p: mx.array, x: mx.array) -> mx.array:
        return p @ x
