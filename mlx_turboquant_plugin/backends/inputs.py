"""Inputs that the Metal kernels, and their like on NVIDIA GPUs, share."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..codecs.key_bias import BLOCK, RotaryTable
from ..codecs.kv_codec import SEGMENTED, Codes, KVCodec
from ..codecs.lloyd_max import CODEBOOKS
from ..codecs.rotation import Rotation
from ..codecs.segmented import SHIFTS, UNIT, USUAL_BITS
from . import sizes

# MLX puts smaller arrays into another address space.
DEVICE_SIZE = 8

# The names of what :func:`model_arrays` gives.
MODEL = "levels balance bias fine coarse_cos coarse_sin layout"


class PairLayout(NamedTuple):
    """Where the channels of rotary pairs are.

    Attributes:
        pairs: how many there are.
        between, distance: the distances of the first channels of two pairs and of the channels
            of a pair.
    """

    pairs: int = 0
    between: int = 0
    distance: int = 0


def code_arrays(codes: Codes, codec: str, heads: int, axis: int) -> Sequence[mx.array]:
    """Three planes, scales and zero points; those that a codec lacks are repetitions.

    Args:
        heads: the KV heads of all sequences.
        axis: that of the tokens.
    """
    if not codes:
        return [mx.zeros((1, 1, 1, DEVICE_SIZE), mx.uint8)] * 5
    tokens = codes[-1].shape[axis]
    if heads * tokens < DEVICE_SIZE:
        padding = [(0, 0)] * 4
        padding[axis] = (0, DEVICE_SIZE - tokens)
        codes = tuple(mx.pad(plane, padding) for plane in codes)
    *planes, scale, zero = codes if codec == "affine" else (*codes, codes[-1])
    return [*(planes if len(planes) == 3 else planes * 3), scale, zero]


def model_arrays(
    levels: mx.array, codec: KVCodec | None, end: int
) -> tuple[PairLayout, Sequence[mx.array]]:
    """The layout of the rotary pairs, and the inputs that ``MODEL`` names.

    The levels stand for what is missing and are not read there. In place of a layout are the
    usual bits of first segments.

    Args:
        codec: of keys; None where there are only values.
        end: one more than the last position whose angles are needed.
    """
    balance, layout, bias = (codec.balance, codec.layout, codec.bias) if codec else [None] * 3
    if balance is None:
        balance = levels
    if layout is None:
        layout = int_array(*[USUAL_BITS] * DEVICE_SIZE)
    if bias is None:
        return PairLayout(), (levels, balance, *[levels] * 4, layout)
    table = bias.table
    table.reach((end - 1) // BLOCK + 1)
    return pair_layout(table), (levels, balance, bias.bias, table.fine, *table.coarse, layout)


@functools.cache
def level_array(*codecs: tuple[str, int]) -> mx.array:
    """The levels of codecs and bits, MOST_LEVELS places each, for vectors of unit mean square.

    "segmented" has what a step of its levels stands for, and for each number of bits its
    shift, in the place of that number; "affine" has none.
    """
    levels = np.zeros((len(codecs), sizes.Codes.MOST_LEVELS), np.float32)
    for row, (codec, bits) in zip(levels, codecs):
        if codec == "lloyd-max":
            half = np.array(CODEBOOKS[bits].levels) / CODEBOOKS[bits].unit
            row[: 2**bits] = np.concatenate([-half[::-1], half])
        elif codec == SEGMENTED:
            row[0] = 1 / UNIT
            row[list(SHIFTS)] = list(SHIFTS.values())
    return mx.array(levels)


@functools.cache
def inverse_array(rotation: Rotation) -> mx.array:
    """What turns vectors back: the signs, or the transposed matrix."""
    array = mx.contiguous(rotation.array.T)
    mx.eval(array)
    return array


def pair_layout(table: RotaryTable) -> PairLayout:
    """Where the pairs are that ``table`` has the angles of."""
    pairs = table.dims // 2
    return PairLayout(pairs, 2, 1) if table.traditional else PairLayout(pairs, 1, pairs)


# All layers ask for the same. By way of NumPy, since lazy arrays must not be shared by threads.
@functools.lru_cache(maxsize=64)
def int_array(*numbers: int) -> mx.array:
    return mx.array(np.array(numbers, np.int32))
