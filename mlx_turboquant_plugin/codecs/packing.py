"""Dense packing of 2-, 3-, 4- and 8-bit codes into bytes.

Codes are packed in planes. A plane of ``w`` bits per code has ``D * w / 8`` bytes;
byte i holds, from its lowest bits up, the codes of the channels i, i + D*w/8,
i + 2*D*w/8, ... so that unpacking is a few shifts of whole arrays. Three bits are a
plane of the two low bits and a plane of the high bit: nothing is lost to padding.
"""

from typing import Sequence, Tuple

import mlx.core as mx

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def pack(codes: mx.array, bits: int) -> Tuple[mx.array, ...]:
    """Pack ``codes`` (..., D) of ``bits`` bits each.

    Args:
        codes: uint8, D a multiple of 8.
        bits: 2, 3, 4 or 8.

    Returns:
        One uint8 array (..., D * width / 8) per plane.
    """
    planes, shift = [], 0
    for width in PLANES[bits]:
        fields = mx.split((codes >> shift) & (2**width - 1), 8 // width, axis=-1)
        plane = fields[0]
        for position, field in enumerate(fields[1:], start=1):
            plane = plane | (field << (width * position))
        planes.append(plane)
        shift += width
    return tuple(planes)


def unpack(planes: Sequence[mx.array], bits: int, axis: int) -> mx.array:
    """Undo :func:`pack`; the channels of the planes and of the result lie along ``axis``.

    Uses no operation that depends on the other axes' lengths, so it can be traced
    once for all of them (``mx.compile(shapeless=True)``).
    """
    codes, shift = None, 0
    for plane, width in zip(planes, PLANES[bits]):
        mask = 2**width - 1
        fields = [(plane >> (width * i)) & mask for i in range(8 // width)]
        part = fields[0] if len(fields) == 1 else mx.concatenate(fields, axis=axis)
        codes = part if codes is None else codes | (part << shift)
        shift += width
    return codes
