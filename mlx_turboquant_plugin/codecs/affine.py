"""The affine codecs: x is close to scale * code + zero point, from the minimum and maximum."""

from dataclasses import dataclass
from typing import Tuple

import mlx.core as mx

from .packing import pack, unpack


@dataclass(frozen=True)
class VectorAffine:
    """One fp16 scale and one fp16 zero point per vector; made for keys.

    Methods take and return what those of :class:`LloydMax` do, with the zero
    points, fp16 (..., T, 1), as one more array of the codes.
    """

    bits: int

    def encode(self, x: mx.array) -> Tuple[mx.array, ...]:
        zero = mx.min(x, axis=-1, keepdims=True).astype(mx.float16)
        span = mx.max(x, axis=-1, keepdims=True) - zero.astype(mx.float32)
        scale = (span / (2**self.bits - 1)).astype(mx.float16)
        steps = (x - zero.astype(mx.float32)) / mx.maximum(scale.astype(mx.float32), 1e-30)
        codes = mx.clip(mx.round(steps), 0, 2**self.bits - 1).astype(mx.uint8)
        return (*pack(codes, self.bits), scale, zero)

    def decode(self, codes: Tuple[mx.array, ...]) -> mx.array:
        *planes, scale, zero = codes
        steps = unpack(planes, self.bits, axis=-1).astype(mx.float32)
        return steps * scale.astype(mx.float32) + zero.astype(mx.float32)

    def scores(self, q: mx.array, codes: Tuple[mx.array, ...]) -> mx.array:
        *planes, scale, zero = codes
        steps = unpack(planes, self.bits, axis=-2).astype(mx.float32)
        total = mx.sum(q, axis=-1, keepdims=True)
        return (q @ steps) * scale.astype(mx.float32) + total * zero.astype(mx.float32)


@dataclass(frozen=True)
class GroupAffine:
    """One scale and one zero point per group of channels, by ``mx.quantize``; made for values.

    Vectors are padded with zeros to a multiple of the group size (head dims 80 and 112).
    """

    bits: int
    head_dim: int

    @property
    def group_size(self) -> int:
        return 64 if self.head_dim % 64 == 0 else 32

    def encode(self, x: mx.array) -> Tuple[mx.array, ...]:
        padding = -self.head_dim % self.group_size
        if padding:
            x = mx.concatenate([x, mx.zeros((*x.shape[:-1], padding))], axis=-1)
        codes, scale, zero = mx.quantize(x, group_size=self.group_size, bits=self.bits)
        return codes, scale.astype(mx.float16), zero.astype(mx.float16)

    def decode(self, codes: Tuple[mx.array, ...]) -> mx.array:
        return mx.dequantize(*self._widen(codes), group_size=self.group_size, bits=self.bits)[
            ..., : self.head_dim
        ]

    def mix(self, p: mx.array, codes: Tuple[mx.array, ...]) -> mx.array:
        out = mx.quantized_matmul(
            p,
            *self._widen(codes),
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
        )
        return out[..., : self.head_dim] if self.head_dim % self.group_size else out

    @staticmethod
    def _widen(codes):
        # On the CPU quantized_matmul is wrong by a percent in half precision.
        packed, scale, zero = codes
        return packed, scale.astype(mx.float32), zero.astype(mx.float32)
