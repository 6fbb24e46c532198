"""Keys or values of one layer, exact tokens and codes side by side, in one launch.

One source, ``dequantize.metal``, serves both kinds of GPU.
"""

from typing import NamedTuple, Optional

import mlx.core as mx

from ..codecs.key_bias import KeyBias
from ..codecs.kv_codec import Codes
from ..codecs.rotation import Rotation
from . import CODECS, DTYPES, cuda_portable, metal, unsupported_dim
from .cuda_source import DEQUANTIZE_THREADS
from .inputs import MODEL, code_arrays, int_array, inverse_array, level_array, model_arrays

# Tokens of a threadgroup of dequantize.metal.
TOKENS = 64

DEQUANTIZE = (
    "dequantize",
    "older newer low low_of_upper_fields high scales zeros rotation "
    f"{MODEL} places",
    "out",
)


class Side(NamedTuple):
    """The keys or the values of one layer.

    Attributes:
        older, newer: exact tokens (B, H, E, D), one after the other; ``newer`` may be None.
        codec, bits: what made the codes.
        codes: channel-major (B, H, C, T) for keys and token-major (B, H, T, C) for values.
        is_keys: which of the two they are.
        first_coded: the position of the first code.
        rotation, balance, bias: as in :class:`KVCodec`; the last two may be None.
    """

    older: mx.array
    newer: Optional[mx.array]
    codec: str
    bits: int
    codes: Codes
    is_keys: bool
    first_coded: int
    rotation: Rotation
    balance: Optional[mx.array] = None
    bias: Optional[KeyBias] = None


def cannot_dequantize(side: Side) -> Optional[str]:
    """None, or what the kernel can't do about ``side``, in words."""
    dim, dtype = side.older.shape[-1], side.older.dtype
    if side.codec not in CODECS:
        return f"the {side.codec} codec"
    if unsupported_dim(dim):
        return f"a head dim of {dim}: it must be a multiple of 8 from 32 to 256"
    if dtype not in DTYPES:
        return f"{dtype}: keys and values must be float16, bfloat16 or float32"
    return None


def dequantize(
    kernel: str,
    side: Side,
    *,
    left: int = 0,
    sinks: int,
    first_code: int = 0,
    decoded: int = 0,
    first_exact: int,
    exact: int,
    total: int,
) -> mx.array:
    """Zeros, the first exact tokens, tokens from codes, later exact tokens, and zeros.

    Args:
        kernel: "metal" or "cuda".
        left: the zeros before.
        sinks: the number of first tokens.
        first_code: the index of the first code that counts, and ``decoded``, how many do.
        first_exact: the place of the first later token among the exact ones, and ``exact``,
            how many there are.
        total: T, all places.

    Returns:
        (B, H, T, D) in the dtype of the exact tokens.
    """
    older = side.older
    newer = older if side.newer is None else side.newer
    batch, heads, count, dim = older.shape
    axis = -1 if side.is_keys else -2
    planes = code_arrays(side.codes, side.codec, batch * heads, axis)
    # With those that make arrays large enough.
    coded = planes[-1].shape[axis] if side.codes else 0
    levels = level_array((side.codec, side.bits))
    end = side.first_coded + first_code + decoded
    layout, model = model_arrays(levels, side.balance, side.bias, end)
    places = (total, left, sinks, first_code, decoded, coded, count, first_exact, exact)
    tiles = -(-(first_code + decoded) // TOKENS) - first_code // TOKENS if decoded else 0
    groups = tiles + -(-(total - decoded) // TOKENS)
    compiled = metal.kernel if kernel == "metal" else cuda_portable.kernel
    (out,) = compiled(*DEQUANTIZE)(
        inputs=[
            older,
            newer,
            *planes,
            inverse_array(side.rotation),
            *model,
            int_array(*places, side.first_coded, *layout),
        ],
        template=[
            ("T", older.dtype),
            ("D", dim),
            ("BITS", side.bits),
            ("AFFINE", side.codec == "affine"),
            ("GROUPED", side.codec == "affine" and not side.is_keys),
            ("CHANNEL_MAJOR", side.is_keys),
            ("BALANCED", side.balance is not None),
            ("BIASED", side.bias is not None),
        ],
        grid=(groups * DEQUANTIZE_THREADS, batch * heads, 1),
        threadgroup=(DEQUANTIZE_THREADS, 1, 1),
        output_shapes=[(batch, heads, total, dim)],
        output_dtypes=[older.dtype],
    )
    return out
