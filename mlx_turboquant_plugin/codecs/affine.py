"""The affine codecs: x is close to scale * code + zero point, from the minimum and maximum."""

from dataclasses import dataclass

import mlx.core as mx

from . import packing
from .byte_matrix import Prepared, multiply, prepare


@dataclass(frozen=True)
class VectorAffine:
    """One fp16 scale and one fp16 zero point per vector; made for keys.

    Methods are those of :class:`LloydMax`; ``codes`` end with the scales and the zero
    points, fp16 (..., T, 1) each.
    """

    bits: int

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        zero = mx.min(x, axis=-1, keepdims=True).astype(mx.float16)
        span = mx.max(x, axis=-1, keepdims=True) - zero.astype(mx.float32)
        scale = (span / (2**self.bits - 1)).astype(mx.float16)
        steps = (x - zero.astype(mx.float32)) / mx.maximum(scale.astype(mx.float32), 1e-30)
        codes = mx.clip(mx.round(steps), 0, 2**self.bits - 1).astype(mx.uint8)
        return (*packing.pack(codes, self.bits), scale, zero)

    def decode(self, codes: tuple[mx.array, ...]) -> mx.array:
        *packed, scale, zero = codes
        steps = packing.unpack(packed, self.bits)
        return steps.astype(mx.float32) * scale.astype(mx.float32) + zero.astype(mx.float32)

    def expand(self, codes: tuple[mx.array, ...], axis: int) -> tuple[Prepared, mx.array, mx.array]:
        *packed, scale, zero = codes
        steps = packing.unpack(packed, self.bits, axis)
        return prepare(steps, 0.0), scale, zero

    def scores(self, q: mx.array, steps: Prepared, scale: mx.array, zero: mx.array) -> mx.array:
        total = mx.sum(q, axis=-1, keepdims=True)
        product = multiply(q, steps, 0.0)
        return product * scale.astype(mx.float32) + total * zero.astype(mx.float32)


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

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        padding = -self.head_dim % self.group_size
        if padding:
            x = mx.concatenate([x, mx.zeros((*x.shape[:-1], padding))], axis=-1)
        codes, scale, zero = mx.quantize(x, group_size=self.group_size, bits=self.bits)
        return codes, scale.astype(mx.float16), zero.astype(mx.float16)

    def decode(self, codes: tuple[mx.array, ...]) -> mx.array:
        packed, scale, zero = self._widen(codes)
        x = mx.dequantize(packed, scale, zero, group_size=self.group_size, bits=self.bits)
        return self._unpad(x)

    def expand(self, codes: tuple[mx.array, ...], axis: int) -> tuple[mx.array, ...]:
        return codes

    def mix(self, p: mx.array, *codes: mx.array) -> mx.array:
        packed, scale, zero = self._widen(codes)
        out = mx.quantized_matmul(
            p,
            packed,
            scale,
            zero,
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
        )
        return self._unpad(out)

    def _unpad(self, x: mx.array) -> mx.array:
        if self.head_dim % self.group_size == 0:
            return x
        # A product with a constant, since slices can't be traced for all lengths at once.
        return x @ mx.eye(x.shape[-1], self.head_dim)

    @staticmethod
    def _widen(codes):
        # On the CPU quantized_matmul is wrong by a percent in half precision.
        packed, scale, zero = codes
        return packed, scale.astype(mx.float32), zero.astype(mx.float32)
