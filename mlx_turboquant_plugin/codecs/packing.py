"""Dense packing of 2-, 3-, 4- and 8-bit codes into bytes.

The channels of a vector are cut into equal fields, and the codes at the same place of
all fields share a byte: with 4 bits, byte i holds channel i in its low and channel
i + D/2 in its high half. Unpacking is one shift and one mask for a whole field. Three
bits are two arrays of the low two bits (of four fields each) and one of the high bits:
nothing is lost to padding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..compiling import compiled

FIELDS = {2: 4, 3: 8, 4: 2, 8: 1}


def pack(codes: mx.array, bits: int) -> tuple[mx.array, ...]:
    """Pack ``codes`` (..., D), uint8, of ``bits`` bits each; D must be a multiple of 8.

    Returns:
        One uint8 array (..., D * bits / 8), or three (..., D / 8) for 3 bits.
    """
    fields: Any = mx.split(codes, FIELDS[bits], axis=-1)  # A list, whatever MLX's stubs say.
    if bits != 3:
        return (_join(fields, bits),)
    low = [field & 3 for field in fields]
    return _join(low[:4], 2), _join(low[4:], 2), _join([field >> 2 for field in fields], 1)


def unpack(packed: Sequence[mx.array], bits: int, axis: int = -1) -> mx.array:
    """Undo :func:`pack`: uint8 codes (..., D), the channels along ``axis``."""
    if packed[0].shape[-1] % 4:
        return _joined_fields(bits, axis)(*packed)
    # Four bytes at a time: shifts, and copies too, are as fast for words.
    return _joined_fields(bits, axis)(*(x.view(mx.uint32) for x in packed)).view(mx.uint8)


@functools.cache
def _joined_fields(bits: int, axis: int) -> Callable:
    """The function from packed codes, in bytes or in words, to their fields, joined."""

    def joined(*packed):
        # The same bits of every byte of a word.
        every = 0x01010101 if packed[0].dtype == mx.uint32 else 1
        if bits == 8:
            fields = list(packed)
        elif bits == 3:
            *low, high = packed
            fields = [
                ((low[i // 4] >> (2 * (i % 4))) & (3 * every)) | (((high >> i) & every) << 2)
                for i in range(FIELDS[3])
            ]
        else:
            mask = (2**bits - 1) * every
            fields = [(packed[0] >> (bits * i)) & mask for i in range(FIELDS[bits])]
        return mx.concatenate(fields, axis=axis)

    return compiled(joined)


def _join(fields: Sequence[mx.array], width: int) -> mx.array:
    packed = fields[0]
    for place, field in enumerate(fields[1:], start=1):
        packed = packed | (field << (width * place))
    return packed
