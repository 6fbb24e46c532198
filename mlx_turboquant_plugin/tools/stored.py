"""What the codes in a cache stand for and what they lose, in NumPy and fp64.

For ``mlx_turboquant selftest``. Codes are token-major arrays, rotated vectors (..., T, D).
"""

from collections.abc import Sequence

import numpy as np

from .. import reference


def levels(arrays: Sequence[np.ndarray], codec: str, bits: int) -> np.ndarray:
    """The rotated vectors of Lloyd-Max codes, or of affine ones with a scale per vector.

    Args:
        arrays: planes, see codecs/packing.py; scales; with "affine" zero points.
    """
    if codec == "affine":
        *planes, scale, zero = arrays
        return _unpack(planes, bits) * scale.astype(np.float64) + zero
    *planes, sizes = arrays
    return reference.dequantize(_unpack(planes, bits), sizes, bits)


def segments(
    arrays: Sequence[np.ndarray], first_bits: np.ndarray
) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """Codes and sizes of both segments of keys, see :func:`reference.encode_segments`."""
    packed, sizes = (x.astype(int) for x in arrays)
    place = 2 ** (8 - first_bits)[:, None, None]
    return [(packed // place, sizes[..., :1]), (packed % place, sizes[..., 1:])]


def _unpack(planes: Sequence[np.ndarray], bits: int) -> np.ndarray:
    if bits == 3:
        low = np.concatenate([_unpack([plane], 2) for plane in planes[:2]], axis=-1)
        return low + 4 * _unpack([planes[2]], 1)
    bytes_, places = planes[0].astype(int), range(0, 8, bits)
    return np.concatenate([(bytes_ >> place) % 2**bits for place in places], axis=-1)


def grouped(arrays: Sequence[np.ndarray], bits: int) -> np.ndarray:
    """The rotated vectors of what ``mx.quantize`` made: a stream of bits, scales, zero points."""
    words, scale, zero = arrays
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    digits = stream.reshape(*words.shape[:-1], scale.shape[-1], -1, bits)
    codes = digits @ (1 << np.arange(bits))
    x = codes * scale[..., None].astype(np.float64) + zero[..., None]
    return x.reshape(*words.shape[:-1], -1)


def loss(x: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Square root (..., T) of what the Lloyd-Max codec minimizes: :func:`reference.quantize`."""
    error = x - decoded
    along = np.sum(error * x, axis=-1) / np.maximum(np.linalg.norm(x, axis=-1), 1e-20)
    return np.sqrt(np.sum(error**2, axis=-1) + reference.ALONG * along**2)


def least_loss(x: np.ndarray, bits: int, inexact: np.ndarray, uniform: bool) -> np.ndarray:
    """The loss (..., T) of the codes that ``reference.py`` makes.

    Where a vector's root mean square lies between two sizes, other sizes are searched by
    who rounds it up and by who rounds it down: the larger loss of the two.

    Args:
        inexact: (..., T), by what part of itself a vector's length may be off.
        uniform: see :func:`reference.quantize`.
    """
    near = (x * (1 + sign * inexact[..., None]) for sign in (-1, 1))
    found = (reference.quantize(y, bits, uniform) for y in near)
    one, two = (loss(x, reference.dequantize(codes, s, bits, uniform)) for codes, s in found)
    return np.maximum(one, two)


def share(
    x: np.ndarray, decoded: np.ndarray, bits: int, inexact: np.ndarray, uniform: bool = False
) -> float:
    """What rotated vectors (..., T, D) lose, as a share of what they may: the most of all.

    Args:
        inexact, uniform: see :func:`least_loss`.
    """
    most = 1.2 * least_loss(x, bits, inexact, uniform)
    most = most + (1 + reference.ALONG) ** 0.5 * inexact * np.linalg.norm(x, axis=-1)
    return (loss(x, decoded) / most).max()


def share_of_segment(
    x: np.ndarray,
    codes: np.ndarray,
    sizes: np.ndarray,
    bits: int,
    inexact: np.ndarray,
    added: np.ndarray,
) -> float:
    """The same of a segment: of its sizes, if levels were the nearest, and of its levels.

    Args:
        x, codes: (..., T, D), with ``sizes`` (..., T, 1).
        added: what errors are multiplied by, see :func:`reference.feedback`.
    """
    moved, decoded = x.copy(), reference.dequantize(codes, sizes, bits, uniform=True)
    for channel, row in enumerate(added):
        moved += (decoded[..., channel] - moved[..., channel])[..., None] * row
    least = np.abs(_nearest(moved, sizes, bits) - moved)
    step = reference.FACTOR * 2 ** (8 - bits) * reference.SIZES[sizes]
    most = least + step / 64 + 4 * (inexact * np.linalg.norm(x, axis=-1))[..., None]
    of_sizes = share(x, _nearest(x, sizes, bits), bits, inexact, uniform=True)
    return max(of_sizes, (np.abs(decoded - moved) / most).max())


def _nearest(x: np.ndarray, sizes: np.ndarray, bits: int) -> np.ndarray:
    levels, size = reference.UNIFORM_LEVELS[bits], reference.SIZES[sizes]
    return levels[np.abs((x / size)[..., None] - levels).argmin(axis=-1)] * size
