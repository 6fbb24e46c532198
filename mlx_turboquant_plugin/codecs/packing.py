"""Dense packing of 2-, 3-, 4- and 8-bit codes into bytes.

The channels of a vector are cut into equal fields, and the codes at the same place of
all fields share a byte: with 4 bits, byte i holds channel i in its low and channel
i + D/2 in its high half. Unpacking is one shift and one mask for a whole field. Three
bits are two arrays of the low two bits (of four fields each) and one of the high bits:
nothing is lost to padding.
"""

from typing import Sequence, Tuple

import mlx.core as mx

FIELDS = {2: 4, 3: 8, 4: 2, 8: 1}


def pack(codes: mx.array, bits: int) -> Tuple[mx.array, ...]:
    """Pack ``codes`` (..., D), uint8, of ``bits`` bits each; D must be a multiple of 8.

    Returns:
        One uint8 array (..., D * bits / 8), or three (..., D / 8) for 3 bits.
    """
    fields = mx.split(codes, FIELDS[bits], axis=-1)
    if bits != 3:
        return (_join(fields, bits),)
    low = [field & 3 for field in fields]
    return _join(low[:4], 2), _join(low[4:], 2), _join([field >> 2 for field in fields], 1)


def unpack(packed: Sequence[mx.array], bits: int) -> mx.array:
    """Undo :func:`pack`: uint8 codes (..., D)."""
    return mx.concatenate(unpack_fields(packed, bits), axis=-1)


def unpack_fields(packed: Sequence[mx.array], bits: int) -> Tuple[mx.array, ...]:
    """The codes of each field, uint8, in the order of the channels and not yet joined.

    Channels are along the axis that they have in ``packed``. Can be traced once for any
    number of vectors (``mx.compile(shapeless=True)``).
    """
    if bits == 8:
        return (packed[0],)
    if bits == 3:
        *low, high = packed
        return tuple(
            ((low[i // 4] >> (2 * (i % 4))) & 3) | (((high >> i) & 1) << 2)
            for i in range(FIELDS[3])
        )
    return tuple((packed[0] >> (bits * i)) & (2**bits - 1) for i in range(FIELDS[bits]))


def _join(fields: Sequence[mx.array], width: int) -> mx.array:
    packed = fields[0]
    for place, field in enumerate(fields[1:], start=1):
        packed = packed | (field << (width * place))
    return packed
